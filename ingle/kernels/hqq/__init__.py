"""Encoders and decoders of HQQ; the decoders also serve the ternary format."""
