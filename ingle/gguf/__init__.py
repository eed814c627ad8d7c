"""GGUF, llama.cpp's file format: container, tensor names, architectures, vocabularies and quantization mixes.

The ``gguf`` package is imported when a file is first read or written, because most runs do neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ingle.gguf.container import GgufFile, GgufTensor

if TYPE_CHECKING:
    from ingle.gguf.reader import read_gguf
    from ingle.gguf.writer import TensorToWrite, write_gguf

__all__ = ["GgufFile", "GgufTensor", "TensorToWrite", "read_gguf", "write_gguf"]

_LAZY = {"read_gguf": "reader", "TensorToWrite": "writer", "write_gguf": "writer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"ingle.gguf.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
