"""The base-format axis: what a packed weight means, one file per member, one ``match`` to choose.

A further member is a frozen dataclass with these methods; nothing outside it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ingle.config.base import (
    BaseConfig,
    Fp4Base,
    HqqBase,
    Int8Base,
    Nf4Base,
    NoBase,
    TernaryBase,
    base_sections,
    format_name,
)
from ingle.config.ggml import GgmlBase, MixBase
from ingle.quant.ggml import GgmlBlocks
from ingle.quant.ggml_float import MXFP4, NVFP4
from ingle.quant.ggml_grid import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from ingle.quant.ggml_k import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from ingle.quant.ggml_legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from ingle.quant.ggml_levels import IQ4_NL, IQ4_XS
from ingle.quant.ggml_ternary import TQ1_0, TQ2_0
from ingle.quant.hqq import Hqq
from ingle.quant.int8 import Int8
from ingle.quant.levels import Fp4, Nf4
from ingle.quant.plane import PlaneSpec, Scratch
from ingle.quant.ternary import Ternary


class Format(Protocol):
    """How a weight ``[out_features, in_features]`` is packed into planes and back.

    Legend: O = out_features (rows), I = in_features.

    Attributes:
        name: What ``base.format`` calls it.
        additive_field: The number of neighbours in a row that share a free additive float, into which a QA-LoRA
            delta folds exactly; None where the format has no such field.
        scratch: Where layers of this format decode, one after the other.
    """

    @property
    def name(self) -> str:
        """What ``base.format`` calls it."""
        ...

    @property
    def additive_field(self) -> int | None:
        """Group size of a free additive float, or None."""
        ...

    @property
    def scratch(self) -> Scratch:
        """Where layers of this format decode, one after the other."""
        ...

    def plane_specs(self, out_features: int, in_features: int) -> dict[str, PlaneSpec]:
        """Name, shape and dtype of every plane."""
        ...

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Bits one weight takes, scales included."""
        ...

    def granule(self, out_features: int, in_features: int) -> int:
        """Rows that can be cut out of all planes together; ``out_features`` where only the whole can."""
        ...

    def encode(self, weight_OI: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> dict[str, Tensor]:
        """Packs a weight.

        Args:
            weight_OI: ``[O, I]``, floating, on any device.
            importance: ``[I]``, mean square of the inputs, for formats that weigh their error by it.
            name: The tensor's name, for errors.

        Raises:
            QuantizationError: The weight holds NaN or infinity, or has a shape the format cannot hold.
        """
        ...

    def recode(self, codes: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The codes of one packing under the scales of another, which tells what changed in the codes alone."""
        ...

    def decode(
        self,
        planes: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Unpacks to ``[O, I]`` with the fastest kernel there is, bit for bit as ``decode_reference``.

        Args:
            planes: As ``plane_specs`` lists them.
            out_features: O.
            in_features: I.
            dtype: Of the result; products are float32, rounded once to nearest even.
            out: A contiguous ``[O, I]`` tensor of ``dtype`` to write into; a new one if None.
        """
        ...

    def decode_reference(
        self, planes: Mapping[str, Tensor], out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Unpacks to ``[O, I]`` in plain torch: the definition every kernel is tested against."""
        ...


@runtime_checkable
class FoldingFormat(Format, Protocol):
    """A format with an additive field: a change that is constant inside each group goes into it exactly."""

    def fold(self, planes: Mapping[str, Tensor], delta_OG: Tensor) -> dict[str, Tensor]:
        """Planes of the same codes whose weights are larger by ``delta_OG``, one float32 for each group of a row.

        Only the field is rounded, once, from the float32 sum. The planes given stay as they are.

        Raises:
            QuantizationError: The field cannot hold a sum.
        """
        ...


#: Types of plain numbers, by the names they have in GGUF files and on the command line.
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

#: The formats of GGUF files; each names its section of the config.
GGUF_FORMATS: tuple[type[GgmlBlocks], ...] = (
    *(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0),
    *(IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, MXFP4, NVFP4),
)


def make_format(base: BaseConfig) -> Format | None:
    """The format a config section asks for; None where weights stay as they are."""
    match base:
        case MixBase():
            raise AssertionError(f"{base.format} is a format for each module: make_formats")
        case NoBase():
            return None
        case Nf4Base():
            return Nf4(block_size=base.block_size, double_quant=base.double_quant)
        case Int8Base():
            return Int8()
        case GgmlBase():
            return next(member for member in GGUF_FORMATS if member.base is type(base))()
        case Fp4Base():
            return Fp4(block_size=base.block_size, double_quant=base.double_quant)
        case HqqBase():
            return Hqq(bits=base.bits, group_size=base.group_size, solver=base.solver)
        case TernaryBase():
            return Ternary(group_size=base.group_size)


def option_words(format: Format) -> str:
    """The words of a command line that choose a format: its name, and what else its section of the config has."""
    section = next(section for section in base_sections() if format_name(section) == format.name)
    # A format has no use for options of training alone.
    values = {key: getattr(format, key) for key in section.model_fields if key != "format" and hasattr(format, key)}
    words = [f"--base.format={format.name}", *(f"--base.{key}={str(value).lower()}" for key, value in values.items())]
    return " ".join(words)
