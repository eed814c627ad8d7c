"""IA3: trained factors on the outputs or the inputs of linear layers, saved as PEFT's IA3.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ingle.adapters.kind_tensors import by_name, prefixed
from ingle.adapters.linear import AdaptedLinear
from ingle.adapters.states import adapted_modules
from ingle.adapters.sublayers import find_sublayers
from ingle.adapters.targets import Selection, linear_layers
from ingle.adapters.targets import select as select_linears
from ingle.config.adapter_kinds import Ia3Adapter
from ingle.errors import AdapterError
from ingle.parallel import Mesh, local
from ingle.planning.selection import matches
from ingle.quant.conversion import is_conv1d

PEFT_TYPE = "IA3"
#: Names of the projections of keys and values, and of those that compute queries too.
_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k", "v", "key_proj", "value_proj", "k_lin", "v_lin")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj")


class ScaledLinear(AdaptedLinear):
    """``l * (x W^T + b)``, or ``(l * x) W^T + b``.

    Args:
        base: A linear layer.
        scales_inputs: Whether the factors are on the inputs.

    Attributes:
        ia3_l: The factors, float32: ``[I]`` on inputs, ``[O]`` on outputs.
    """

    def __init__(self, base: nn.Module, scales_inputs: bool) -> None:
        super().__init__(base)
        self.scales_inputs = scales_inputs
        size = self.in_features if scales_inputs else self.out_features
        self.ia3_l = nn.Parameter(torch.ones(size, dtype=torch.float32, device=self.own_device()))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., I]`` to ``[..., O]``."""
        x = x.to(self.product_dtype(x))
        if self.is_on and self.scales_inputs:
            x = x * self.ia3_l.to(x.dtype)
        output: Tensor = self.base(x)
        return output * self.ia3_l.to(output.dtype) if self.is_on and not self.scales_inputs else output

    def merge(self, weight_OI: Tensor) -> Tensor:
        """Returns the weight with the factors, given that of the base, float32."""
        factors = self.ia3_l.detach()
        return weight_OI * (factors if self.scales_inputs else factors[:, None])

    def merge_bias(self, bias_O: Tensor) -> Tensor:
        """Returns the bias with the factors, given that of the base."""
        return bias_O if self.scales_inputs else bias_O * self.ia3_l.detach()

    def is_changed(self) -> bool:
        """Returns whether a factor is not 1."""
        return not bool((self.ia3_l == 1).all())


def select(model: nn.Module, adapter: Ia3Adapter) -> Selection:
    """Returns the layers to scale; see :class:`ingle.adapters.kinds.Kind`."""
    return select_linears(model, adapter.target_modules or _default_targets(model), adapter.trainable_modules)


def insert(model: nn.Module, adapter: Ia3Adapter, selection: Selection) -> None:
    """Wraps the layers.

    Raises:
        AdapterError: A pattern of ``feedforward_modules`` matches none of them.
    """
    inputs = adapter.feedforward_modules
    if inputs is None:
        inputs = _outputs_of_mlps(model)
    elif unused := [each for each in inputs if not any(matches(path, each) for path in selection.adapted)]:
        raise AdapterError(
            f"{unused[0]!r} matches no layer that adapter.target_modules names.",
            where="adapter.feedforward_modules",
            why=f"they end in {', '.join(sorted({path.rpartition('.')[2] for path in selection.adapted}))}",
            fix="name it in adapter.target_modules too",
        )
    for path in selection.adapted:
        base = model.get_submodule(path)
        layer = ScaledLinear(base, any(matches(path, pattern) for pattern in inputs))
        model.set_submodule(path, layer.train(base.training))


def start(model: nn.Module, adapter: Ia3Adapter, seed: int, mesh: Mesh | None) -> None:
    """Sets all factors to 1."""
    with torch.no_grad():
        for layer in _layers(model).values():
            local(layer.ia3_l).fill_(1.0)


def describe(model: nn.Module, adapter: Ia3Adapter) -> dict[str, Any]:
    """Returns the fields of PEFT's ``IA3Config``."""
    layers = _layers(model)
    return {
        "peft_type": PEFT_TYPE,
        "target_modules": sorted(layers),
        "feedforward_modules": sorted(path for path, layer in layers.items() if layer.scales_inputs),
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "init_ia3_weights": True,
    }


def to_file(model: nn.Module, adapter: Ia3Adapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the factors as PEFT stores them: ``[1, I]`` or ``[O, 1]``."""
    layers = _layers(model)
    return {
        key: values[path].reshape((1, -1) if layers[path.removesuffix(".ia3_l")].scales_inputs else (-1, 1))
        for path, key in _names(model).items()
    }


def from_file(model: nn.Module, adapter: Ia3Adapter, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the parameters by path."""
    flat = {key.removesuffix(".default"): tensor.reshape(-1) for key, tensor in tensors.items()}
    return by_name(flat, _names(model), where)


def read(config: Mapping[str, Any], folder: Path) -> Ia3Adapter:
    """Returns the section of an adapter that PEFT trained.

    Raises:
        AdapterError: Its layers are not listed by name.
    """
    targets, inputs = config.get("target_modules"), config.get("feedforward_modules")
    if not isinstance(targets, list) or not isinstance(inputs or [], list) or config.get("exclude_modules"):
        raise AdapterError(
            "The layers of this adapter are not listed by name.",
            where=f"{folder / 'adapter_config.json'}: target_modules, feedforward_modules, exclude_modules",
            why="Ingle reads lists of names, not regular expressions",
            fix="list the names of the layers",
        )
    return Ia3Adapter(
        kind="ia3",
        target_modules=tuple(targets),
        feedforward_modules=tuple(inputs or ()),
        trainable_modules=tuple(config.get("modules_to_save") or ()),
    )


def _default_targets(model: nn.Module) -> tuple[str, ...]:
    names = {path.rpartition(".")[2] for path in linear_layers(model)}
    own = tuple(name for name in _KEYS_AND_VALUES if name in names) or tuple(name for name in _FUSED if name in names)
    targets = (*own, *_outputs_of_mlps(model))
    if not own or not targets:
        raise AdapterError(
            "The layers to scale are not known for this architecture.",
            where="adapter.target_modules",
            why=f"its linear layers are {', '.join(sorted(names))}",
            fix="name those of keys and values, and in adapter.feedforward_modules the output of the MLP",
        )
    return targets


def _outputs_of_mlps(model: nn.Module) -> tuple[str, ...]:
    return tuple(each.output for each in find_sublayers(model) if each.kind == "mlp")


def _layers(model: nn.Module) -> dict[str, ScaledLinear]:
    return {path: each for path, each in adapted_modules(model).items() if isinstance(each, ScaledLinear)}


def _names(model: nn.Module) -> dict[str, str]:
    return prefixed(f"{path}.ia3_l" for path in _layers(model))
