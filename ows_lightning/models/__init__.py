"""What a model is, and what is done to it: loading, blocks, loss, export."""
