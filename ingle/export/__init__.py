"""Taking what was trained to where it is served: adapters, safetensors, GGUF, with proof."""
