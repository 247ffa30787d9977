"""Build, audit and run engines."""
