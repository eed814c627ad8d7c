"""The names of the formats that a model can be quantized to, and the size and types of a given model in each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from ingle.config.base import BaseConfig, HqqBase, base_section, why_not_quantized
from ingle.errors import ConfigError, GgufError
from ingle.gguf.architecture import to_metadata
from ingle.gguf.container import block_of, row_bytes
from ingle.gguf.mixes import ALIASES, FILE_TYPES, Mix, mix_of
from ingle.gguf.names import TensorNames, names_of_model
from ingle.quant import Format, make_format
from ingle.wording import nearest

#: Formats that safetensors store in the layout of bitsandbytes.
BITSANDBYTES = ("nf4", "fp4", "int8")
#: Formats stored in the layout of HQQ; a group size may follow: ``hqq-2-g32``.
HQQ = ("hqq-8", "hqq-4", "hqq-3", "hqq-2", "hqq-1")

_HQQ = re.compile(r"^hqq-([1-8])(?:-g(\d+))?$")
#: Bytes of an unquantized weight in safetensors.
_PLAIN_BYTES = 2


@dataclass(frozen=True, slots=True)
class Target:
    """A format that a model can be quantized to.

    Attributes:
        name: Name of the format, with aliases resolved.
        container: ``gguf`` or ``safetensors``.
        base: The format of the linear layers in safetensors; None for GGUF, where the file type chooses by tensor.
    """

    name: str
    container: Literal["gguf", "safetensors"]
    base: BaseConfig | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """How a model is stored as a target.

    Attributes:
        name: Name of the target.
        container: Its container; empty for the unquantized model.
        formats: Format of every quantized matrix, by parameter name.
        types: Number of weights stored in each type.
        size_bytes: Size of all tensors in the file.
    """

    name: str
    container: str
    formats: Mapping[str, Format]
    types: Mapping[str, int]
    size_bytes: int


def target_names() -> tuple[str, ...]:
    """Returns the names of all quantized targets."""
    file_types = tuple(name for name in FILE_TYPES if block_of(FILE_TYPES[name])[0] > 1)
    return (*file_types, *BITSANDBYTES, *HQQ)


def find_target(name: str, option: str = "--to") -> Target:
    """Returns the target with a name.

    Raises:
        ConfigError: There is no such target; the error suggests the closest one.
    """
    resolved = (ALIASES | {"hqq": "hqq-4"}).get(name.lower(), name.lower())
    if resolved in FILE_TYPES:
        return Target(resolved, "gguf")
    if (base := safetensors_base(resolved)) is not None:
        return Target(resolved, "safetensors", base)
    known = (*FILE_TYPES, *BITSANDBYTES, *HQQ)
    near = nearest(resolved, known, cutoff=0.5)
    fix = f"did you mean {near}?" if near is not None else None
    if resolved.startswith("hqq"):
        fix = "hqq-BITS or hqq-BITS-gGROUP: 8, 4, 3, 2 or 1 bits; groups of 8, 16, 32, 64 or 128"
    reason = why_not_quantized(resolved)
    raise ConfigError(
        f"There is no format {name!r}." if reason is None else f"Ingle cannot quantize weights to {name}.",
        where=f"{option} {name}",
        why=f"formats are {', '.join(known)}" if reason is None else reason,
        fix=fix,
    )


def safetensors_base(name: str) -> BaseConfig | None:
    """Returns the base format of a safetensors layout's name (``nf4``, ``hqq-3``, ``hqq-2-g32``); None for others."""
    if name in BITSANDBYTES:
        return base_section({"format": name})
    match = _HQQ.match(name)
    if match is None:
        return None
    section = {"format": "hqq", "bits": int(match[1]), "group_size": int(match[2] or 64)}
    fields = HqqBase.model_fields
    known = all(section[key] in get_args(fields[key].annotation) for key in ("bits", "group_size"))
    return base_section(section) if known else None


def unquantized(model: Any) -> Candidate:
    """Returns the model as it is, with 16 bits per weight."""
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    return Candidate("none", "", {}, {"16 bit": num_weights}, _PLAIN_BYTES * num_weights)


def list_candidates(
    model: Any, maps: Sequence[str], names: Sequence[str], *, has_imatrix: bool = False
) -> tuple[list[Candidate], list[str]]:
    """Returns how the named targets would store a model.

    Args:
        model: A transformers model, on any device.
        maps: Parameter names of its linear layers, which safetensors layouts quantize.
        names: Names of targets.
        has_imatrix: Whether an importance matrix is used.

    Returns:
        The candidates, and the names of the GGUF targets if llama.cpp does not know the architecture.

    Raises:
        ConfigError: A name is unknown.
    """
    targets = list(dict.fromkeys(find_target(name, "--formats") for name in names))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found, left_out = [], []
    try:
        names_in_gguf = names_of_model(model)
        metadata = to_metadata(names_in_gguf.config)
    except GgufError:
        metadata = None
    for target in targets:
        if target.base is not None:
            found.append(_in_safetensors(target.name, target.base, shapes, maps))
        elif metadata is None:
            left_out.append(target.name)
        else:
            tied = bool(model.config.tie_word_embeddings)
            mix = mix_of(target.name, metadata, tied=tied, has_imatrix=has_imatrix)
            found.append(_in_gguf(target.name, shapes, mix, names_in_gguf))
    return found, left_out


def _in_gguf(target: str, shapes: Mapping[str, tuple[int, ...]], mix: Mix, names: TensorNames) -> Candidate:
    made: dict[str, Format] = {}
    formats: dict[str, Format] = {}
    types: Counter[str] = Counter()
    size = 0
    for name, shape in shapes.items():
        rule = names.rule(name, shape)
        assert rule is not None, name
        kinds = [mix.tensor_type(*each) for each in zip(rule.tensors, rule.file_shapes, strict=True)]
        for kind, part in zip(kinds, rule.file_shapes, strict=True):
            types[kind] += prod(part)
            size += prod(part[:-1]) * row_bytes(kind, part[-1])
        if block_of(kinds[0])[0] > 1:  # one format for a parameter whose tensors may have several
            formats[name] = made.setdefault(kinds[0], _format(base_section({"format": kinds[0]})))
    return Candidate(target, "gguf", formats, types, size)


def _in_safetensors(
    target: str, base: BaseConfig, shapes: Mapping[str, tuple[int, ...]], maps: Sequence[str]
) -> Candidate:
    format = _format(base)
    types = {target: sum(prod(shapes[name]) for name in maps)}
    types["16 bit"] = sum(map(prod, shapes.values())) - types[target]
    specs = (spec for name in maps for spec in format.plane_specs(*shapes[name]).values())
    size = sum(spec.num_bytes for spec in specs) + _PLAIN_BYTES * types["16 bit"]
    return Candidate(target, "safetensors", dict.fromkeys(maps, format), types, size)


def _format(section: BaseConfig) -> Format:
    format = make_format(section)
    assert format is not None
    return format
