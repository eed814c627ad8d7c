"""GGUF: llama.cpp's file format, its names, architectures, vocabularies and rules of quantization."""

from __future__ import annotations

from ingle.gguf.container import GgufFile, GgufTensor
from ingle.gguf.reading import read_gguf
from ingle.gguf.writing import TensorToWrite, write_gguf

__all__ = ["GgufFile", "GgufTensor", "TensorToWrite", "read_gguf", "write_gguf"]
