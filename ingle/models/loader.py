"""Filling a skeleton: weights are read tensor by tensor, converted, quantized on the way and put in place.

The names on disk are the hub's; transformers renames, fuses and splits them while loading.  Its own conversion
mapping is run here against a pristine twin of the model on the meta device, group by group, so that the real model
may hold quantized and adapted modules, and so that no more than one group is in memory besides the model.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ingle.config.model import ModelConfig
from ingle.errors import ModelError
from ingle.events import Progress, Sink, Warned
from ingle.models.architecture import build
from ingle.models.destination import Destination
from ingle.models.hidden import verify
from ingle.models.hub import locate
from ingle.models.shards import StoredTensor, read_index


def fill(
    model: PreTrainedModel,
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    sink: Sink | None = None,
) -> None:
    """Gives every parameter and buffer of a skeleton its value.

    Args:
        model: A skeleton, perhaps with quantized and adapted modules.
        config: Which weights.
        device: Where they go.
        dtype: Compute type.
        seed: Of the random initialisation (``init: random``).
        sink: Told of progress and of weights that fit nowhere.

    Raises:
        ModelError: When a file is missing or damaged, a weight is missing or of another shape, or the filled
            model fails :func:`ingle.models.verify`.
    """
    device = torch.device(device)
    twin = build(model.config, dtype, trust_remote_code=config.trust_remote_code)
    destination = Destination(model, twin, device)
    if config.init == "random":
        _fill_random(destination, twin, seed)
    else:
        folder = locate(config.id, revision=config.revision, part="weights", code=config.trust_remote_code)
        _fill_from(destination, twin, read_index(folder), folder, sink)
        _read_generation_config(model, folder)
    _fill_buffers(destination, twin)
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    assert not left, f"left on the meta device: {left[:5]}"
    verify(model)


#: What bitsandbytes writes beside a packed weight.
_PACKED_PART = re.compile(
    r"^(?P<layer>.*)\.(?P<part>weight\.(?:absmax|quant_map|nested_\w+|quant_state\.\w+)|SCB|weight_format)$"
)


@dataclass(frozen=True)
class _Group:
    """Tensors on disk that become one or several parameters together."""

    target: str
    transform: WeightConverter | WeightRenaming


@dataclass(frozen=True)
class _PackedGroup:
    """Tensors on disk that are the planes of one packed weight."""

    target: str
    parts: dict[str, StoredTensor]


@dataclass(frozen=True)
class _Plan:
    """What is to be read, in order, and what fits nowhere."""

    groups: list[_Group | _PackedGroup]
    unexpected: list[str]


def _fill_from(
    destination: Destination, twin: PreTrainedModel, stored: dict[str, StoredTensor], folder: Path, sink: Sink | None
) -> None:
    plan = _plan(twin, stored)
    for done, group in enumerate(plan.groups):
        if isinstance(group, _PackedGroup):
            destination.put_packed(group.target, {key: part.read() for key, part in group.parts.items()})
        else:
            for name, value in _realize(group, twin, folder):
                destination.put(name, value)
        if sink is not None and (done % 32 == 0 or done + 1 == len(plan.groups)):
            sink(Progress("reading weights", done + 1, len(plan.groups)))
    destination.tie(twin.all_tied_weights_keys, sink)
    missing = sorted(set(twin.state_dict()) - destination.filled)
    missing = [name for name in missing if not _matches(name, twin._keys_to_ignore_on_load_missing)]
    lost = f": {_some(plan.unexpected)}" if plan.unexpected else ""
    if missing:
        raise ModelError(
            f"{len(missing)} weights of the model are not in its files: {_some(missing)}.",
            where=str(folder),
            why=f"{len(plan.unexpected)} weights in the files fit nowhere{lost}",
            fix="check that the files belong to this config.json",
        )
    if plan.unexpected and sink is not None:
        sink(Warned(f"weights that fit nowhere were left out{lost}", str(folder), len(plan.unexpected)))


def _plan(twin: PreTrainedModel, stored: dict[str, StoredTensor]) -> _Plan:
    """Sorts the tensors on disk into groups, as transformers' own loading does, without reading any."""
    rename = _Renaming(twin)
    groups: dict[str, _Group | _PackedGroup] = {}
    unexpected: list[str] = []
    packed = _packed_layers(stored)
    for key in sorted(stored, key=dot_natural_key):
        if _PACKED_PART.match(key):
            continue
        name, pattern = rename(key)
        parts = packed.pop(key, None)
        if name not in rename.wanted:
            if not _obsolete(key, twin):
                unexpected.append(key)
        elif parts is not None:
            if pattern is not None:
                raise ModelError(
                    f"the packed weight {key} would have to be fused with others, which is not supported.",
                    where=str(stored[key].path),
                    fix="start from the checkpoint that is not quantized",
                )
            groups[name] = _PackedGroup(name, parts)
        else:
            if name not in groups:
                groups[name] = _Group(name, rename.transform(key, name, pattern))
            group = groups[name]
            assert isinstance(group, _Group)
            # transformers runs what is no tensor yet when it needs it: nothing is read here.
            group.transform.add_tensor(name, key, pattern or key, stored[key].read)  # type: ignore[arg-type]
    return _Plan(list(groups.values()), unexpected)


