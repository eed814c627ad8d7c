"""Ingle: fine-tune and evaluate large language models on the hardware you own."""

__version__ = "0.1.0"
