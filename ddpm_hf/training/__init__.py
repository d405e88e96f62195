"""Training: the objective, the optimiser, the average, the checkpoints and the loop that joins them."""
