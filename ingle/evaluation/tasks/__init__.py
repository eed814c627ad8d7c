"""Tasks: their samples, and the outputs of a model for them."""
