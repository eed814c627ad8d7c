"""Reads and writes files of other programs."""
