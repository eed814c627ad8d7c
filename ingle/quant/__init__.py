"""Quantized base weights: formats, the modules that hold them, conversion and its audit.

A weight is held as **planes**: frozen byte tensors that FSDP shards by rows, safetensors holds and export
copies.  A format says what the bytes mean; nothing else in Ingle does.
"""

from __future__ import annotations

from ingle.quant.conversion import convert
from ingle.quant.embedding import QuantEmbedding, quantize_ends
from ingle.quant.experts import QuantExperts, QuantStack
from ingle.quant.format import Format, make_format
from ingle.quant.interchange import from_bitsandbytes, to_bitsandbytes
from ingle.quant.interchange_bitnet import from_bitnet
from ingle.quant.interchange_hqq import from_hqq, to_hqq
from ingle.quant.inventory import Audit, ClassAudit, Unquantized, audit
from ingle.quant.linear import QuantLinear
from ingle.quant.mixing import Formats, GgufFormats, make_formats
from ingle.quant.plane import PlaneSpec
from ingle.quant.straight_through import TernaryLinear, settle

__all__ = [
    "Audit",
    "ClassAudit",
    "Format",
    "Formats",
    "GgufFormats",
    "PlaneSpec",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "QuantStack",
    "TernaryLinear",
    "Unquantized",
    "audit",
    "convert",
    "from_bitnet",
    "from_bitsandbytes",
    "from_hqq",
    "make_format",
    "make_formats",
    "quantize_ends",
    "settle",
    "to_bitsandbytes",
    "to_hqq",
]
