"""Encoders and decoders of GGUF's block formats."""
