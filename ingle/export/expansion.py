"""Adds layers to a model that change nothing yet, so that training can fill them and leave the others alone.

A new layer is a copy of the layer before it whose attention and MLP end in zeros: what it adds to the hidden states is
zero, so the model computes what it did.

Source: Wu et al. 2024, "LLaMA Pro" (arXiv 2401.02415), section 3.2.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingle import models
from ingle.adapters.sublayers import find_sublayers
from ingle.atomic import atomic_folder
from ingle.config.model import ModelConfig
from ingle.errors import ConfigError, ModelError
from ingle.events import Progress, Sink
from ingle.export.writers.shards import ShardWriter
from ingle.models.loading.hub import locate
from ingle.models.loading.safetensors_files import StoredTensor, read_index

#: The name of a stored tensor of a layer: what comes before its number, the number, and the rest.
_NUMBERED = re.compile(r"(?P<before>(?:[^.\d][^.]*\.)*)(?P<number>\d+)\.(?P<rest>.+)")
#: The last matrices of experts.
_EXPERT_END = re.compile(r"expert.*\b(down_proj|w2|wo|fc2|output_linear)(_bias)?\b")
#: Names of the number of layers in configs.
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
#: Largest relative difference of the logits: that of rounding.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ExpansionResult:
    """A model with more layers.

    Attributes:
        path: Its folder.
        num_layers: All its layers.
        new_layers: Paths of the new ones in the model.
        num_new: Weights in the new layers.
        num_weights: All weights.
    """

    path: Path
    num_layers: int
    new_layers: tuple[str, ...]
    num_new: int
    num_weights: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, as ``ingle expand --json`` prints it."""
        return {
            "path": str(self.path),
            "num_layers": self.num_layers,
            "new_layers": list(self.new_layers),
            "num_new": self.num_new,
            "num_weights": self.num_weights,
        }


def expand(model: str, blocks: int, out: Path | str, *, sink: Sink = lambda event: None) -> ExpansionResult:
    """Writes a copy of a model with further layers, spread evenly, that add nothing to the hidden states.

    Args:
        model: Folder or hub id of a model in 16 or 32 bits.
        blocks: Number of new layers.
        out: A new folder.
        sink: Receives progress events.

    Raises:
        ConfigError: The folder exists, or there are more new layers than old ones.
        ModelError: The model cannot be read, or its layers cannot be made to add nothing.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out} exists.", where="--out", fix="name a new folder")
    folder = locate(model, part="weights")
    source = ModelConfig(id=str(folder))
    built = models.meta_model(source, "cpu", models.compute_dtype(source.dtype, "cpu"))
    layers = models.decoder_layers(built)
    if not 1 <= blocks <= len(layers):
        raise ConfigError(
            f"{model} has {len(layers)} layers; between 1 and as many can be added.",
            where="--blocks",
            fix=f"--blocks {max(1, len(layers) // 4)}",
        )
    after = [-(-(block + 1) * len(layers) // blocks) - 1 for block in range(blocks)]  # the layer before each new one
    prefix = next(name for name, module in built.named_modules() if module is layers)
    stored = read_index(folder)
    before = _find_stack(stored, len(layers), folder)
    ends = {each.output.split(f"{prefix}.", 1)[1].partition(".")[2] for each in find_sublayers(built)}
    new = [number + shift + 1 for shift, number in enumerate(after)]
    with atomic_folder(out) as partial:
        _copy_setup(folder, partial, len(layers), after)
        counts = _write(stored, partial, before, after, ends, sink)
        _compare(source, partial)
    paths = tuple(f"{prefix}.{number}" for number in new)
    return ExpansionResult(out, len(layers) + blocks, paths, *counts)


def _find_stack(stored: Mapping[str, StoredTensor], num_layers: int, folder: Path) -> str:
    """Returns what comes before the number of a layer in the names of the stored tensors."""
    numbers: dict[str, set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, stored)):
        numbers.setdefault(match["before"], set()).add(int(match["number"]))
    stacks = [before for before, found in numbers.items() if found == set(range(num_layers))]
    if len(stacks) != 1:
        raise ModelError(
            f"The {num_layers} layers of the model cannot be told apart in its files.",
            where=str(folder),
            why=f"stacks of as many modules: {', '.join(stacks) or 'none'}",
            fix="use a model of another architecture",
        )
    return stacks[0]


def _write(
    stored: Mapping[str, StoredTensor], out: Path, before: str, after: list[int], ends: set[str], sink: Sink
) -> tuple[int, int]:
    """Writes all tensors; returns the number of weights in new layers, and of all."""
    writer = ShardWriter(out, 2 * len(stored))
    num_new = num_weights = 0
    for done, (name, tensor) in enumerate(stored.items(), 1):
        value = tensor.read()
        for key, is_new in _names(name, before, after):
            written = torch.zeros_like(value) if is_new and _ends(name, before, ends) else value
            writer.add(key, written)
            num_new += is_new * value.numel()
            num_weights += value.numel()
        if done % 32 == 0 or done == len(stored):
            sink(Progress("Writing weights", done, len(stored)))
    writer.finish()
    return num_new, num_weights


def _names(name: str, before: str, after: list[int]) -> Iterator[tuple[str, bool]]:
    """Yields the names of a tensor in the larger model, and whether each belongs to a new layer."""
    match = _NUMBERED.fullmatch(name)
    if match is None or match["before"] != before:
        yield name, False
        return
    number = int(match["number"])
    shift = sum(each < number for each in after)
    yield f"{before}{number + shift}.{match['rest']}", False
    if number in after:
        yield f"{before}{number + shift + 1}.{match['rest']}", True


def _ends(name: str, before: str, ends: set[str]) -> bool:
    """Returns whether a tensor of a layer belongs to the last matrix of its attention or MLP."""
    rest = name[len(before) :].partition(".")[2]
    return rest.rpartition(".")[0] in ends or _EXPERT_END.search(rest) is not None


def _copy_setup(folder: Path, out: Path, num_layers: int, after: list[int]) -> None:
    """Copies all small files, with a config that has the new layers."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sections = [config, *(each for each in config.values() if isinstance(each, dict))]
    counted = [section for section in sections if any(section.get(name) == num_layers for name in _COUNTS)]
    for section in counted:
        for name, value in section.items():
            if name in _COUNTS and value == num_layers:
                section[name] = num_layers + len(after)
            elif isinstance(value, list) and len(value) == num_layers > 1:
                section[name] = [each for i, each in enumerate(value) for _ in range(1 + (i in after))]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _compare(source: ModelConfig, expanded: Path) -> None:
    """Makes sure that the larger model computes what the original does."""
    logits: list[Tensor] = []
    for section in (source, ModelConfig(id=str(expanded))):
        model = models.load_model(section)
        num_ids = int(model.get_input_embeddings().get_parameter("weight").shape[0])
        ids = (torch.arange(24) * 7919 + 11) % num_ids
        logits.append(model(input_ids=ids[None]).logits.float())
        del model
    error = float((logits[1] - logits[0]).norm() / logits[0].norm())
    if not error <= _TOLERANCE:
        raise ModelError(
            "Layers cannot be added to this model without changing it.",
            where=source.id,
            why=f"its logits change by {error:.1%}: a layer norms the hidden states themselves, or has other paths",
            fix="train an adapter instead",
        )
