"""What a run leaves on disk: its directory, checkpoints, initial weights, checksummed files."""
