"""Block expansion: copies of layers that compute nothing at first, to be trained while all else is frozen.

A copy comes after each group of layers, and the outputs of its attention and of its MLP are zero, so that the residual
stream passes through it. The expanded model is an ordinary one: a folder with more layers.

Source: Wu et al. 2024, "LLaMA Pro" (arXiv 2401.02415), section 3.1.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ingle.atomic import atomic_folder
from ingle.config.model import ModelConfig
from ingle.errors import ModelError
from ingle.events import Progress, Sink
from ingle.models.loading.config_json import read_config
from ingle.models.loading.hub import locate
from ingle.models.loading.safetensors_files import StoredTensor, read_index
from ingle.models.loading.weight_loading import load_model

#: Layers that write to the residual stream, by the last part of their names.
_OUTPUTS = {"o_proj", "out_proj", "c_proj", "down_proj", "dense_4h_to_h", "dense", "w2", "wo", "fc2", "fc_out"}
#: Names of the number of layers in ``config.json``.
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_NUMBER = re.compile(r"(?P<stack>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<layer>\d+)\.(?P<rest>.+)")
_PROBE = 16


@dataclass(frozen=True, slots=True)
class Expansion:
    """A model with more layers.

    Attributes:
        path: Its folder.
        added: Numbers of the new layers, counted from 0.
        modules: Their paths, for ``adapter.trainable_modules``.
        largest_difference: Of its logits from those of the original model, on a few tokens.
    """

    path: Path
    added: tuple[int, ...]
    modules: tuple[str, ...]
    largest_difference: float


def expand(model: ModelConfig, blocks: int, out: Path, sink: Sink = lambda event: None) -> Expansion:
    """Writes a model with ``blocks`` more layers that computes the same.

    Args:
        model: The model, unquantized.
        blocks: Number of new layers; the number of its layers must be a multiple of it.
        out: A new folder.
        sink: Receives the progress.

    Raises:
        ModelError: The layers cannot be divided, or the expanded model does not compute the same.
    """
    if out.exists():
        raise ModelError(f"{out} exists.", where=f"--out {out}", fix="name a new folder")
    read_config(model)  # refuses what is no model
    source = locate(model.id, revision=model.revision, part="weights")
    index = read_index(source)
    stack, total = _find_stack(index, model.id)
    if blocks > total or total % blocks:
        divisors = [number for number in range(1, total + 1) if total % number == 0]
        raise ModelError(
            f"{total} layers cannot be divided into {blocks} equal groups.",
            where=f"--blocks {blocks}",
            fix=f"--blocks {' or '.join(map(str, divisors[-4:]))}",
        )
    size = total // blocks
    origins = [layer for layer in range(total) for _ in range(1 + (layer % size == size - 1))]
    added = tuple(group * (size + 1) + size for group in range(blocks))
    with atomic_folder(out) as folder:
        _write(index, stack, origins, set(added), folder, sink)
        _copy_files(source, folder, total, blocks, origins)
        difference = _compare(model, model.model_copy(update={"id": str(folder), "revision": None}))
        if difference > 0:
            raise ModelError(
                f"The expanded model differs from {model.id}: its logits by up to {difference:.2g}.",
                why="its layers do not add their outputs to a residual stream, or write to it by other names",
                fix="train an adapter on the original model instead",
            )
    return Expansion(out, added, tuple(f"{stack}.{layer}" for layer in added), difference)


def _find_stack(index: Mapping[str, StoredTensor], name: str) -> tuple[str, int]:
    """Returns the path of the layers and their number."""
    found: dict[str, set[int]] = defaultdict(set)
    for key in index:
        if (match := _NUMBER.fullmatch(key)) is not None:
            found[match["stack"]].add(int(match["layer"]))
    whole = {stack: len(numbers) for stack, numbers in found.items() if numbers == set(range(len(numbers)))}
    if len(whole) != 1:
        raise ModelError(
            f"{name} cannot be expanded: it has {len(whole)} stacks of layers.",
            why=", ".join(sorted(whole)) or "no tensor is inside a numbered layer",
            fix="expand a decoder with one stack of layers",
        )
    return next(iter(whole.items()))


def _write(
    index: Mapping[str, StoredTensor], stack: str, origins: list[int], added: set[int], folder: Path, sink: Sink
) -> None:
    """Writes one file for each layer, and one for everything else."""
    inside: dict[int, dict[str, StoredTensor]] = defaultdict(dict)
    outside: dict[str, StoredTensor] = {}
    for key, stored in index.items():
        match = _NUMBER.fullmatch(key)
        if match is not None and match["stack"] == stack:
            inside[int(match["layer"])][match["rest"]] = stored
        else:
            outside[key] = stored
    files: dict[str, str] = {}
    total = len(origins) + 1
    for number in range(total):
        name = f"model-{number + 1:05}-of-{total:05}.safetensors"
        if number == len(origins):
            tensors = {key: stored.read() for key, stored in outside.items()}
        else:
            layer = inside[origins[number]]
            tensors = {
                f"{stack}.{number}.{rest}": _passing(rest, stored.read()) if number in added else stored.read()
                for rest, stored in layer.items()
            }
        save_file(tensors, folder / name, {"format": "pt"})
        files |= dict.fromkeys(tensors, name)
        sink(Progress("Writing layers", number + 1, total))
    content = {"metadata": {}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _passing(name: str, tensor: Tensor) -> Tensor:
    """Returns a tensor of a new layer, which is zero if the layer writes to the residual stream with it."""
    return torch.zeros_like(tensor) if _OUTPUTS & set(name.split(".")) else tensor


def _copy_files(source: Path, folder: Path, total: int, blocks: int, origins: list[int]) -> None:
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in config.items():
        if key in _COUNTS and value == total:
            config[key] = total + blocks
        elif isinstance(value, list) and len(value) == total and key.endswith(("layer_types", "layers", "types")):
            config[key] = [value[origin] for origin in origins]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _compare(before: ModelConfig, after: ModelConfig) -> float:
    """Returns the largest difference of the logits in float32; the models are loaded one after the other."""
    logits = []
    for each in (before, after):
        model: Any = load_model(each.model_copy(update={"dtype": "float32"}))
        ids = torch.arange(_PROBE)[None] * 7 % model.config.get_text_config().vocab_size
        logits.append(model(input_ids=ids).logits)
        del model
    return float((logits[0] - logits[1]).abs().max())
