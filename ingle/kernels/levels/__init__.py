"""Encoders and decoders of NF4, FP4 and int8, and the encoder of the ternary format."""
