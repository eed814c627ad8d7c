"""The quantization formats of GGUF files; weights are stored in the bytes of the file."""

from __future__ import annotations

from ingle.quant.ggml.blocks import GgmlBlocks
from ingle.quant.ggml.codebooks import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from ingle.quant.ggml.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from ingle.quant.ggml.lookup import IQ4_NL, IQ4_XS, MXFP4, NVFP4
from ingle.quant.ggml.superblocks import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, TQ1_0, TQ2_0

__all__ = ["GGUF_FORMATS", "GgmlBlocks"]

#: All formats of GGUF files.
GGUF_FORMATS: tuple[type[GgmlBlocks], ...] = (
    *(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0),
    *(IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, MXFP4, NVFP4),
)
