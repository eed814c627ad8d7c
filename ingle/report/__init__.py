"""Typed results, charts and pages; needs no torch."""
