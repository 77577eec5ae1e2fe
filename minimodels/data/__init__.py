"""Text and synthetic tasks."""
