"""Measures how much of the trained change an export keeps."""
