"""Fused steps of a layer: norms, SwiGLU, LoRA, cross-entropy."""
