"""From the files of a model to a model with weights."""
