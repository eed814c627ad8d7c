"""``base:`` the format in which the frozen weights are held.

The sizes are plain arithmetic on the section, so the planner can use them without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, TypeAdapter

from ingle.config.ggml import (
    IQ4_NLBase,
    IQ4_XSBase,
    Q2_KBase,
    Q3_KBase,
    Q4_0Base,
    Q4_1Base,
    Q4_KBase,
    Q5_0Base,
    Q5_1Base,
    Q5_KBase,
    Q6_KBase,
    Q8_0Base,
    TQ1_0Base,
    TQ2_0Base,
)
from ingle.config.ggml_read import (
    IQ1_MBase,
    IQ1_SBase,
    IQ2_SBase,
    IQ2_XSBase,
    IQ2_XXSBase,
    IQ3_SBase,
    IQ3_XXSBase,
    MXFP4Base,
    NVFP4Base,
)
from ingle.config.mixes import (
    Q3_K_LBase,
    Q3_K_MBase,
    Q3_K_SBase,
    Q4_K_MBase,
    Q4_K_SBase,
    Q5_K_MBase,
    Q5_K_SBase,
)
from ingle.config.section import Section, tagged


class NoBase(Section):
    """Weights stay in the compute dtype."""

    format: Literal["none"] = "none"

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes, scales included."""
        return float(dtype_bits)


class LevelsBase(Section):
    """16 levels of the largest weight of a block.

    Attributes:
        block_size: Consecutive weights of a row that share one absmax.
        double_quant: Hold the absmax values in 8 bits too.
    """

    format: str
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = True

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes, scales included."""
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
    """8-bit integers with one scale a row, as in LLM.int8() without outlier decomposition.

    Source: Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 2.
    """

    format: Literal["int8"]

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes, scales included."""
        return 8 + 32 / in_features


class HqqBase(Section):
    """HQQ: integers of few bits with a float16 scale and a float16 zero for every group of a row.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"; the ``hqq`` package.

    Attributes:
        bits: Of a code.
        group_size: Consecutive weights of a row that share a scale and a zero.
        solver: Who finds them: ``ingle`` fits both together, ``hqq`` is the published one, which moves the zero only.
        additive: Whether a group has a free offset, which a QA-LoRA change folds into: its zero.
    """

    format: Literal["hqq"]
    bits: Literal[8, 4, 3, 2, 1] = 4
    group_size: Literal[8, 16, 32, 64, 128] = 64
    solver: Literal["ingle", "hqq"] = "ingle"
    additive: ClassVar[bool] = True

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes, scales and zeros included."""
        code_bytes = -(-in_features * self.bits // 8)
        return (8 * code_bytes + 32 * -(-in_features // self.group_size)) / in_features


#: How far one scale of ternary weights reaches.
TernaryGroups = Literal["tensor", "row", 256]


class TernaryBase(Section):
    """-1, 0 and 1 times the mean size of the weights; for LoRA on top, or trained through the rounding (``train``).

    Source: Ma et al. 2024, "The Era of 1-bit LLMs" (arXiv 2402.17764), equations 1 to 3.

    Attributes:
        group_size: How far one scale reaches: the whole ``tensor``, a ``row``, or 256 weights of a row as in GGUF.
        train: Train every weight of the model with ternary weights in the forward pass (``adapter: none``).
    """

    format: Literal["ternary"]
    group_size: TernaryGroups = "tensor"
    train: bool = False

    def bits_per_weight(self, in_features: int, *, dtype_bits: int = 16) -> float:
        """Bits one weight takes, scales included; while it is trained, those of the weight that is rounded."""
        if self.train:
            return float(dtype_bits)
        groups = {"tensor": 0, "row": 1}.get(str(self.group_size))
        num_scales = groups if groups is not None else -(-in_features // int(self.group_size))
        return (8 * -(-in_features // 4) + 16 * num_scales) / in_features


_Base = Annotated[
    NoBase
    | Nf4Base
    | Int8Base
    | Q4_0Base
    | Q4_1Base
    | Q5_0Base
    | Q5_1Base
    | Q8_0Base
    | Q4_KBase
    | Q6_KBase
    | Q5_KBase
    | Q3_KBase
    | Q2_KBase
    | IQ4_NLBase
    | IQ4_XSBase
    | TQ1_0Base
    | TQ2_0Base
    | Fp4Base
    | HqqBase
    | MXFP4Base
    | NVFP4Base
    | IQ2_XXSBase
    | IQ2_XSBase
    | IQ2_SBase
    | IQ3_XXSBase
    | IQ3_SBase
    | IQ1_SBase
    | IQ1_MBase
    | Q3_K_SBase
    | Q3_K_MBase
    | Q3_K_LBase
    | Q4_K_SBase
    | Q4_K_MBase
    | Q5_K_SBase
    | Q5_K_MBase
    | TernaryBase,
    Field(discriminator="format"),
]
#: Every name that ``base.format`` knows.
FormatName = Literal[
    "none",
    "nf4",
    "int8",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q4_k",
    "q6_k",
    "q5_k",
    "q3_k",
    "q2_k",
    "iq4_nl",
    "iq4_xs",
    "tq1_0",
    "tq2_0",
    "fp4",
    "hqq",
    "mxfp4",
    "nvfp4",
    "iq2_xxs",
    "iq2_xs",
    "iq2_s",
    "iq3_xxs",
    "iq3_s",
    "iq1_s",
    "iq1_m",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "ternary",
]
BaseConfig = Annotated[_Base, tagged("format", input_type=_Base | FormatName)]


def base_section(value: FormatName | Mapping[str, Any]) -> BaseConfig:
    """The section of a format: with its defaults, given its name, or from the plain data it was dumped to."""
    section: BaseConfig = TypeAdapter(BaseConfig).validate_python(value)
    return section


def base_sections() -> tuple[type[BaseConfig], ...]:
    """The section of every format."""
    sections: tuple[type[BaseConfig], ...] = get_args(get_args(_Base)[0])
    return sections


def format_name(section: type[BaseConfig]) -> str:
    """What ``base.format`` calls the format of a section."""
    return str(get_args(section.model_fields["format"].annotation)[0])


def why_not_quantized(name: str) -> str | None:
    """Why weights are not packed in a format, only read; None where they are, or there is no such format."""
    sections = {format_name(section): section for section in base_sections()}
    return getattr(sections.get(name), "not_packed", None)


def folding_formats() -> tuple[str, ...]:
    """Names of the formats that hold a free offset for each group, so that a QA-LoRA change merges exactly."""
    return tuple(format_name(section) for section in base_sections() if folds(section))


def folds(base: BaseConfig | type[BaseConfig]) -> bool:
    """Whether a format holds a free offset for each group."""
    return bool(getattr(base, "additive", False))
