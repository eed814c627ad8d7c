"""Sections of ``base:`` for the formats of GGUF files: one table of block formats, one of mixes."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import create_model

from ingle.config.section import Section


class GgmlBase(Section):
    """Blocks of a GGUF file, byte for byte as llama.cpp reads them; a row must consist of full blocks.

    Attributes:
        block_size: Consecutive weights of a row that form a block.
        block_bytes: Size of a block in bytes.
        additive: Whether each block has a free offset, into which a QA-LoRA update merges exactly.
        fallback: The format that llama.cpp uses for a matrix whose rows are not full blocks; None means float16.
        read_only: Why weights are only read in this format and never quantized to it; None if both are possible.
    """

    format: str
    block_size: ClassVar[int]
    block_bytes: ClassVar[int]
    additive: ClassVar[bool] = False
    fallback: ClassVar[str | None] = None
    read_only: ClassVar[str | None] = None

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Returns the bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_size


class MixBase(Section):
    """A mix of llama.cpp: one GGUF format for most matrices and a wider one for the sensitive ones.

    Which matrix gets which format depends on the model and on whether its rows are full blocks.

    Source: llama.cpp, ``llama_tensor_get_type``.

    Attributes:
        mean_bits: Average bits per weight of a model with the shape of Llama-2-7B.
    """

    format: str
    mean_bits: ClassVar[float]

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Returns the average bits per weight, scales included; the exact number depends on the model."""
        return self.mean_bits


_literal: Any = Literal  # accepts a name that is only known at run time


def _blocks(
    name: str,
    block_size: int,
    block_bytes: int,
    summary: str,
    *,
    fallback: str | None = None,
    additive: bool = False,
    read_only: str | None = None,
) -> type[GgmlBase]:
    """Makes the section of one block format; its class is named after the format (``Q4_KBase``)."""
    struct = f"block_{name[:-1]}K" if name.endswith("_k") else f"block_{name}"
    section = create_model(
        f"{name.upper()}Base",
        __base__=GgmlBase,
        __module__=__name__,
        __doc__=f"GGUF {name.upper()}: {summary}.\n\nSource: ggml, ``{struct}``.",
        format=(_literal[name], ...),
    )
    section.block_size, section.block_bytes = block_size, block_bytes
    section.fallback, section.additive, section.read_only = fallback, additive, read_only
    return section


def _grid(name: str, block_bytes: int, summary: str) -> type[GgmlBase]:
    """Makes the section of a format whose codes are indices into a fixed grid."""
    return _blocks(name, 256, block_bytes, f"{summary}; read only", read_only=_SEARCH)


def _mix(name: str, mean_bits: float, summary: str) -> type[MixBase]:
    section = create_model(
        f"{name.upper()}Base",
        __base__=MixBase,
        __module__=__name__,
        __doc__=f"llama.cpp's {name.upper()}: {summary}.",
        format=(_literal[name], ...),
    )
    section.mean_bits = mean_bits
    return section


_FLOAT = "it is meant for models that were trained in it; for any other model an integer format loses less"
_SEARCH = "finding the best grid entries is a long search that needs an importance matrix"

Q4_0Base = _blocks("q4_0", 32, 18, "symmetric 4-bit integers, one scale per 32 weights")
Q4_1Base = _blocks("q4_1", 32, 20, "4-bit integers, one scale and one offset per 32 weights", additive=True)
Q5_0Base = _blocks("q5_0", 32, 22, "symmetric 5-bit integers, one scale per 32 weights")
Q5_1Base = _blocks("q5_1", 32, 24, "5-bit integers, one scale and one offset per 32 weights", additive=True)
Q8_0Base = _blocks("q8_0", 32, 34, "symmetric 8-bit integers, one scale per 32 weights")

