"""GGUF's block formats: encode and decode."""
