"""BitFit and LayerNorm tuning: trains biases or norms, which no format quantizes, and adds no module.

Biases are saved as a LoRA of no layer with ``bias: all``, norms as LN_TUNING, and both as the former with the norms
among ``modules_to_save``. PEFT reads all three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ingle.adapters.kind_tensors import by_name, prefixed
from ingle.adapters.peft_config import NO_TARGETS
from ingle.adapters.peft_tensors import PREFIX
from ingle.adapters.targets import Selection, trained_in_full
from ingle.config.adapter_kinds import BitfitAdapter
from ingle.errors import AdapterError
from ingle.parallel import Mesh
from ingle.planning.selection import is_inside

#: What PEFT inserts into the paths of tuned norms.
_TUNED = "ln_tuning_layers."


def select(model: nn.Module, adapter: BitfitAdapter) -> Selection:
    """Returns the parameters to train; see :class:`ingle.adapters.kinds.Kind`.

    Raises:
        AdapterError: The model has none of them.
    """
    to_save = trained_in_full(model, adapter.trainable_modules)
    found = dict.fromkeys([*(_biases(model) if adapter.biases else ()), *(_of_norms(model) if adapter.norms else ())])
    names = tuple(path for path in found if not is_inside(path, to_save))
    if not names:
        raise AdapterError(
            f"This model has no {'norms' if adapter.norms else 'biases'} to train.",
            where="adapter.biases, adapter.norms",
            fix="--adapter.kind=lora" if adapter.norms else "--adapter.norms, or --adapter.kind=lora",
        )
    return Selection((), to_save, parameters=names)


def insert(model: nn.Module, adapter: BitfitAdapter, selection: Selection) -> None:
    """Makes the parameters trainable."""
    for path in selection.parameters:
        model.get_parameter(path).requires_grad_(True)


def start(model: nn.Module, adapter: BitfitAdapter, seed: int, mesh: Mesh | None) -> None:
    """Leaves the parameters as they are in the base."""


def describe(model: nn.Module, adapter: BitfitAdapter) -> dict[str, Any]:
    """Returns the fields of PEFT's config."""
    norms = sorted({path.rpartition(".")[0] for path in _of_norms(model)})
    to_save = list(trained_in_full(model, adapter.trainable_modules))
    if not adapter.biases:
        return {"peft_type": "LN_TUNING", "target_modules": norms}
    return {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "bias": "all",
        "target_modules": NO_TARGETS,
        "modules_to_save": (to_save + (norms if adapter.norms else [])) or None,
    }


def to_file(model: nn.Module, adapter: BitfitAdapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters by PEFT's keys."""
    return {key: values[path] for path, key in _names(model, adapter).items()}


def from_file(model: nn.Module, adapter: BitfitAdapter, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the parameters by path; PEFT may have trained some of the norms only, and the others stay."""
    return by_name(tensors, {path: key for path, key in _names(model, adapter).items() if key in tensors}, where)


def reads(config: Mapping[str, Any]) -> bool:
    """Returns whether an ``adapter_config.json`` is one of biases or norms alone."""
    is_lora = config.get("peft_type") == "LORA" and config.get("bias") == "all"
    return config.get("peft_type") == "LN_TUNING" or (is_lora and config.get("target_modules") == NO_TARGETS)


def read(config: Mapping[str, Any], folder: Path) -> BitfitAdapter:
    """Returns the section of an adapter that PEFT trained."""
    is_norms = config.get("peft_type") == "LN_TUNING"
    return BitfitAdapter(
        kind="bitfit",
        biases=not is_norms,
        norms=is_norms,
        trainable_modules=tuple(config.get("modules_to_save") or ()),
    )


def _biases(model: nn.Module) -> list[str]:
    """Returns the biases inside of layers."""
    return [
        path
        for path, parameter in model.named_parameters()
        if path.endswith("bias") and parameter.dim() == 1 and re.search(r"\.\d+\.", path)
    ]


def _of_norms(model: nn.Module) -> list[str]:
    """Returns the weights and biases of all norms."""
    norms = {name: m for name, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    return [
        f"{name}.{key}"
        for name, module in norms.items()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 1
    ]


def _names(model: nn.Module, adapter: BitfitAdapter) -> dict[str, str]:
    """Returns the key of each parameter."""
    parameters = select(model, adapter).parameters
    if adapter.biases:
        return prefixed(parameters)
    split = (path.rpartition(".") for path in parameters)
    return {f"{path}.{key}": f"{PREFIX}{path}.{_TUNED}{key}" for path, _, key in split}
