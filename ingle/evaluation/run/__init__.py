"""Runs models on tasks and texts."""
