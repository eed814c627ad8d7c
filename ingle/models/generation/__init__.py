"""Generates answers with a key-value cache."""
