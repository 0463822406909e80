"""Training: loss, optimizer, step, loop, checkpoints and metrics."""