class _Renaming:
    """transformers' conversion mapping of one architecture, applied to names."""

    def __init__(self, twin: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(twin)
        self.wanted = twin.state_dict()
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix = twin.base_model_prefix

    def __call__(self, key: str) -> tuple[str, str | None]:
        """The parameter a key on disk goes to, and the pattern of the converter it must pass, if any."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.wanted)
        if name not in self.wanted and key in self.wanted:
            return rename_source_key(key, [], [], self._prefix, self.wanted)
        return name, pattern

    def transform(self, key: str, name: str, pattern: str | None) -> WeightConverter | WeightRenaming:
        """A fresh transform for one target."""
        if pattern is None:
            return WeightRenaming(key, name)
        return deepcopy(next(each for each in self._converters if pattern in each.source_patterns))


def _packed_layers(stored: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The parts of every weight that bitsandbytes packed, by the weight's key on disk."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    for key, entry in stored.items():
        if match := _PACKED_PART.match(key):
            weight = f"{match['layer']}.weight"
            layers.setdefault(weight, {"weight": stored[weight]} if weight in stored else {})[match["part"]] = entry
    return layers


def _obsolete(key: str, twin: PreTrainedModel) -> bool:
    """Whether old checkpoints are known to hold this key and it is rightly dropped."""
    patterns = [*(twin._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return _matches(key, patterns)


def _realize(group: _Group, twin: PreTrainedModel, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors of a group and runs its conversion."""
    try:
        values = group.transform.convert(group.target, model=twin, config=twin.config)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the weights of {group.target} cannot be converted.",
            where=str(folder),
            why=f"{type(error).__name__}: {error}",
            fix="check that the files belong to this config.json",
        ) from error
    while values:
        name, value = values.popitem()
        yield name, value[0] if isinstance(value, list) else value


def _fill_random(destination: Destination, twin: PreTrainedModel, seed: int) -> None:
    """The architecture's own initialisation, in float32 on the CPU, so that it is the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source = type(twin)(deepcopy(twin.config)).float()
    values = source.state_dict()
    for name in list(values):
        destination.put(name, values.pop(name))
    destination.tie(dict(twin.all_tied_weights_keys), None)


def _fill_buffers(destination: Destination, twin: PreTrainedModel) -> None:
    """Computes what no file holds (rotary frequencies, causal masks) with the architecture's own code.

    The twin's parameters stay on the meta device, flagged as initialised: only its buffers are worked out.
    """
    names = [name for name, _ in twin.named_buffers() if name not in destination.filled]
    for parameter in twin.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for name in names:
        owner, leaf = _owner(twin, name)
        owner._buffers[leaf] = torch.empty_like(owner.get_buffer(leaf), device=destination.device)
    twin.initialize_weights()
    for name in names:
        destination.put(name, twin.get_buffer(name))


def _read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _matches(name: str, patterns: object) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())  # type: ignore[attr-defined]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
