"""The files of adapters that are not low-rank: what all kinds share, given the functions of :mod:`.kinds`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ingle.adapters.head_files import task_type
from ingle.adapters.kinds import Kind, kind_of, kind_of_files, module_prefix
from ingle.adapters.peft_config import read_config
from ingle.adapters.peft_tensors import DTYPES, WEIGHTS_FILE, load_module, read_record, read_tensors
from ingle.adapters.states import adapted_modules
from ingle.config.adapter_kinds import Adapter
from ingle.errors import AdapterError
from ingle.parallel import copy_rows


def read_section(folder: Path) -> Adapter | None:
    """Returns the section of a folder; None if it has LoRA, or a type of adapter that no kind reads.

    Raises:
        AdapterError: The folder contains no adapter, or one that cannot be computed exactly.
    """
    config = read_config(folder)
    kind = kind_of_files(config)
    if kind is None:
        return None
    return read_record(folder).section or kind.read(config, folder)


def describe_kind(model: nn.Module, adapter: Adapter, base_model_id: str, to_save: tuple[str, ...]) -> dict[str, Any]:
    """Returns the content of ``adapter_config.json``."""
    shared = {
        "task_type": task_type(model),
        "base_model_name_or_path": base_model_id,
        "inference_mode": True,
        "modules_to_save": list(to_save) or None,
    }
    return shared | kind_of(adapter).describe(model, adapter)


def load_values(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Gives an inserted adapter and the modules that are trained in full the values of a folder.

    Raises:
        AdapterError: Files are missing or damaged, or do not fit the model or the section.
    """
    kind, where = kind_of(adapter), str(folder / WEIGHTS_FILE)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    for path in kind.select(model, adapter).modules_to_save:
        start = f"{module_prefix(adapter)}{path}."
        own = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        load_module(model, path, own, folder)
    _assign(model, _checked(kind, model, adapter, tensors, where), where)
    for module in adapted_modules(model).values():
        module.starts_at_base = False


def _checked(
    kind: Kind, model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Returns the adapter's values by path, which are floating-point numbers."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and (tensor.dtype not in DTYPES or not torch.isfinite(tensor).all()):
            raise AdapterError(f"{key} contains NaN or infinity, or has another type.", where=where)
    return kind.from_file(model, adapter, tensors, where)


@torch.no_grad()
def _assign(model: nn.Module, values: Mapping[str, Tensor], where: str) -> None:
    """Copies values into parameters and buffers; those of a base on the meta device become their own."""
    for path, value in values.items():
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        target = getattr(module, leaf)
        if target.shape != value.shape:
            raise AdapterError(
                f"{path} does not have the size of the model.",
                where=where,
                why=f"the file has {list(value.shape)}, the model {list(target.shape)}",
                fix="use the base that the adapter was trained on, and the options of adapter that it was trained with",
            )
        if target.is_meta:
            setattr(module, leaf, nn.Parameter(value.to(target.dtype), requires_grad=True))
        else:
            copy_rows(target, value)
