"""Command line, verification, inspection."""
