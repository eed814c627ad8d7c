"""Quantized base weights: formats, modules with quantized weights, conversion of models, and their audit.

A quantized weight consists of **planes**: frozen byte tensors that FSDP shards by rows, safetensors stores and export
copies. The format alone defines what the bytes mean.
"""

from __future__ import annotations

from ingle.quant.catalog import Formats, GgufFormats, make_format, make_formats
from ingle.quant.conversion import convert, describe_unknown, quantize_ends
from ingle.quant.experts import LEAST_ROWS, QuantExperts, QuantStack, is_fused_experts
from ingle.quant.format import Format
from ingle.quant.interchange import (
    from_bitnet,
    from_bitsandbytes,
    from_hqq,
    from_mxfp4,
    to_bitsandbytes,
    to_hqq,
    to_mxfp4,
)
from ingle.quant.inventory import Audit, ClassAudit, Unquantized, audit
from ingle.quant.linear import QuantEmbedding, QuantLinear
from ingle.quant.plane import PlaneSpec
from ingle.quant.straight_through import TernaryLinear, settle

__all__ = [
    "LEAST_ROWS",
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
    "describe_unknown",
    "from_bitnet",
    "from_bitsandbytes",
    "from_hqq",
    "from_mxfp4",
    "is_fused_experts",
    "make_format",
    "make_formats",
    "quantize_ends",
    "settle",
    "to_bitsandbytes",
    "to_hqq",
    "to_mxfp4",
]
