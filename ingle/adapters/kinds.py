"""The kinds of adapters that are not low-rank: the functions that select, insert, start, save and read each.

A kind is a module with these functions. It neither freezes the base nor handles modules that are trained in full:
:mod:`ingle.adapters.attachment` and :mod:`ingle.adapters.kind_files` do that for all kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ingle.adapters import bitfit, bottleneck, ia3, peft_bridge, prefix, prompt, targets
from ingle.adapters.targets import Selection
from ingle.config.adapter import AdapterConfig, LowRankAdapter, NoAdapter
from ingle.config.adapter_kinds import Adapter, PeftAdapter, PrefixAdapter, PromptAdapter
from ingle.config.peft_methods import METHODS
from ingle.errors import AdapterError
from ingle.parallel import Mesh


class Kind(Protocol):
    """What a module of a kind has. Sections are those of the kind; tensors are complete, on one rank."""

    def select(self, model: nn.Module, adapter: Any) -> Selection:
        """Returns what will be changed; the model may be on the meta device, and may have the adapter already.

        Raises:
            AdapterError: The model has nothing that this kind can change.
        """

    def insert(self, model: nn.Module, adapter: Any, selection: Selection) -> None:
        """Adds modules (:class:`ingle.adapters.Adapted`) and makes what they train trainable, not on the meta device.

        The model is frozen, may be on the meta device, and is not sharded yet.
        """

    def start(self, model: nn.Module, adapter: Any, seed: int, mesh: Mesh | None) -> None:
        """Gives what is trained its initial values, when the weights are loaded; all ranks call it together."""

    def describe(self, model: nn.Module, adapter: Any) -> dict[str, Any]:
        """Returns the part of ``adapter_config.json`` that only this kind has, ``peft_type`` among it."""

    def to_file(self, model: nn.Module, adapter: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the file by their keys, given the adapter's parameters by path."""

    def from_file(self, model: nn.Module, adapter: Any, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Returns the adapter's parameters by path, given the tensors of a file.

        Args:
            model: A model with this adapter.
            adapter: Its section.
            tensors: The tensors by key, without those of modules that are trained in full.
            where: The file, for errors.

        Raises:
            AdapterError: A tensor is missing, or is none of this adapter.
        """

    def read(self, config: Mapping[str, Any], folder: Path) -> Adapter:
        """Returns the section of a folder that another program wrote, from its ``adapter_config.json``.

        Raises:
            AdapterError: The adapter cannot be computed exactly.
        """


def kind_of(adapter: Adapter) -> Kind:
    """Returns the functions of a section's kind.

    Raises:
        AdapterError: The kind is not built yet.
    """
    match adapter.kind:
        case "bottleneck":
            return bottleneck
        case "ia3":
            return ia3
        case "bitfit":
            return bitfit
        case "peft":
            return peft_bridge
        case "prefix":
            return prefix
        case "prompt":
            return prompt
        case _:
            raise AdapterError(
                f"Adapters of kind {adapter.kind} are not built yet.", where="adapter.kind", fix="--adapter.kind=lora"
            )


def kind_of_files(config: Mapping[str, Any]) -> Kind | None:
    """Returns the functions that read a folder, given its ``adapter_config.json``; None for LoRA and unknown types."""
    if bitfit.reads(config):
        return bitfit
    match config.get("peft_type"):
        case bottleneck.PEFT_TYPE:
            return bottleneck
        case ia3.PEFT_TYPE:
            return ia3
        case str(method) if method in METHODS:
            return peft_bridge
        case "PREFIX_TUNING":
            return prefix
        case "PROMPT_TUNING" | "P_TUNING":
            return prompt
        case _:
            return None


def require_shardable(adapter: AdapterConfig) -> None:
    """Refuses an adapter whose layers read what other layers own.

    Raises:
        AdapterError: The adapter cannot be sharded among ranks.
    """
    method = METHODS.get(adapter.method) if isinstance(adapter, PeftAdapter) else None
    if method is not None and (method.shares or method.reads == "values"):
        raise AdapterError(
            f"The layers of PEFT's {getattr(adapter, 'method', '')} read what other modules own, so they cannot be "
            "sharded.",
            where="adapter.method, parallel.kind",
            fix="--parallel.kind=ddp",
        )


def module_prefix(adapter: Adapter) -> str:
    """Returns what PEFT puts before the path of a module that is trained in full; virtual tokens wrap no model."""
    return "base_model." if isinstance(adapter, PrefixAdapter | PromptAdapter) else "base_model.model."


def select(model: nn.Module, adapter: AdapterConfig) -> Selection:
    """Returns what an adapter section names in a model; nothing is changed.

    Raises:
        AdapterError: A pattern matches nothing, or nothing is left to adapt.
    """
    if isinstance(adapter, NoAdapter):
        return Selection((), ("",))
    if isinstance(adapter, LowRankAdapter):
        return targets.select(model, adapter.target_modules, adapter.trainable_modules)
    return kind_of(adapter).select(model, adapter)
