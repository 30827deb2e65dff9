"""What every worker executes: the phases in order, checks before them, and what follows them."""
