"""The formats of GGUF files in which weights are packed, as sections of ``base:``; see :mod:`ingle.config.base`."""

from __future__ import annotations

from typing import ClassVar, Literal

from ingle.config.section import Section


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
