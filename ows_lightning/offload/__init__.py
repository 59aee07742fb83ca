"""Frozen blocks that are offloaded from the device, and pass through a few slots on it."""
