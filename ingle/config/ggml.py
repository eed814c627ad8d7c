"""The formats of GGUF files, as sections of ``base:``; see :mod:`ingle.config.base`."""

from __future__ import annotations

from typing import ClassVar, Literal

from ingle.config.section import Section

#: Why Ingle does not pack the formats with grids.
GRID = "which rows stand for its weights is a long search that an importance matrix has to lead"
#: Why Ingle does not pack 4-bit floats.
FLOAT = "models are published in it by who trained them in it; for any other model a format of integers loses less"


class GgmlBase(Section):
    """Blocks of a GGUF file, byte for byte as llama.cpp reads them; rows have to be whole blocks.

    Attributes:
        block_size: Consecutive weights of a row that make a block.
        block_bytes: Bytes a block takes.
        additive: Whether a block ends in a free offset, which a QA-LoRA change folds into.
        fallback: What llama.cpp packs a matrix in whose rows are not whole blocks; None means float16.
        not_packed: Why weights are not packed in it, only read from a file; None where they are.
    """

    format: str
    block_size: ClassVar[int] = 32
    block_bytes: ClassVar[int]
    additive: ClassVar[bool] = False
    fallback: ClassVar[str | None] = None
    not_packed: ClassVar[str | None] = None

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes, scales included."""
        return 8 * self.block_bytes / self.block_size


class Q4_0Base(GgmlBase):
    """GGUF Q4_0: 4-bit integers around zero, one scale for 32.

    Source: ggml, ``block_q4_0``.
    """

    format: Literal["q4_0"]
    block_bytes = 18


class Q4_1Base(GgmlBase):
    """GGUF Q4_1: 4-bit integers, one scale and one offset for 32.

    Source: ggml, ``block_q4_1``.
    """

    format: Literal["q4_1"]
    block_bytes = 20
    additive = True


class Q5_0Base(GgmlBase):
    """GGUF Q5_0: 5-bit integers around zero, one scale for 32.

    Source: ggml, ``block_q5_0``.
    """

    format: Literal["q5_0"]
    block_bytes = 22


class Q5_1Base(GgmlBase):
    """GGUF Q5_1: 5-bit integers, one scale and one offset for 32.

    Source: ggml, ``block_q5_1``.
    """

    format: Literal["q5_1"]
    block_bytes = 24
    additive = True


class Q8_0Base(GgmlBase):
    """GGUF Q8_0: 8-bit integers around zero, one scale for 32.

    Source: ggml, ``block_q8_0``.
    """

    format: Literal["q8_0"]
    block_bytes = 34


class Q4_KBase(GgmlBase):
    """GGUF Q4_K: 4-bit integers with offsets; 6-bit scales for 32, float16 ones for 256.

    Source: ggml, ``block_q4_K``.
    """

    format: Literal["q4_k"]
    block_size = 256
    block_bytes = 144
    fallback = "q5_0"


class Q6_KBase(GgmlBase):
    """GGUF Q6_K: 6-bit integers around zero; 8-bit scales for 16, float16 ones for 256.

    Source: ggml, ``block_q6_K``.
    """

    format: Literal["q6_k"]
    block_size = 256
    block_bytes = 210
    fallback = "q8_0"


class Q5_KBase(GgmlBase):
    """GGUF Q5_K: 5-bit integers with offsets; 6-bit scales for 32, float16 ones for 256.

    Source: ggml, ``block_q5_K``.
    """

    format: Literal["q5_k"]
    block_size = 256
    block_bytes = 176
    fallback = "q5_1"


class Q3_KBase(GgmlBase):
    """GGUF Q3_K: 3-bit integers around zero; 6-bit scales for 16, float16 ones for 256.

    Source: ggml, ``block_q3_K``.
    """

    format: Literal["q3_k"]
    block_size = 256
    block_bytes = 110
    fallback = "q4_0"


class Q2_KBase(GgmlBase):
    """GGUF Q2_K: 2-bit integers with offsets; 4-bit scales for 16, float16 ones for 256.

    Source: ggml, ``block_q2_K``.
    """

    format: Literal["q2_k"]
    block_size = 256
    block_bytes = 84
    fallback = "q4_0"


class IQ4_NLBase(GgmlBase):
    """GGUF IQ4_NL: non-linear 4-bit levels, one scale for 32.

    Source: ggml, ``block_iq4_nl``.
    """

    format: Literal["iq4_nl"]
    block_bytes = 18


class IQ4_XSBase(GgmlBase):
    """GGUF IQ4_XS: non-linear 4-bit levels; 6-bit scales for 32, float16 ones for 256.

    Source: ggml, ``block_iq4_xs``.
    """

    format: Literal["iq4_xs"]
    block_size = 256
    block_bytes = 136
    fallback = "iq4_nl"


class TQ1_0Base(GgmlBase):
    """GGUF TQ1_0: ternary weights, five to a byte, one scale for 256; for models that are ternary already.

    Source: ggml, ``block_tq1_0``.
    """

    format: Literal["tq1_0"]
    block_size = 256
    block_bytes = 54
    fallback = "q4_0"


class TQ2_0Base(GgmlBase):
    """GGUF TQ2_0: ternary weights, four to a byte, one scale for 256; for models that are ternary already.

    Source: ggml, ``block_tq2_0``.
    """

    format: Literal["tq2_0"]
    block_size = 256
    block_bytes = 66
    fallback = "q4_0"


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


class IQ2_XXSBase(GgmlBase):
    """GGUF IQ2_XXS: 256 rows of eight weights; read only.

    Source: ggml, ``block_iq2_xxs``.
    """

    format: Literal["iq2_xxs"]
    block_size = 256
    block_bytes = 66
    fallback = "iq4_nl"
    not_packed = GRID


class IQ2_XSBase(GgmlBase):
    """GGUF IQ2_XS: 512 rows of eight weights; read only.

    Source: ggml, ``block_iq2_xs``.
    """

    format: Literal["iq2_xs"]
    block_size = 256
    block_bytes = 74
    fallback = "iq4_nl"
    not_packed = GRID


class IQ2_SBase(GgmlBase):
    """GGUF IQ2_S: 1,024 rows of eight weights; read only.

    Source: ggml, ``block_iq2_s``.
    """

    format: Literal["iq2_s"]
    block_size = 256
    block_bytes = 82
    fallback = "iq4_nl"
    not_packed = GRID


class IQ3_XXSBase(GgmlBase):
    """GGUF IQ3_XXS: 256 rows of four weights; read only.

    Source: ggml, ``block_iq3_xxs``.
    """

    format: Literal["iq3_xxs"]
    block_size = 256
    block_bytes = 98
    fallback = "iq4_nl"
    not_packed = GRID


class IQ3_SBase(GgmlBase):
    """GGUF IQ3_S: 512 rows of four weights; read only.

    Source: ggml, ``block_iq3_s``.
    """

    format: Literal["iq3_s"]
    block_size = 256
    block_bytes = 110
    fallback = "iq4_nl"
    not_packed = GRID


class IQ1_SBase(GgmlBase):
    """GGUF IQ1_S: 2,048 rows of eight ternary weights; read only.

    Source: ggml, ``block_iq1_s``.
    """

    format: Literal["iq1_s"]
    block_size = 256
    block_bytes = 50
    fallback = "iq4_nl"
    not_packed = GRID


class IQ1_MBase(GgmlBase):
    """GGUF IQ1_M: 2,048 rows of eight ternary weights; read only.

    Source: ggml, ``block_iq1_m``.
    """

    format: Literal["iq1_m"]
    block_size = 256
    block_bytes = 56
    fallback = "iq4_nl"
    not_packed = GRID


class MixBase(Section):
    """A mix of llama.cpp: most matrices in one of GGUF's formats, those that lose most by it in a wider one.

    Which matrix gets which depends on the model, and a matrix whose rows are not whole blocks gets another format.

    Source: llama.cpp, ``llama_tensor_get_type``.

    Attributes:
        mean_bits: Bits a weight takes on average in a model of the shape of Llama-2-7B.
    """

    format: str
    mean_bits: ClassVar[float]

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes on average, scales included; the exact number depends on the model."""
        return self.mean_bits


