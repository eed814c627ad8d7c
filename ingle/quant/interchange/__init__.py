"""Converts quantized layers from and to the tensors of other programs, copying codes without encoding again."""

from __future__ import annotations

from ingle.quant.interchange.bitnet import from_bitnet
from ingle.quant.interchange.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from ingle.quant.interchange.hqq import from_hqq, to_hqq
from ingle.quant.interchange.mxfp4 import from_mxfp4, to_mxfp4

__all__ = ["from_bitnet", "from_bitsandbytes", "from_hqq", "from_mxfp4", "to_bitsandbytes", "to_hqq", "to_mxfp4"]
