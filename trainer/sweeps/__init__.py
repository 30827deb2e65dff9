"""Sweeps: many trials of one experiment, on warm workers. The only package that imports Optuna."""
