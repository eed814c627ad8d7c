"""HQQ and ternary formats: encode and decode."""
