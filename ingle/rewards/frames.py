"""Frames between the pool and its processes: four bytes with the length, then JSON in UTF-8."""

from __future__ import annotations

import json
import struct
from typing import IO, Any

_HEADER = struct.Struct(">I")
#: Longest frame; a longer length is not one of ours.
MAX_BYTES = 256 << 20


def encode(value: Any) -> bytes:
    """Returns a value as a frame; what JSON lacks becomes text.

    Raises:
        ValueError: The value contains itself, or is too long.
    """
    content = json.dumps(value, default=str, separators=(",", ":")).encode()  # ASCII, half surrogate pairs included
    if len(content) > MAX_BYTES:
        raise ValueError(f"{len(content):,} bytes are too many for a frame")
    return _HEADER.pack(len(content)) + content


def decode(buffer: bytearray) -> Any:
    """Removes the first frame from a buffer and returns its value; None if it is not complete.

    Raises:
        ValueError: The bytes are no frame with a JSON object.
    """
    if len(buffer) < _HEADER.size:
        return None
    (size,) = _HEADER.unpack_from(buffer)
    if size > MAX_BYTES:
        raise ValueError("the length of a frame is impossible")
    end = _HEADER.size + size
    if len(buffer) < end:
        return None
    try:
        value = json.loads(bytes(buffer[_HEADER.size : end]))
    except RecursionError as error:
        raise ValueError("a frame is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("a frame is not an object")
    del buffer[:end]
    return value


def receive(pipe: IO[bytes]) -> Any:
    """Reads a frame of a pipe that carries nothing else; None at its end."""
    buffer = bytearray(pipe.read(_HEADER.size))
    if len(buffer) == _HEADER.size:
        buffer += pipe.read(_HEADER.unpack(buffer)[0])
    return decode(buffer)