_K = "-bit scales per {0} weights, float16 scales per 256"
Q4_KBase = _blocks("q4_k", 256, 144, f"4-bit integers with offsets; 6{_K.format(32)}", fallback="q5_0")
Q6_KBase = _blocks("q6_k", 256, 210, f"symmetric 6-bit integers; 8{_K.format(16)}", fallback="q8_0")
Q5_KBase = _blocks("q5_k", 256, 176, f"5-bit integers with offsets; 6{_K.format(32)}", fallback="q5_1")
Q3_KBase = _blocks("q3_k", 256, 110, f"symmetric 3-bit integers; 6{_K.format(16)}", fallback="q4_0")
Q2_KBase = _blocks("q2_k", 256, 84, f"2-bit integers with offsets; 4{_K.format(16)}", fallback="q4_0")

IQ4_NLBase = _blocks("iq4_nl", 32, 18, "16 non-linear levels, one scale per 32 weights")
IQ4_XSBase = _blocks("iq4_xs", 256, 136, f"16 non-linear levels; 6{_K.format(32)}", fallback="iq4_nl")

_TERNARY = "one scale per 256 weights; for models with ternary weights"
TQ1_0Base = _blocks("tq1_0", 256, 54, f"ternary weights, five per byte, {_TERNARY}", fallback="q4_0")
TQ2_0Base = _blocks("tq2_0", 256, 66, f"ternary weights, four per byte, {_TERNARY}", fallback="q4_0")

MXFP4Base = _blocks("mxfp4", 32, 17, "4-bit floats, a power of two per 32 weights; read only", read_only=_FLOAT)
NVFP4Base = _blocks("nvfp4", 64, 36, "4-bit floats, an 8-bit float scale per 16 weights; read only", read_only=_FLOAT)

IQ2_XXSBase = _grid("iq2_xxs", 66, "groups of eight weights from a grid of 256")
IQ2_XSBase = _grid("iq2_xs", 74, "groups of eight weights from a grid of 512")
IQ2_SBase = _grid("iq2_s", 82, "groups of eight weights from a grid of 1,024")
IQ3_XXSBase = _grid("iq3_xxs", 98, "groups of four weights from a grid of 256")
IQ3_SBase = _grid("iq3_s", 110, "groups of four weights from a grid of 512")
IQ1_SBase = _grid("iq1_s", 50, "groups of eight ternary weights from a grid of 2,048")
IQ1_MBase = _grid("iq1_m", 56, "groups of eight ternary weights from a grid of 2,048")

_OUTPUTS = "for ``v_proj``, ``o_proj`` and ``down_proj``"
_EVERY_OTHER = "for ``v_proj`` and ``down_proj`` of every other layer"
Q3_K_SBase = _mix("q3_k_s", 3.44, "Q3_K everywhere")
Q3_K_MBase = _mix("q3_k_m", 3.87, f"Q3_K, with Q4_K and Q5_K {_OUTPUTS}")
Q3_K_LBase = _mix("q3_k_l", 4.24, f"Q3_K, with Q5_K {_OUTPUTS}")
Q4_K_SBase = _mix("q4_k_s", 4.54, "Q4_K, with Q5_K for ``v_proj`` and ``down_proj`` of the first layers")
Q4_K_MBase = _mix("q4_k_m", 4.82, f"Q4_K, with Q6_K {_EVERY_OTHER}")
Q5_K_SBase = _mix("q5_k_s", 5.5, "Q5_K everywhere")
Q5_K_MBase = _mix("q5_k_m", 5.66, f"Q5_K, with Q6_K {_EVERY_OTHER}")

#: Block formats that weights can be quantized to.
ENCODED = (
    *(Q4_0Base, Q4_1Base, Q5_0Base, Q5_1Base, Q8_0Base, Q4_KBase, Q6_KBase, Q5_KBase, Q3_KBase, Q2_KBase),
    *(IQ4_NLBase, IQ4_XSBase, TQ1_0Base, TQ2_0Base),
)
#: Block formats that are read from files and trained on, but that no weight is quantized to.
READ_ONLY = (
    *(MXFP4Base, NVFP4Base, IQ2_XXSBase, IQ2_XSBase, IQ2_SBase),
    *(IQ3_XXSBase, IQ3_SBase, IQ1_SBase, IQ1_MBase),
)
MIXES = (Q3_K_SBase, Q3_K_MBase, Q3_K_LBase, Q4_K_SBase, Q4_K_MBase, Q5_K_SBase, Q5_K_MBase)
