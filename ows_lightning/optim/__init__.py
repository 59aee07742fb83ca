"""The projected optimizer."""
