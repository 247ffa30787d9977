"""Text to activation statistics."""
