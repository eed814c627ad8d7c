"""Which tensors on disk become which parameters, decided from names alone.

The names on disk are the hub's.  transformers renames, fuses and splits them while it loads; its own conversion
mapping is applied here, to a pristine twin of the architecture on the meta device, and nothing is read yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

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

#: What hqq writes in place of a packed weight, and what it writes beside that.
_HQQ_CODES = "W_q"
_HQQ_PARTS = (
    *("scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "compute_dtype"),
    *("view_as_float", "quant_scale", "quant_zero", "offload_meta", "channel_wise", "optimize", "round_zero"),
    *("encoded_state_dict", "stores_quant_config"),
)
#: What bitsandbytes and transformers' BitNet write beside a packed weight.
_PACKED_PART = re.compile(
    r"^(?P<layer>.*)\.(?P<part>weight\.(?:absmax|quant_map|nested_\w+|quant_state\.\w+)|SCB|weight_format|weight_scale)$"
)


@dataclass(frozen=True, slots=True)
class Plain:
    """One tensor that is one parameter."""

    target: str
    stored: StoredTensor


@dataclass(frozen=True, slots=True)
class Experts:
    """Matrices of experts that are stacked into one parameter, and joined by rows before that.

    Attributes:
        target: The parameter ``[experts, rows, columns]``.
        parts: For each expert what is joined: its gate and up projection, for instance.
    """

    target: str
    parts: tuple[tuple[StoredTensor, ...], ...]


@dataclass(frozen=True, slots=True)
class Converted:
    """Tensors that become parameters in a way only transformers knows; it holds what is to be read."""

    target: str
    transform: WeightConverter


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Tensors that are the bytes of one weight that bitsandbytes, hqq or transformers' BitNet packed, by its keys.

    Attributes:
        target: The parameter.
        parts: By their keys, without the layer's name.
        divides: Whether BitNet's scale divides.
    """

    target: str
    parts: dict[str, StoredTensor]
    divides: bool = False


Group = Plain | Experts | Converted | QuantizedWeight | GgufWeight


@dataclass(frozen=True, slots=True)
class ReadingPlan:
    """What is to be read, in order.

    Attributes:
        groups: Each is read, put in place and let go before the next.
        unexpected: Keys on disk that fit nowhere.
        stored: The safetensors checkpoint by its keys on disk; empty for a GGUF file.
    """

    groups: tuple[Group, ...]
    unexpected: tuple[str, ...]
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)


def plan_reading(
    twin: PreTrainedModel, stored: dict[str, StoredTensor], *, bitnet_divides: bool = False
) -> ReadingPlan:
    """Sorts the tensors on disk into groups.

    Args:
        twin: The pristine architecture.
        stored: The checkpoint.
        bitnet_divides: Whether the scales of packed BitNet weights divide.

    Raises:
        ModelError: When two tensors claim the same parameter, or a packed one would have to be fused.
    """
    mapping = _Mapping(twin)
    packed = _packed_layers(stored)
    groups: dict[str, Group] = {}
    sources: dict[str, dict[str, list[StoredTensor]]] = {}
    unexpected: list[str] = []
    beside = {id(part) for parts in packed.values() for key, part in parts.items() if key not in ("weight", _HQQ_CODES)}
    for key in sorted(stored, key=dot_natural_key):
        if id(stored[key]) in beside:
            continue
        weight = _name_weight(key)
        name, pattern = mapping(weight)
        if name not in mapping.wanted:
            if not _obsolete(key, twin):
                unexpected.append(key)
        elif pattern is not None:
            _refuse_packed(weight, stored[key], packed)
            sources.setdefault(name, {}).setdefault(pattern, []).append(stored[key])
            groups.setdefault(name, Converted(name, mapping.converter(pattern)))
        elif name in groups:
            raise ModelError(f"Two tensors in the files are {name}; one is {key}.", where=str(stored[key].path))
        else:
            parts = packed.get(weight)
            groups[name] = Plain(name, stored[key]) if parts is None else QuantizedWeight(name, parts, bitnet_divides)
    for name, found in sources.items():
        group = groups[name]
        assert isinstance(group, Converted)
        groups[name] = _stacked(group, found) or _deferred(group, found)
    return ReadingPlan(tuple(groups.values()), tuple(unexpected), stored)


