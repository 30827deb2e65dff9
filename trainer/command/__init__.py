"""What the command offers besides runs: help, shell completion, an examination of the machine."""
