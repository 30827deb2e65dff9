"""Averages of gradients that send less than the gradients: 8-bit numbers, and error feedback."""