def refuse_other_shapes(plan: ReadingPlan, twin: PreTrainedModel) -> None:
    """Refuses weights on disk that have another shape than the architecture, before a byte of them is read.

    Raises:
        ModelError: It names the weight, its file and both shapes.
    """
    wanted = twin.state_dict()
    for group in plan.groups:
        want = tuple(wanted[group.target].shape)
        match group:
            case Plain(stored=stored):
                have, path = stored.shape, stored.path
            case Experts(parts=parts) if len({tuple(part.shape for part in each) for each in parts}) == 1:
                one, path = parts[0][0].shape, parts[0][0].path
                have = (len(parts), sum(part.shape[0] for part in parts[0]), *one[1:]) if one else ()
            case GgufWeight(tensor=tensor):
                have, path = tensor.shape, tensor.path
            case _:
                continue  # packed or converted: known when it is read
        if have != want:
            described = "the file's metadata" if isinstance(group, GgufWeight) else "config.json"
            raise ModelError(
                f"The weight {group.target} has another shape than {described} gives it.",
                where=str(path),
                why=f"{have} in the file, {want} by {described}",
                fix=f"check that the weights belong to {described}",
            )


def _stacked(group: Converted, found: dict[str, list[StoredTensor]]) -> Experts | None:
    """The commonest conversion, taken apart so that one expert at a time is read."""
    kinds = [(type(step), getattr(step, "dim", None)) for step in group.transform.operations]
    stack, join = (MergeModulelist, 0), (Concatenate, 1)
    patterns = group.transform.source_patterns
    if kinds not in ([stack], [stack, join]) or (len(kinds) == 1) != (len(patterns) == 1):
        return None
    if found.keys() != set(patterns) or len({len(each) for each in found.values()}) != 1:
        return None
    return Experts(group.target, tuple(zip(*(found[pattern] for pattern in patterns), strict=True)))


def _deferred(group: Converted, found: dict[str, list[StoredTensor]]) -> Converted:
    """Hands the tensors to the transform unread: it runs what is no tensor yet when it needs it."""
    for pattern, tensors in found.items():
        for entry in tensors:
            group.transform.add_tensor(group.target, pattern, pattern, entry.read)  # type: ignore[arg-type]
    return group


class _Mapping:
    """The conversion mapping of one architecture, applied to names."""

    def __init__(self, twin: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(twin)
        self.wanted = twin.state_dict()
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}
        self._prefix = twin.base_model_prefix

    def __call__(self, key: str) -> tuple[str, str | None]:
        """The parameter a key on disk goes to, and the pattern of the converter it must pass, if any."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.wanted)
        if name not in self.wanted and key in self.wanted:
            return rename_source_key(key, [], [], self._prefix, self.wanted)
        return name, pattern

    def converter(self, pattern: str) -> WeightConverter:
        """A fresh converter, to be filled with the tensors of one target."""
        return deepcopy(self._by_pattern[pattern])


def _packed_layers(stored: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The parts of every packed weight, by the key that the plain weight would have."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    for key, entry in stored.items():
        if (weight := _name_weight(key)) != key:
            layer = key.removesuffix(_HQQ_CODES)
            layers[weight] = {part: stored[layer + part] for part in _HQQ_PARTS if layer + part in stored}
            layers[weight][_HQQ_CODES] = entry
        elif match := _PACKED_PART.match(key):
            weight = f"{match['layer']}.weight"
            layers.setdefault(weight, {"weight": stored[weight]} if weight in stored else {})[match["part"]] = entry
    return layers


def _name_weight(key: str) -> str:
    """The key that a weight would have if hqq had not packed it."""
    return f"{key.removesuffix(_HQQ_CODES)}weight" if key.endswith(f".{_HQQ_CODES}") else key


def _refuse_packed(key: str, entry: StoredTensor, packed: dict[str, dict[str, StoredTensor]]) -> None:
    if key in packed:
        raise ModelError(
            f"The packed weight {key} would have to be fused with others, which is not supported.",
            where=str(entry.path),
            fix="start from the checkpoint that is not quantized",
        )


def _obsolete(key: str, twin: PreTrainedModel) -> bool:
    """Whether old checkpoints are known to hold this key and it is rightly dropped."""
    patterns = [*(twin._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return any(re.search(pattern, key) for pattern in patterns)
