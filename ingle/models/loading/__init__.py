"""Reads the files of a model, and builds the model with its weights."""
