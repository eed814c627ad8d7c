"""Chooses formats: by config section, by ggml's type name, or for each module of a model by llama.cpp's rules."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

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
from ingle.config.ggml import GgmlBase, MixBase, MXFP4Base
from ingle.errors import GgufError, QuantizationError
from ingle.gguf.mixes import mix_of_config
from ingle.gguf.names import names_of_model
from ingle.quant.experts import is_experts
from ingle.quant.format import Format
from ingle.quant.ggml import GGUF_FORMATS, GgmlBlocks
from ingle.quant.hqq import Hqq
from ingle.quant.int8 import Int8
from ingle.quant.levels import Fp4, Nf4
from ingle.quant.linear import QuantModule
from ingle.quant.plane import Scratch
from ingle.quant.ternary import Ternary

#: A function from a module's name, out_features and in_features to its format; None leaves the module unquantized.
Formats = Callable[[str, int, int], Format | None]


def make_format(base: BaseConfig) -> Format | None:
    """Returns the format of a config section; None if weights stay unquantized. For mixes use :func:`make_formats`."""
    match base:
        case MixBase():
            raise AssertionError(f"{base.format} has a format for each module: use make_formats")
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


def format_options(format: Format) -> str:
    """Returns the command-line options that select a format, without options that only concern training."""
    section = next(section for section in base_sections() if format_name(section) == format.name)
    values = {key: getattr(format, key) for key in section.model_fields if key != "format" and hasattr(format, key)}
    options = [f"--base.format={format.name}", *(f"--base.{key}={str(value).lower()}" for key, value in values.items())]
    return " ".join(options)


def make_formats(base: BaseConfig, model: nn.Module) -> Formats | None:
    """Returns a function that chooses the format of each linear layer of a model; None if all stay unquantized.

    Args:
        base: The config section.
        model: Its ``config`` names the architecture, which a mix depends on.

    Raises:
        QuantizationError: The section is a mix, and Ingle does not know llama.cpp's rules for the architecture.
    """
    if isinstance(base, NoBase):
        return None
    if isinstance(base, MXFP4Base):
        return _experts_only(base, model)
    if not isinstance(base, MixBase):
        format = make_format(base)
        return lambda name, out_features, in_features: format
    try:
        names = names_of_model(model)
    except GgufError as error:
        raise QuantizationError(
            f"llama.cpp's rules for {base.format} in this architecture are unknown.",
            where="base.format",
            why=error.message,
            fix=f"--base.format={base.format[:4]}, the format of most matrices in the mix",
        ) from error
    stored = [tensor for name, _ in model.named_modules() for tensor in names.tensors(f"{name}.weight")]
    mix, make = mix_of_config(base.format, names.config, stored), GgufFormats()

    def choose(name: str, out_features: int, in_features: int) -> Format | None:
        # A projection of stacked experts is a parameter, and so has no ``weight``.
        tensors = names.tensors(f"{name}.weight") or names.tensors(name) or (f"{name}.weight",)
        return make(mix.tensor_type(tensors[0], (out_features, in_features)))

    return choose


def _experts_only(base: GgmlBase, model: nn.Module) -> Formats:
    """Returns the formats of gpt-oss as it is published: its experts are in MXFP4, everything else is unquantized."""
    experts = {name for name, module in model.named_modules() if is_experts(module)}
    if not experts and not any(isinstance(module, QuantModule) for module in model.modules()):
        raise QuantizationError(
            f"{type(model).__name__} has no experts, and no other weights are held in {base.format}.",
            where="base.format",
            why="this format is read from checkpoints of gpt-oss, and from GGUF files",
            fix="--base.format=nf4",
        )
    format = make_format(base)
    return lambda name, out_features, in_features: format if name.rpartition(".")[0] in experts else None


class GgufFormats:
    """Formats by ggml's type name; all of them share one scratch buffer."""

    def __init__(self) -> None:
        scratch = Scratch()
        self._formats = {member.__name__.lower(): member(scratch=scratch) for member in GGUF_FORMATS}

    def __call__(self, type_name: str) -> GgmlBlocks | None:
        """Returns the format of a type; None for plain numbers and unsupported types."""
        return self._formats.get(type_name)
