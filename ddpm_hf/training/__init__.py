"""Training: loss, batches, optimizer, EMA, checkpoints, and the loop that uses them."""
