"""Tasks: their samples, and what a model did with them."""
