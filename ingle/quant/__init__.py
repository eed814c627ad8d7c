"""Quantized base weights: formats, the modules that hold them, conversion and its audit.

A weight is held as **planes**: frozen byte tensors that FSDP shards by rows, safetensors holds and export
copies.  A format says what the bytes mean; nothing else in Ingle does.
"""

from __future__ import annotations

from ingle.quant.conversion import convert
from ingle.quant.experts import QuantExperts, QuantStack
from ingle.quant.format import Format, make_format
from ingle.quant.interchange import from_bitsandbytes, to_bitsandbytes
from ingle.quant.inventory import Audit, ClassAudit, Unquantized, audit
from ingle.quant.linear import QuantLinear
from ingle.quant.plane import PlaneSpec

__all__ = [
    "Audit",
    "ClassAudit",
    "Format",
    "PlaneSpec",
    "QuantExperts",
    "QuantLinear",
    "QuantStack",
    "Unquantized",
    "audit",
    "convert",
    "from_bitsandbytes",
    "make_format",
    "to_bitsandbytes",
]
