"""What a model can be packed as: every file type of GGUF and every layout of safetensors, by the name one types."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, get_args

from ingle.config.base import BaseConfig, HqqBase, base_section, why_not_quantized
from ingle.errors import ConfigError, GgufError
from ingle.gguf.architecture import to_metadata
from ingle.gguf.container import block_of, row_bytes
from ingle.gguf.mixes import ALIASES, FILE_TYPES, Mix, mix_of
from ingle.gguf.names import TensorNames, names_of
from ingle.quant import Format, make_format
from ingle.wording import nearest

#: Formats that safetensors hold in the layout of the library they come from.
PACKED = ("nf4", "fp4", "int8")
#: Bits of HQQ, for which the group size may stand behind: ``hqq-3``, ``hqq-2-g32``.
HQQ = ("hqq-8", "hqq-4", "hqq-3", "hqq-2", "hqq-1")

_HQQ = re.compile(r"^hqq-([1-8])(?:-g(\d+))?$")
#: Bytes of a number that stays as it is, in safetensors.
_PLAIN_BYTES = 2


@dataclass(frozen=True, slots=True)
class Target:
    """A file that can be written.

    Attributes:
        name: As one types it, aliases resolved.
        container: ``gguf`` or ``safetensors``.
        base: The format of the linear maps in safetensors; None for GGUF, whose file types choose by tensor.
    """

    name: str
    container: Literal["gguf", "safetensors"]
    base: BaseConfig | None = None


class Matrices(Protocol):
    """The part of a model that candidates are made for."""

    config: Any

    def named_parameters(self) -> Any:
        """Names and parameters, tied ones once."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to hold a model.

    Attributes:
        name: Of the target.
        container: Of the target; empty for the model as it is.
        formats: Of every matrix that is packed, by parameter.
        types: Weights held in each type.
        size_bytes: Of all tensors in the file.
    """

    name: str
    container: str
    formats: Mapping[str, Format]
    types: Mapping[str, int]
    size_bytes: int

    @classmethod
    def unpacked(cls, model: Matrices) -> Candidate:
        """The model as it is."""
        parameters = dict(model.named_parameters())
        weights = sum(parameter.numel() for parameter in parameters.values())
        return cls("none", "", {}, {"16 bit": weights}, _PLAIN_BYTES * weights)


def target_names() -> tuple[str, ...]:
    """Everything that can be named, smallest families first."""
    file_types = tuple(name for name in FILE_TYPES if block_of(FILE_TYPES[name])[0] > 1)
    return (*file_types, *PACKED, *HQQ)


def find_target(name: str, option: str = "--to") -> Target:
    """The target of a name.

    Raises:
        ConfigError: There is none, with what was probably meant.
    """
    resolved = (ALIASES | {"hqq": "hqq-4"}).get(name.lower(), name.lower())
    if resolved in FILE_TYPES:
        return Target(resolved, "gguf")
    if (base := safetensors_base(resolved)) is not None:
        return Target(resolved, "safetensors", base)
    known = (*FILE_TYPES, *PACKED, *HQQ)
    near = nearest(resolved, known, cutoff=0.5)
    fix = f"did you mean {near}?" if near is not None else None
    if resolved.startswith("hqq"):
        fix = "hqq-BITS or hqq-BITS-gGROUP: 8, 4, 3, 2 or 1 bits; groups of 8, 16, 32, 64 or 128"
    reason = why_not_quantized(resolved)
    raise ConfigError(
        f"There is no format {name!r}." if reason is None else f"No weights can be packed in {name}.",
        where=f"{option} {name}",
        why=f"formats are {', '.join(known)}" if reason is None else reason,
        fix=fix,
    )


def safetensors_base(name: str) -> BaseConfig | None:
    """The base format that a name of a packed layout of safetensors means: ``nf4``, ``hqq-3``, ``hqq-2-g32``."""
    if name in PACKED:
        return base_section({"format": name})
    match = _HQQ.match(name)
    if match is None:
        return None
    section = {"format": "hqq", "bits": int(match[1]), "group_size": int(match[2] or 64)}
    fields = HqqBase.model_fields
    known = all(section[key] in get_args(fields[key].annotation) for key in ("bits", "group_size"))
    return base_section(section) if known else None


def list_candidates(
    model: Matrices, maps: Sequence[str], names: Sequence[str], *, has_imatrix: bool = False
) -> tuple[list[Candidate], list[str]]:
    """How the named targets would hold a model.

    Args:
        model: Its parameters and config.
        maps: Parameters of its linear maps, which safetensors pack.
        names: Of targets.
        has_imatrix: Whether an importance matrix is used.

    Returns:
        The candidates, and the names of GGUF targets when llama.cpp does not know the architecture.

    Raises:
        ConfigError: A name is unknown.
    """
    targets = list(dict.fromkeys(find_target(name, "--formats") for name in names))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found, left_out = [], []
    try:
        metadata = to_metadata(model.config.to_dict())
    except GgufError:
        metadata = None
    for target in targets:
        if target.base is not None:
            found.append(_in_safetensors(target, shapes, maps))
        elif metadata is None:
            left_out.append(target.name)
        else:
            tied = bool(model.config.tie_word_embeddings)
            mix = mix_of(target.name, metadata, tied=tied, has_imatrix=has_imatrix)
            found.append(_in_gguf(target, shapes, mix, names_of(metadata)))
    return found, left_out


def _in_gguf(target: Target, shapes: Mapping[str, tuple[int, ...]], mix: Mix, names: TensorNames) -> Candidate:
    made: dict[str, Format] = {}
    formats: dict[str, Format] = {}
    types: dict[str, int] = {}
    size = 0
    for name, shape in shapes.items():
        gguf_name = names.to_gguf(name)
        assert gguf_name is not None, name
        kind = mix.tensor_type(gguf_name, shape)
        types[kind] = types.get(kind, 0) + prod(shape)
        size += prod(shape[:-1]) * row_bytes(kind, shape[-1])
        if block_of(kind)[0] > 1:
            formats[name] = made.setdefault(kind, _format(base_section({"format": kind})))
    return Candidate(target.name, target.container, formats, types, size)


def _in_safetensors(target: Target, shapes: Mapping[str, tuple[int, ...]], maps: Sequence[str]) -> Candidate:
    assert target.base is not None
    format = _format(target.base)
    packed = set(maps)
    types = {target.name: 0, "16 bit": 0}
    size = 0
    for name, shape in shapes.items():
        if name in packed:
            types[target.name] += prod(shape)
            size += sum(spec.num_bytes for spec in format.plane_specs(shape[0], shape[1]).values())
        else:
            types["16 bit"] += prod(shape)
            size += _PLAIN_BYTES * prod(shape)
    return Candidate(target.name, target.container, dict.fromkeys(maps, format), types, size)


def _format(section: BaseConfig) -> Format:
    format = make_format(section)
    assert format is not None
    return format
