"""Checkpoint files: written whole, found again, read with care."""
