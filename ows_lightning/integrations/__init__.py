"""The method in other training loops than Lightning's."""
