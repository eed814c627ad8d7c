"""PEFT's layers over layers that have shapes only: what Ingle uses of the PEFT library.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ingle.adapters.linear import features
from ingle.config.adapter_kinds import PeftAdapter
from ingle.config.peft_methods import METHODS, REFUSED
from ingle.errors import AdapterError, DependencyError
from ingle.quant.conversion import is_conv1d
from ingle.wording import nearest, some

NAME = "default"
#: PEFT's options that sections of Ingle have under other names, with these names.
_ELSEWHERE = {
    **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"), "adapter.target_modules"),
    "modules_to_save": "adapter.trainable_modules",
    "base_model_name_or_path": "model.id",
    "revision": "model.revision",
    "peft_type": "adapter.method",
    "task_type": "objective.kind",
}
#: Fields of a file that are no options of a method.
OF_FILES = {*_ELSEWHERE, "auto_mapping", "inference_mode", "peft_version", "target_modules"}


class Skeleton:
    """A model of the layers to change alone, with PEFT's layers in their places.

    Args:
        bases: The layers by path.
        adapter: The section.
        seed: Seed of what PEFT draws.
        with_weights: Whether the layers have copies of the weights, instead of zeros without memory.
    """

    def __init__(
        self, bases: Mapping[str, nn.Module], adapter: PeftAdapter, *, seed: int = 0, with_weights: bool = False
    ) -> None:
        peft = _import_peft()
        model = nn.Module()
        for path, base in bases.items():
            holder = model
            *parents, last = path.split(".")
            for part in parents:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder._modules[part]  # type: ignore[assignment]
            weight_OI = None
            if with_weights:
                weight = base.get_parameter("weight").detach()
                weight_OI = (weight.t() if is_conv1d(base) else weight).float().cpu().clone()
            holder.add_module(last, stand_in(base, weight_OI))
        digest = hashlib.blake2b(f"{seed}.{adapter.method}".encode(), digest_size=8).digest()
        config = make_config(adapter, list(bases))
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern options that a skeleton does not have
            torch.manual_seed(int.from_bytes(digest, "little") >> 1)
            try:
                self._peft: Any = peft.get_peft_model(model, config)
            except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError, AssertionError) as error:
                raise AdapterError(
                    f"PEFT cannot change these layers with {adapter.method}.",
                    where="adapter.options",
                    why=str(error)[:300],
                    fix="change adapter.options, or name other layers in adapter.target_modules",
                ) from None
        self._functions = peft

    def layer(self, path: str) -> nn.Module:
        """Returns PEFT's layer."""
        found: nn.Module = self._peft.base_model.model.get_submodule(path)
        return found

    def state(self) -> dict[str, Tensor]:
        """Returns what PEFT stores."""
        found: dict[str, Tensor] = self._functions.get_peft_model_state_dict(self._peft)
        return {key: tensor.detach() for key, tensor in found.items()}

    def load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Reads what PEFT stored.

        Raises:
            AdapterError: PEFT cannot read it.
        """
        try:
            result = self._functions.set_peft_model_state_dict(self._peft, dict(tensors))
        except (RuntimeError, ValueError, KeyError) as error:
            raise AdapterError("PEFT cannot read this adapter.", where=where, why=str(error)[:300]) from None
        if result.unexpected_keys:
            raise AdapterError(f"PEFT does not know {some(result.unexpected_keys)}.", where=where)


def stand_in(base: nn.Module, weight_OI: Tensor | None) -> nn.Module:
    """Returns a layer of the same shape without a bias; without a weight, it takes no memory."""
    out_features, in_features = features(base)
    transposed = is_transposed(base)
    layer: Any
    if transposed:
        layer = import_module("peft.tuners.lora.layer").Conv1D(1, 1)  # transformers' class
        layer.nf, layer.nx = out_features, in_features
    else:
        layer = nn.Linear(1, 1, bias=False)
        layer.out_features, layer.in_features = out_features, in_features
    weight_OI = torch.zeros(1).expand(out_features, in_features) if weight_OI is None else weight_OI
    layer.weight = nn.Parameter(weight_OI.t() if transposed else weight_OI, requires_grad=False)
    layer.bias = None
    if transposed:  # this class has no layers without one
        layer.bias = nn.Parameter(torch.zeros(out_features, device=weight_OI.device), requires_grad=False)
    found: nn.Module = layer
    return found


def make_config(adapter: PeftAdapter, paths: list[str]) -> Any:
    """Returns PEFT's config of a method.

    Raises:
        AdapterError: An option is not known, or has a value that PEFT refuses.
    """
    peft = _import_peft()
    require_method(adapter.method)
    known: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(adapter.method)
    if known is None:
        raise AdapterError(
            f"The installed PEFT {peft.__version__} has no {adapter.method}.",
            where="adapter.method",
            fix="install a newer version of peft, or use another method",
        )
    fields = {each.name for each in dataclasses.fields(known)}
    options = {key: value for key, value in adapter.options.items() if key != "target_modules"}
    if adapter.method == "ADALORA":  # the steps of a run are not known when its adapter is counted
        options = {"total_step": 1_000_000, **options}
    for key in options:
        if key in _ELSEWHERE or (key == "bias" and options[key] != "none"):
            raise AdapterError(
                f"{key} is not an option of PEFT's methods here.",
                where=f"adapter.options.{key}",
                fix=f"use {_ELSEWHERE.get(key, '--adapter.kind=bitfit')}",
            )
        if key not in fields:
            close = nearest(key, sorted(fields))
            raise AdapterError(
                f"PEFT's {adapter.method} has no option {key!r}.",
                where=f"adapter.options.{key}",
                why=f"its options are {', '.join(sorted(fields - OF_FILES))}",
                fix=f"did you mean {close}?" if close else None,
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return known(**options, target_modules=paths)
        except (ValueError, TypeError, AttributeError) as error:
            raise AdapterError(
                f"PEFT refuses the options of {adapter.method}.",
                where="adapter.options",
                why=str(error)[:300],
                fix="see the documentation of PEFT",
            ) from None


def require_method(method: str) -> None:
    """Refuses a method that Ingle does not know, or computes otherwise.

    Raises:
        AdapterError: With what to use instead.
    """
    if method in METHODS:
        return
    why, fix = REFUSED.get(method, ("it is not among the methods that Ingle knows", "--adapter.kind=lora"))
    raise AdapterError(f"PEFT's {method} is not used here.", where="adapter.method", why=why, fix=fix)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            "Adapters of kind peft need the PEFT library.", why=str(error), fix="pip install 'ingle[peft]'"
        ) from error
    return peft


def is_transposed(base: nn.Module) -> bool:
    """Returns whether files store a layer's weight as ``[I, O]``."""
    return bool(getattr(base, "transposed", False)) or is_conv1d(base)
