"""Metrics of validation and test data beside the loss."""
