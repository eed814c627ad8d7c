"""``base:`` the format in which the frozen weights are held.

The sizes are plain arithmetic on the section, so the planner can use them without torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ingle.config.section import Section, tagged


class NoBase(Section):
    """Weights stay in the compute dtype."""

    format: Literal["none"] = "none"

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes, scales included."""
        return float(dtype_bits)


class Nf4Base(Section):
    """4-bit NormalFloat, bit-compatible with bitsandbytes.

    Source: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), section 3.

    Attributes:
        block_size: Consecutive weights of a row that share one absmax.
        double_quant: Hold the absmax values in 8 bits too.
    """

    format: Literal["nf4"]
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = True

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes, scales included."""
        absmax_bits = 8 + 32 / 256 if self.double_quant else 32
        return 4 + absmax_bits / self.block_size


class Int8Base(Section):
    """8-bit integers with one scale a row, as in LLM.int8() without outlier decomposition.

    Source: Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 2.
    """

    format: Literal["int8"]

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes, scales included."""
        return 8 + 32 / in_features


_Base = Annotated[NoBase | Nf4Base | Int8Base, Field(discriminator="format")]
BaseConfig = Annotated[_Base, tagged("format", input_type=_Base | Literal["none", "nf4", "int8"])]
