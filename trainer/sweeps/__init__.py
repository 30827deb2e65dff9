"""Sweeps: many trials of one experiment, on warm workers. The only package that imports Optuna."""

import warnings

# Optuna imports tqdm, which in a notebook warns that a package for progress bars is missing.
warnings.filterwarnings("ignore", "IProgress not found")
