"""Frozen blocks that wait outside the device, and pass through a small window on it."""
