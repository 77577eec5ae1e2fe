"""Checkpoints in the Hugging Face format."""
