"""Writers of merged models: GGUF files and folders of safetensors."""
