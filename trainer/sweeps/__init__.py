"""Sweeps: many trials of one experiment, on warm workers. The only package that imports Optuna."""

import warnings

# Optuna imports tqdm, which in a notebook suggests a package for progress bars that nobody sees.
warnings.filterwarnings("ignore", "IProgress not found")
