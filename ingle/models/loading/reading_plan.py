"""Decides which tensors on disk become which parameters, only from their names.

The names on disk are the hub's. transformers renames, fuses and splits tensors while it loads. This module applies its
conversion mapping to the names, without reading any tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ingle.errors import ModelError
from ingle.models.loading.gguf_weights import GgufWeight
from ingle.models.loading.safetensors_files import StoredTensor

#: The key of hqq's codes, and the keys it stores with them.
_HQQ_CODES = "W_q"
_HQQ_PARTS = (
    *("scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "compute_dtype"),
    *("view_as_float", "quant_scale", "quant_zero", "offload_meta", "channel_wise", "optimize", "round_zero"),
    *("encoded_state_dict", "stores_quant_config"),
)
#: The keys of quantized codes, which replace the plain weight.
_CODES = ("weight", _HQQ_CODES, "blocks")
#: The keys of experts in MXFP4, after the name of their projection.
_MXFP4_PART = re.compile(r"^(?P<stack>.*_proj)_(?P<part>blocks|scales)$")
#: The keys that bitsandbytes and transformers' BitNet store with a quantized weight.
_QUANTIZED_PART = re.compile(
    r"^(?P<layer>.*)\."
    r"(?P<part>weight\.(?:absmax|quant_map|nested_\w+|quant_state\.\w+)|SCB|weight_format|weight_scale)$"
)


@dataclass(frozen=True, slots=True)
class Plain:
    """One tensor that is one parameter."""

    target: str
    stored: StoredTensor


@dataclass(frozen=True, slots=True)
class Experts:
    """Matrices of experts, which are stacked into one parameter ``[experts, rows, columns]``.

    Attributes:
        target: The parameter.
        parts: The matrices of each expert, which are joined by rows (gate and up projection, for example).
    """

    target: str
    parts: tuple[tuple[StoredTensor, ...], ...]

    def read(self, expert: int) -> Tensor:
        """Reads the matrix of one expert."""
        values = [part.read() for part in self.parts[expert]]
        return torch.cat(values) if len(values) > 1 else values[0]


@dataclass(frozen=True, slots=True)
class Converted:
    """Tensors that only a conversion of transformers turns into parameters."""

    target: str
    transform: WeightConverter


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Tensors of one weight that bitsandbytes, hqq or transformers' BitNet has quantized, or of experts in MXFP4.

    Attributes:
        target: The parameter.
        parts: By their keys, without the layer's name.
        divides: Whether the weight is divided by BitNet's scale rather than multiplied.
    """

    target: str
    parts: dict[str, StoredTensor]
    divides: bool = False


Group = Plain | Experts | Converted | QuantizedWeight | GgufWeight


@dataclass(frozen=True, slots=True)
class ReadingPlan:
    """What to read, in order.

    Attributes:
        groups: Each is read, written into the model and freed before the next one.
        unexpected: Keys on disk that belong to no parameter.
        towers: Keys on disk of the image and audio towers of a multimodal model, which are not read.
        stored: The safetensors checkpoint by its keys on disk; empty for a GGUF file.
    """

    groups: tuple[Group, ...]
    unexpected: tuple[str, ...]
    towers: tuple[str, ...] = ()
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)


