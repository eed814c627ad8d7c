"""Typed results and how they are shown: on a terminal, as JSON, as pages.  Imports no torch."""
