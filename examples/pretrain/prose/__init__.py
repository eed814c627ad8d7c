"""Grammar-driven English: the text the bundled base model is pre-trained on."""
