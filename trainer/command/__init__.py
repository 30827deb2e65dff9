"""Other functions of the command: help, shell completion, an examination of the machine."""
