"""Formats with a table of levels (NF4, FP4) and int8: encode and decode."""