def plan_reading(
    architecture: PreTrainedModel,
    stored: dict[str, StoredTensor],
    *,
    whole: PreTrainedModel | None = None,
    bitnet_divides: bool = False,
) -> ReadingPlan:
    """Sorts the tensors of a safetensors checkpoint into groups.

    Args:
        architecture: The unmodified architecture on the meta device.
        stored: The checkpoint.
        whole: The multimodal model whose text part the architecture is. It knows the names on disk of all its parts.
        bitnet_divides: As :func:`~ingle.models.loading.config_json.bitnet_divides` returns.

    Raises:
        ModelError: Two tensors are the same parameter, or a quantized one would have to be fused.
    """
    mapping = _NameMapping(whole or architecture)
    wanted = architecture.state_dict()
    removed = (
        set()
        if whole is None
        else {name for name, _ in whole.named_modules()} - {name for name, _ in architecture.named_modules()}
    )
    quantized = _find_quantized(stored)
    ignored = [
        *(architecture._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    scales = {
        id(part): weight for weight, parts in quantized.items() for key, part in parts.items() if key not in _CODES
    }
    groups: dict[str, Group] = {}
    sources: dict[str, dict[str, list[StoredTensor]]] = {}
    unexpected: list[str] = []
    towers: list[str] = []
    for key in sorted(stored, key=dot_natural_key):
        part_of = scales.get(id(stored[key]))
        weight = part_of or _plain_key(key)
        name, pattern = mapping(weight)
        if name not in wanted and (name in mapping.wanted or _is_below(name, removed)):
            towers.append(key)
        elif part_of is not None:
            continue  # read with its weight
        elif name not in wanted:
            if not any(re.search(each, key) for each in ignored):
                unexpected.append(key)
        elif pattern is not None:
            if weight in quantized:
                raise ModelError(
                    f"The quantized weight {weight} would have to be fused with others, which is not supported.",
                    where=str(stored[key].path),
                    fix="start from the checkpoint that is not quantized",
                )
            sources.setdefault(name, {}).setdefault(pattern, []).append(stored[key])
            groups.setdefault(name, Converted(name, mapping.converter(pattern)))
        elif name in groups:
            raise ModelError(f"The files contain two tensors for {name}; one is {key}.", where=str(stored[key].path))
        elif weight in quantized:
            groups[name] = QuantizedWeight(name, quantized[weight], bitnet_divides)
        else:
            groups[name] = Plain(name, stored[key])
    for name, found in sources.items():
        group = groups[name]
        assert isinstance(group, Converted)
        groups[name] = _stacked(group, found) or _deferred(group, found)
    return ReadingPlan(tuple(groups.values()), tuple(unexpected), tuple(towers), stored)


def _is_below(name: str, modules: Collection[str]) -> bool:
    """Returns whether a parameter lies in one of the modules; those of timm are not built, so its name is not known."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts)))


def refuse_other_shapes(plan: ReadingPlan, architecture: PreTrainedModel) -> None:
    """Refuses weights on disk that have another shape than the architecture, before any is read.

    Raises:
        ModelError: It names the weight, its file and both shapes.
    """
    wanted = architecture.state_dict()
    for group in plan.groups:
        want = tuple(wanted[group.target].shape)
        match group:
            case Plain(stored=stored):
                have, path = stored.shape, stored.path
            case Experts(parts=parts) if len({tuple(part.shape for part in each) for each in parts}) == 1:
                one, path = parts[0][0].shape, parts[0][0].path
                have = (len(parts), sum(part.shape[0] for part in parts[0]), *one[1:]) if one else ()
            case GgufWeight():
                have, path = group.shape, group.tensor.path
            case _:
                continue  # quantized or converted: the shape is known after reading
        if have != want:
            described = "the metadata of the file" if isinstance(group, GgufWeight) else "config.json"
            raise ModelError(
                f"The weight {group.target} does not have the shape that {described} describes.",
                where=str(path),
                why=f"{have} in the file, {want} expected from {described}",
                fix=f"check that the weights belong to {described}",
            )


def _stacked(group: Converted, found: dict[str, list[StoredTensor]]) -> Experts | None:
    """Returns the most common conversion as a group of experts, so that it is read one expert at a time."""
    kinds = [(type(step), getattr(step, "dim", None)) for step in group.transform.operations]
    stack, join = (MergeModulelist, 0), (Concatenate, 1)
    patterns = group.transform.source_patterns
    if kinds not in ([stack], [stack, join]) or (len(kinds) == 1) != (len(patterns) == 1):
        return None
    if found.keys() != set(patterns) or len({len(each) for each in found.values()}) != 1:
        return None
    return Experts(group.target, tuple(zip(*(found[pattern] for pattern in patterns), strict=True)))


def _deferred(group: Converted, found: dict[str, list[StoredTensor]]) -> Converted:
    """Adds functions that read the tensors to the conversion, which calls them when it needs the values."""
    for pattern, tensors in found.items():
        for entry in tensors:
            group.transform.add_tensor(group.target, pattern, pattern, entry.read)  # type: ignore[arg-type]
    return group


class _NameMapping:
    """transformers' conversion mapping of one architecture, applied to names."""

    def __init__(self, architecture: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(architecture)
        self.wanted = architecture.state_dict()
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}
        self._prefix = architecture.base_model_prefix

    def __call__(self, key: str) -> tuple[str, str | None]:
        """Returns the parameter that a key on disk belongs to, and the pattern of its converter if it needs one."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.wanted)
        if name not in self.wanted and key in self.wanted:
            return rename_source_key(key, [], [], self._prefix, self.wanted)
        # Decoders that find answers call their base "transformer", and those that predict tokens "model".
        renamed = f"{self._prefix}.{key.partition('.')[2]}"
        if name not in self.wanted and renamed in self.wanted:
            return renamed, None
        return name, pattern

    def converter(self, pattern: str) -> WeightConverter:
        """Returns a new converter for the tensors of one target."""
        return deepcopy(self._by_pattern[pattern])


def _find_quantized(stored: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Returns the parts of every quantized weight, by the key that the plain weight would have."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    for key, entry in stored.items():
        if key.endswith(f".{_HQQ_CODES}"):
            weight = _plain_key(key)
            layer = key.removesuffix(_HQQ_CODES)
            layers[weight] = {part: stored[layer + part] for part in _HQQ_PARTS if layer + part in stored}
            layers[weight][_HQQ_CODES] = entry
        elif match := _MXFP4_PART.match(key):
            layers.setdefault(match["stack"], {})[match["part"]] = entry
        elif match := _QUANTIZED_PART.match(key):
            weight = f"{match['layer']}.weight"
            layers.setdefault(weight, {"weight": stored[weight]} if weight in stored else {})[match["part"]] = entry
    return layers


def _plain_key(key: str) -> str:
    """Returns the key that a weight would have if it were not quantized, from the key of its codes."""
    if match := _MXFP4_PART.match(key):
        return match["stack"]
    return f"{key.removesuffix(_HQQ_CODES)}weight" if key.endswith(f".{_HQQ_CODES}") else key
