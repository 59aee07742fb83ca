"""Which decoder blocks train: their scores, the sampling probabilities, and the callback that acts on them."""
