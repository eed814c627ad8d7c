"""Attention within packed documents."""
