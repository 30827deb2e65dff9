"""How a model is trained: workers that talk, gradients that are averaged, the loop, precision."""
