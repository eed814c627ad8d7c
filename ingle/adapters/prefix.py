"""Prefix tuning: trained keys and values in every attention layer, in PEFT's layout.

The functions are those of :class:`ingle.adapters.kinds.Kind`.

Legend: P virtual tokens, L layers, Hkv key/value heads, Dh head size, T = Hkv * Dh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ingle.adapters.lora import generator_of
from ingle.adapters.prompt import read_virtual, sizes_of
from ingle.adapters.targets import Selection, trained_in_full
from ingle.adapters.virtual_tokens import (
    KEYS,
    TENSOR,
    PrefixEncoder,
    VirtualKeys,
    add_keys,
    find_keys,
    only_tensor,
    text_error,
)
from ingle.config.adapter_kinds import PrefixAdapter
from ingle.errors import AdapterError
from ingle.parallel import Mesh, copy_rows


def select(model: nn.Module, adapter: PrefixAdapter) -> Selection:
    """Returns the attention layers, which all get keys.

    Raises:
        AdapterError: The architecture has other layers that mix tokens.
    """
    found: tuple[str, ...] | str = getattr(model, "takes_keys", "it was not built by Ingle")
    if isinstance(found, str):
        raise AdapterError(
            f"{type(model).__name__} cannot have trained keys in every layer.",
            where="adapter.kind = prefix",
            why=found,
            fix="--adapter.kind=prompt",
        )
    return Selection(found, trained_in_full(model, adapter.trainable_modules))


def insert(model: nn.Module, adapter: PrefixAdapter, selection: Selection) -> None:
    """Adds keys and values to each layer."""
    heads, size = _head_sizes(model)
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    number, encoder = adapter.num_virtual_tokens, None
    if adapter.encoder == "mlp":
        encoder = PrefixEncoder(number, heads * size, adapter.encoder_hidden_size or heads * size, device)
    for path in selection.adapted:
        add_keys(model, path, VirtualKeys(number, heads, size, encoder=encoder, device=device))


@torch.no_grad()
def start(model: nn.Module, adapter: PrefixAdapter, seed: int, mesh: Mesh | None) -> None:
    """Draws keys and values, or copies those of a text."""
    for path, keys in find_keys(model).items():
        keys.draw(generator_of(seed, path))
        if adapter.path is not None or adapter.init == "random":
            continue
        if adapter.init == "zero_value":
            keys.clear_values()
            continue
        if keys.text is None:
            raise text_error()
        assert keys.keys is not None and keys.values is not None
        for target, value_KPD in zip((keys.keys, keys.values), keys.text, strict=True):
            copy_rows(target, value_KPD.transpose(0, 1).flatten(1).float())
        keys.text = None


def describe(model: nn.Module, adapter: PrefixAdapter) -> dict[str, Any]:
    """Returns PEFT's options."""
    heads, size = _head_sizes(model)
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": adapter.num_virtual_tokens,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "num_layers": sizes_of(model)["num_layers"],
        "num_attention_heads": heads,
        "encoder_hidden_size": adapter.encoder_hidden_size or heads * size,
        "prefix_projection": False,  # the file has the output of the network
    }


def to_file(model: nn.Module, adapter: PrefixAdapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns keys and values of all layers next to each other, ``[P, 2 L T]``."""
    parts: list[Tensor] = []
    for path, keys in find_keys(model).items():
        own = {name: values[f"{path}.{KEYS}.{name}"] for name, _ in keys.named_parameters()}
        parts += (each.transpose(0, 1).flatten(1).detach() for each in functional_call(keys, own, ()))
    return {TENSOR: torch.cat(parts, 1)}


def from_file(model: nn.Module, adapter: PrefixAdapter, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns keys and values of each layer; a network is left out, since only its output was saved.

    Raises:
        AdapterError: The file has other sizes than the model needs.
    """
    layers, whole = find_keys(model), only_tensor(tensors, where)
    heads, size = _head_sizes(model)
    wanted = (adapter.num_virtual_tokens, 2 * len(layers) * heads * size)
    if tuple(whole.shape) != wanted:
        raise AdapterError(
            "The keys and values do not have the sizes of the model.",
            where=where,
            why=f"the file has {list(whole.shape)}, the model needs {list(wanted)}",
            fix="use the base that the adapter was trained on, and its adapter.num_virtual_tokens",
        )
    found: dict[str, Tensor] = {}
    for (path, keys), pair in zip(layers.items(), whole.split(2 * heads * size, 1), strict=True):
        keys.forget_network()
        found |= {f"{path}.{KEYS}.{key}": part for key, part in zip(("keys", "values"), pair.chunk(2, 1), strict=True)}
    return found


def read(config: Mapping[str, Any], folder: Path) -> PrefixAdapter:
    """Returns the section of a folder of PEFT."""
    number, modules = read_virtual(config, folder)
    return PrefixAdapter(kind="prefix", num_virtual_tokens=number, init="random", trainable_modules=modules)


def give_keys(model: nn.Module, keys: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Tells what keys and values begin with, ``[Hkv, P, Dh]`` for each layer; before :func:`start`."""
    for layer, pair in zip(find_keys(model).values(), keys, strict=True):
        layer.text = pair


def _head_sizes(model: nn.Module) -> tuple[int, int]:
    """Returns Hkv and Dh, as PEFT reads them from a config; attention compares them with its own."""
    whole: Any = model
    config = whole.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(getattr(config, "num_key_value_heads", None) or heads), int(size)
