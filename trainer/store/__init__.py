"""Files of a run: its directory, checkpoints, initial weights, checksummed files."""
