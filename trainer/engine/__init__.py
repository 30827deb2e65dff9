"""Training: communication of the workers, averaged gradients, the loop, precision."""