class Q3_K_SBase(MixBase):
    """llama.cpp's Q3_K_S: Q3_K everywhere."""

    format: Literal["q3_k_s"]
    mean_bits = 3.44


class Q3_K_MBase(MixBase):
    """llama.cpp's Q3_K_M: Q3_K, with Q4_K and Q5_K for values, outputs of attention and ``down_proj``."""

    format: Literal["q3_k_m"]
    mean_bits = 3.87


class Q3_K_LBase(MixBase):
    """llama.cpp's Q3_K_L: Q3_K, with Q5_K for values, outputs of attention and ``down_proj``."""

    format: Literal["q3_k_l"]
    mean_bits = 4.24


class Q4_K_SBase(MixBase):
    """llama.cpp's Q4_K_S: Q4_K, with Q5_K for values and ``down_proj`` of the first layers."""

    format: Literal["q4_k_s"]
    mean_bits = 4.54


class Q4_K_MBase(MixBase):
    """llama.cpp's Q4_K_M: Q4_K, with Q6_K for values and ``down_proj`` of every other layer."""

    format: Literal["q4_k_m"]
    mean_bits = 4.82


class Q5_K_SBase(MixBase):
    """llama.cpp's Q5_K_S: Q5_K everywhere."""

    format: Literal["q5_k_s"]
    mean_bits = 5.5


class Q5_K_MBase(MixBase):
    """llama.cpp's Q5_K_M: Q5_K, with Q6_K for values and ``down_proj`` of every other layer."""

    format: Literal["q5_k_m"]
    mean_bits = 5.66
