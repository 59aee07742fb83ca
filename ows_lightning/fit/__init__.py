"""What training sampled and projected weights asks of a Trainer."""
