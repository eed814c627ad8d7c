"""The formats of GGUF files that are read and trained on, but in which no weight is packed."""

from __future__ import annotations

from typing import Literal

from ingle.config.ggml import GgmlBase

#: Why Ingle does not pack 4-bit floats.
FLOAT = "models are published in it by who trained them in it; for any other model a format of integers loses less"


class MXFP4Base(GgmlBase):
    """GGUF MXFP4: 4-bit floats, a power of two for 32; as some models are published; read only.

    Source: ggml, ``block_mxfp4``.
    """

    format: Literal["mxfp4"]
    block_bytes = 17
    not_packed = FLOAT


class NVFP4Base(GgmlBase):
    """GGUF NVFP4: 4-bit floats, an 8-bit float as scale for 16; as some models are published; read only.

    Source: ggml, ``block_nvfp4``.
    """

    format: Literal["nvfp4"]
    block_size = 64
    block_bytes = 36
    not_packed = FLOAT


class GridBase(GgmlBase):
    """Super-blocks of 256 weights whose codes name rows of a fixed grid."""

    block_size = 256
    not_packed = "which rows stand for its weights is a long search that an importance matrix has to lead"


class IQ2_XXSBase(GridBase):
    """GGUF IQ2_XXS: 256 rows of eight weights; read only.

    Source: ggml, ``block_iq2_xxs``.
    """

    format: Literal["iq2_xxs"]
    block_bytes = 66


class IQ2_XSBase(GridBase):
    """GGUF IQ2_XS: 512 rows of eight weights; read only.

    Source: ggml, ``block_iq2_xs``.
    """

    format: Literal["iq2_xs"]
    block_bytes = 74


class IQ2_SBase(GridBase):
    """GGUF IQ2_S: 1,024 rows of eight weights; read only.

    Source: ggml, ``block_iq2_s``.
    """

    format: Literal["iq2_s"]
    block_bytes = 82


class IQ3_XXSBase(GridBase):
    """GGUF IQ3_XXS: 256 rows of four weights; read only.

    Source: ggml, ``block_iq3_xxs``.
    """

    format: Literal["iq3_xxs"]
    block_bytes = 98


class IQ3_SBase(GridBase):
    """GGUF IQ3_S: 512 rows of four weights; read only.

    Source: ggml, ``block_iq3_s``.
    """

    format: Literal["iq3_s"]
    block_bytes = 110


class IQ1_SBase(GridBase):
    """GGUF IQ1_S: 2,048 rows of eight ternary weights; read only.

    Source: ggml, ``block_iq1_s``.
    """

    format: Literal["iq1_s"]
    block_bytes = 50


class IQ1_MBase(GridBase):
    """GGUF IQ1_M: 2,048 rows of eight ternary weights; read only.

    Source: ggml, ``block_iq1_m``.
    """

    format: Literal["iq1_m"]
    block_bytes = 56
