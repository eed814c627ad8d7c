"""Reads and writes importance matrices under a model's own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.events import Sink, Warned
from ingle.gguf.architecture import to_metadata
from ingle.gguf.names import TensorNames, TensorRule, names_of_model
from ingle.quant.imatrix_collector import Importance, linear_maps, matrix_shape


def gguf_names(model: PreTrainedModel) -> TensorNames:
    """Returns llama.cpp's names of the model's tensors; of a multimodal model, of its text part.

    Raises:
        GgufError: llama.cpp does not support the architecture or a detail of it.
    """
    names = names_of_model(model)
    to_metadata(names.config)
    return names


def save_importance(
    model: PreTrainedModel,
    entries: Mapping[str, Importance],
    path: Path,
    *,
    datasets: Sequence[str],
    chunk_size: int,
) -> None:
    """Writes collected importances in llama.cpp's format.

    Args:
        model: Determines the names of tensors.
        entries: Importances by the model's names.
        path: The file to write; replaced if it exists.
        datasets: Files that contained the text.
        chunk_size: Tokens per chunk of the text.

    Raises:
        GgufError: The architecture has no names in GGUF.
        CheckpointError: The disk is full.
    """
    from ingle.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix

    found: dict[str, ImatrixEntry] = {}
    for name, rule in _rules(model).items():
        entry = entries.get(name)
        if entry is not None and entry.count:
            sums = rule.columns_to_file(entry.sums.numpy().astype(np.float32)[None])
            counts = np.array([entry.count], dtype=np.float32)
            found |= dict.fromkeys(rule.tensors, ImatrixEntry(sums, counts))  # they have the same input
    most = max((entry.count for entry in entries.values()), default=0)
    write_imatrix(path, Imatrix(found, tuple(datasets), most // chunk_size, chunk_size))


def importance_by_tensor(model: PreTrainedModel, importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the importance of columns by tensor of a file, in its order.

    Args:
        model: With or without weights and adapters.
        importance: By parameter, float32 ``[I]``.

    Raises:
        GgufError: The architecture has no names in GGUF.
    """
    found: dict[str, Tensor] = {}
    for name, rule in _rules(model).items():
        if name in importance:
            moved = torch.from_numpy(rule.columns_to_file(importance[name].numpy()))
            found |= dict.fromkeys(rule.tensors, moved)
    return found


def _rules(model: PreTrainedModel) -> dict[str, TensorRule]:
    """Returns how files store the weight of each linear layer, by parameter."""
    names = gguf_names(model)
    maps = {f"{name}.weight": matrix_shape(module) for name, module in linear_maps(model).items()}
    found = {name: names.rule(name, shape) for name, shape in maps.items()}
    return {name: rule for name, rule in found.items() if rule is not None}


def load_importance(model: PreTrainedModel, path: Path, sink: Sink = lambda event: None) -> dict[str, Tensor]:
    """Returns the importance of the columns of the model's linear layers, by parameter, float32 ``[I]``.

    Args:
        model: With or without weights.
        path: A GGUF imatrix or an older ``.dat`` file.
        sink: Receives a warning about layers that the file does not cover.

    Raises:
        GgufError: The file is damaged or not an importance matrix, or the architecture has no names in GGUF.
        ModelError: The file belongs to another model.
    """
    from ingle.gguf.imatrix import read_imatrix

    rules = _rules(model)
    entries = read_imatrix(path).entries
    found: dict[str, Tensor] = {}
    missing = []
    for name, module in linear_maps(model).items():
        parameter = f"{name}.weight"
        rule = rules.get(parameter)
        gguf_name = "" if rule is None else rule.tensors[0]
        entry = entries.get(gguf_name)
        if rule is None or entry is None:
            missing.append(parameter)
            continue
        columns = matrix_shape(module)[1]
        if entry.mean.shape != (1, columns):
            raise ModelError(
                "The importance matrix belongs to another model.",
                where=str(path),
                why=f"{gguf_name} has {entry.mean.shape[-1]} columns in the file and {columns} in the model",
                fix="gather one for this model: --data FILE",
            )
        found[parameter] = torch.from_numpy(rule.columns_from_file(entry.mean[0]).copy())
    if not found:
        raise ModelError(
            "The importance matrix covers none of the model's weights.",
            where=str(path),
            why=f"it contains {', '.join(list(entries)[:3])}, ...",
            fix="gather one for this model: --data FILE",
        )
    if missing:
        sink(Warned(f"The importance matrix does not cover {missing[0]}.", where=str(path), count=len(missing)))
    return found
