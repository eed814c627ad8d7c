"""``base:`` the format of the frozen weights; torch-free, so that the planner can use its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import Field, TypeAdapter

from ingle.config.ggml import ENCODED, MIXES, READ_ONLY, GgmlBase, MixBase
from ingle.config.section import Section, tagged


class NoBase(Section):
    """No quantization: weights keep the compute dtype."""

    format: Literal["none"] = "none"

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Returns the bits per weight, scales included."""
        return float(dtype_bits)


class LevelsBase(Section):
    """16 levels, scaled by the largest absolute weight (absmax) of a block.

    Attributes:
        block_size: Consecutive weights of a row that share one absmax.
        double_quant: Quantize the absmax values to 8 bits.
    """

    format: str
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = True

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Returns the bits per weight, scales included."""
        absmax_bits = 8 + 32 / 256 if self.double_quant else 32
        return 4 + absmax_bits / self.block_size


class Nf4Base(LevelsBase):
    """4-bit NormalFloat, bit-compatible with bitsandbytes.

    Source: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), section 3.
    """

    format: Literal["nf4"]


class Fp4Base(LevelsBase):
    """4-bit floats, bit-compatible with bitsandbytes.

    Source: bitsandbytes, ``get_4bit_type("fp4")``.
    """

    format: Literal["fp4"]


class Int8Base(Section):
    """8-bit integers with one scale per row, as in LLM.int8() without outlier decomposition.

    Source: Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 2.
    """

    format: Literal["int8"]

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Returns the bits per weight, scales included."""
        return 8 + 32 / in_features


class HqqBase(Section):
    """HQQ: integers of 1 to 8 bits, with a float16 scale and a float16 zero point per group.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"; the ``hqq`` package.

    Attributes:
        bits: Bits per weight, without scale and zero point.
        group_size: Consecutive weights of a row that share a scale and a zero point.
        solver: ``ingle`` fits scale and zero point together; ``hqq`` is the published solver, which fits only the zero
            point.
        additive: Whether each group has a free offset (its zero), into which a QA-LoRA update merges exactly.
    """

    format: Literal["hqq"]
    bits: Literal[8, 4, 3, 2, 1] = 4
    group_size: Literal[8, 16, 32, 64, 128] = 64
    solver: Literal["ingle", "hqq"] = "ingle"
    additive: ClassVar[bool] = True

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Returns the bits per weight, scales and zero points included."""
        code_bytes = -(-in_features * self.bits // 8)
        return (8 * code_bytes + 32 * -(-in_features // self.group_size)) / in_features


#: The weights that share one scale.
TernaryGroups = Literal["tensor", "row", 256]


class TernaryBase(Section):
    """Ternary weights: -1, 0 or 1 times a scale. Train LoRA on top, or the weights themselves (``train``).

    Source: Ma et al. 2024, "The Era of 1-bit LLMs" (arXiv 2402.17764), equations 1 to 3.

    Attributes:
        group_size: Weights that share a scale: the ``tensor``, a ``row``, or 256 weights of a row as in GGUF.
        train: Train all weights, rounded to ternary values in the forward pass; needs ``adapter: none``.
    """

    format: Literal["ternary"]
    group_size: TernaryGroups = "tensor"
    train: bool = False

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Returns the bits per weight, scales included; with ``train``, those of the unrounded weight."""
        if self.train:
            return float(dtype_bits)
        groups = {"tensor": 0, "row": 1}.get(str(self.group_size))
        num_scales = groups if groups is not None else -(-in_features // int(self.group_size))
        return (8 * -(-in_features // 4) + 16 * num_scales) / in_features


if TYPE_CHECKING:  # static types cannot express a union of classes that are created from a table
    _Base = NoBase | Nf4Base | Int8Base | Fp4Base | HqqBase | TernaryBase | GgmlBase | MixBase
    FormatName = str
else:
    _SECTIONS = (NoBase, Nf4Base, Int8Base, *ENCODED, Fp4Base, HqqBase, *READ_ONLY, *MIXES, TernaryBase)
    _Base = Annotated[Union[_SECTIONS], Field(discriminator="format")]  # noqa: UP007
    #: Every name that ``base.format`` accepts.
    FormatName = Literal[tuple(get_args(section.model_fields["format"].annotation)[0] for section in _SECTIONS)]
BaseConfig = Annotated[_Base, tagged("format", input_type=_Base | FormatName)]


def base_section(value: FormatName | Mapping[str, Any]) -> BaseConfig:
    """Returns the section of a format, from its name (with defaults) or from its plain data."""
    section: BaseConfig = TypeAdapter(BaseConfig).validate_python(value)
    return section


def base_sections() -> tuple[type[BaseConfig], ...]:
    """Returns the section class of every format."""
    sections: tuple[type[BaseConfig], ...] = get_args(get_args(_Base)[0])
    return sections


def format_name(section: type[BaseConfig]) -> str:
    """Returns the name that ``base.format`` uses for a section class."""
    return str(get_args(section.model_fields["format"].annotation)[0])


def why_not_quantized(name: str) -> str | None:
    """Returns why weights cannot be quantized to a format; None if they can, or if there is no such format."""
    sections = {format_name(section): section for section in base_sections()}
    return getattr(sections.get(name), "read_only", None)


def folding_formats() -> tuple[str, ...]:
    """Returns the names of the formats with a free offset per group, into which a QA-LoRA update merges exactly."""
    return tuple(format_name(section) for section in base_sections() if folds(section))


def folds(base: BaseConfig | type[BaseConfig]) -> bool:
    """Returns whether a format has a free offset per group."""
    return bool(getattr(base, "additive", False))
