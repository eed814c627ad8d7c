"""Methods of the PEFT library, computed by PEFT's own layers over frozen layers of any format.

PEFT builds its layers over a skeleton: a model that has only the layers to change, whose weights take no memory. Each
of PEFT's layers then calls our layer as its base. Saving and loading go through a skeleton too, so that PEFT's own
functions decide what a file has. Merging computes a layer on the unit vectors, which is exact wherever it is linear.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ingle.adapters.linear import AdaptedLinear, cannot_merge, features
from ingle.adapters.peft_tensors import PREFIX
from ingle.adapters.states import adapted_modules
from ingle.adapters.targets import Selection, linear_layers
from ingle.adapters.targets import select as select_linears
from ingle.config.adapter_kinds import PeftAdapter
from ingle.config.peft_methods import METHODS, REFUSED
from ingle.errors import AdapterError, DependencyError
from ingle.parallel import Mesh, copy_rows
from ingle.quant.conversion import is_conv1d
from ingle.quant.linear import QuantLinear
from ingle.wording import nearest, some

_NAME = "default"
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
_OF_FILES = {*_ELSEWHERE, "auto_mapping", "inference_mode", "peft_version", "target_modules"}


class _Base:
    """What a layer of PEFT calls as its base, and asks for the shape and dtype of its weight."""

    def __init__(self, layer: PeftLinear) -> None:
        self._layer = layer
        self.out_features, self.in_features = layer.out_features, layer.in_features

    @property
    def weight(self) -> Tensor:
        like = self._layer.base
        dtype = like.weight_dtype if isinstance(like, QuantLinear) else self._layer.weight.dtype
        device = next(like.parameters()).device
        shape = (self.in_features, self.out_features) if is_conv1d(like) else (self.out_features, self.in_features)
        return torch.zeros(1, dtype=dtype, device=device).expand(shape)

    @property
    def bias(self) -> Tensor | None:
        return self._layer.bias

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self._layer.base(x.to(self._layer.product_dtype(x)))
        return output


class PeftLinear(AdaptedLinear):
    """A linear layer that one of PEFT's layers changes.

    Args:
        base: The frozen layer.
        tuner: PEFT's layer, over a layer of a skeleton.
        method: PEFT's name of the method.

    Attributes:
        tuner: PEFT's layer.
        method: PEFT's name of the method.
    """

    def __init__(self, base: nn.Module, tuner: nn.Module, method: str) -> None:
        super().__init__(base)
        self.method = method
        del tuner._modules["base_layer"]
        # It is registered in this layer already.
        tuner.__dict__["base_layer"] = base if METHODS[method].reads == "values" else _Base(self)
        self.tuner = tuner
        self.starts_at_base = not METHODS[method].starts_elsewhere

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., I]`` to ``[..., O]``."""
        if not self.is_on:
            plain: Tensor = self.base(x.to(self.product_dtype(x)))
            return plain
        output: Tensor = self.tuner(x)
        return output.to(self.product_dtype(x))

    def is_changed(self) -> bool:
        """Returns whether the adapter may change the weight."""
        return True

    @torch.no_grad()
    def merge(self, weight_OI: Tensor) -> Tensor:
        """Returns the weight with the adapter, given that of the base, float32.

        Raises:
            AdapterError: The layer is not linear in its inputs, or adds a bias that the base does not have.
        """
        self.eval()
        probe = torch.randn(3, self.in_features, generator=torch.Generator().manual_seed(0))
        probe = torch.cat([probe, 2 * probe, torch.zeros(1, self.in_features)]).to(weight_OI.device)
        base = self.tuner.__dict__["base_layer"]
        try:
            self.tuner.__dict__["base_layer"] = _stand_in(self.base, weight_OI)
            found = self.tuner(probe)
            merged = self.tuner(torch.eye(self.in_features, device=weight_OI.device)).float().t().contiguous()
        finally:
            self.tuner.__dict__["base_layer"] = base
        if (found[3:6] - 2 * found[:3]).abs().max() > 1e-4 * found.abs().max():
            raise cannot_merge(f"PEFT's {self.method} is not linear in its inputs")
        if found[6].abs().max() > 0:
            raise cannot_merge(f"PEFT's {self.method} adds a bias")
        return merged


def select(model: nn.Module, adapter: PeftAdapter) -> Selection:
    """Returns the layers to change; see :class:`ingle.adapters.kinds.Kind`."""
    _require_method(adapter.method)
    option, targets = "adapter.target_modules", adapter.options.get("target_modules", adapter.target_modules)
    if targets is not adapter.target_modules:
        option = "adapter.options.target_modules"
    if isinstance(targets, str) and targets != "all-linear":  # PEFT takes a text as a regular expression
        targets = tuple(path for path in linear_layers(model) if re.fullmatch(targets, path))
        if not targets:
            raise AdapterError("The regular expression matches no linear layer.", where=option, fix="list the names")
    elif isinstance(targets, list):
        targets = tuple(map(str, targets))
    found = select_linears(model, targets, adapter.trainable_modules, option=option)  # type: ignore[arg-type]
    if METHODS[adapter.method].reads == "values":
        bases = ((path, model.get_submodule(path)) for path in found.adapted)
        quantized = [p for p, m in bases if isinstance(getattr(m, "base", m), QuantLinear)]
        if quantized:
            raise AdapterError(
                f"PEFT's {adapter.method} reads the weights of the layers that it changes, and {quantized[0]} is "
                "quantized.",
                where="adapter.method",
                fix="--base.format=none, or another method (OFT)",
            )
    return found


def insert(model: nn.Module, adapter: PeftAdapter, selection: Selection) -> None:
    """Puts PEFT's layers over ours."""
    bases = {path: model.get_submodule(path) for path in selection.adapted}
    skeleton = _Skeleton(bases, adapter)
    for path, base in bases.items():
        layer = PeftLinear(base, skeleton.layer(path), adapter.method)
        model.set_submodule(path, layer.train(base.training))


def start(model: nn.Module, adapter: PeftAdapter, seed: int, mesh: Mesh | None) -> None:
    """Gives parameters and buffers PEFT's initial values, drawn from a seed, and from the weights for some methods."""
    layers = _layers(model)
    reads = METHODS[adapter.method].reads == "values"
    bases = {path: layer.base for path, layer in layers.items()}
    skeleton = _Skeleton(bases, adapter, seed=seed, with_weights=reads)
    for path, layer in layers.items():
        layer.tuner.to(layer.own_device())
        targets = _tensors(layer.tuner)
        for name, value in _tensors(skeleton.layer(path)).items():
            copy_rows(targets[name], value.detach())


def describe(model: nn.Module, adapter: PeftAdapter) -> dict[str, Any]:
    """Returns the fields of PEFT's config."""
    layers = _layers(model)
    config = _make_config(adapter, list(layers)).to_dict()
    shared = {"task_type", "base_model_name_or_path", "inference_mode", "modules_to_save"}
    found = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items() if key not in shared}
    if "fan_in_fan_out" in found:
        found["fan_in_fan_out"] = any(_is_transposed(layer.base) for layer in layers.values())
    return found


def to_file(model: nn.Module, adapter: PeftAdapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what PEFT stores of the adapter."""
    layers = _layers(model)
    skeleton = _Skeleton({path: layer.base for path, layer in layers.items()}, adapter)
    with torch.no_grad():
        for path, layer in layers.items():
            own = {name: values.get(f"{path}.tuner.{name}", tensor) for name, tensor in _tensors(layer.tuner).items()}
            for name, target in _tensors(skeleton.layer(path)).items():
                if name in own:
                    target.copy_(own[name])
    return skeleton.state()


def from_file(model: nn.Module, adapter: PeftAdapter, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns parameters and buffers by path, as PEFT reads them."""
    layers = _layers(model)
    skeleton = _Skeleton({path: layer.base for path, layer in layers.items()}, adapter)
    expected = skeleton.state()
    if differing := expected.keys() ^ tensors.keys():
        raise AdapterError(
            "This adapter does not change the same layers of this model.",
            where=where,
            why=f"only in the file or only in the model: {some(differing)}",
            fix="use the base that the adapter was trained on, and the options of adapter that it was trained with",
        )
    skeleton.load(tensors, where)
    values = {
        f"{path}.tuner.{name}": value
        for path, layer in layers.items()
        for name, value in _tensors(skeleton.layer(path)).items()
        if name in _tensors(layer.tuner)
    }
    if METHODS[adapter.method].reads != "values":
        return values
    stored = {f"{PREFIX}{name}".replace(".tuner.", ".").replace(f".{_NAME}", ""): name for name in values}
    derived = set(values) - {stored[key] for key in tensors if key in stored}
    if derived and any(parameter.is_meta for parameter in model.parameters()):
        raise AdapterError(
            f"An adapter of PEFT's {adapter.method} cannot be merged weight by weight.",
            where=where,
            why="parts of it follow from the weights of the base, and the file does not have them",
            fix="--to peft exports the adapter alone",
        )
    return {name: value for name, value in values.items() if name not in derived}


def read(config: Mapping[str, Any], folder: Path) -> PeftAdapter:
    """Returns the section of an adapter that PEFT trained."""
    method = str(config["peft_type"])
    for key in ("exclude_modules", "layers_to_transform"):
        if config.get(key):
            raise AdapterError(
                f"This adapter uses {key}, which is not supported.",
                where=f"{folder / 'adapter_config.json'}: {key}",
                fix="list the layers in target_modules",
            )
    options = {key: value for key, value in config.items() if key not in _OF_FILES and value is not None}
    if (targets := config.get("target_modules")) is not None:
        options["target_modules"] = targets
    section = PeftAdapter(
        kind="peft",
        method=method,
        options=options,
        trainable_modules=tuple(config.get("modules_to_save") or ()),
    )
    _make_config(section, ["a"])
    return section


class _Skeleton:
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
            holder.add_module(last, _stand_in(base, weight_OI))
        digest = hashlib.blake2b(f"{seed}.{adapter.method}".encode(), digest_size=8).digest()
        config = _make_config(adapter, list(bases))
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
        """Reads what PEFT stored."""
        try:
            result = self._functions.set_peft_model_state_dict(self._peft, dict(tensors))
        except (RuntimeError, ValueError, KeyError) as error:
            raise AdapterError("PEFT cannot read this adapter.", where=where, why=str(error)[:300]) from None
        if result.unexpected_keys:
            raise AdapterError(f"PEFT does not know {some(result.unexpected_keys)}.", where=where)


def _stand_in(base: nn.Module, weight_OI: Tensor | None) -> nn.Module:
    """Returns a layer of the same shape without a bias; without a weight, it takes no memory."""
    out_features, in_features = features(base)
    transposed = _is_transposed(base)
    if transposed:
        from peft.tuners.lora.layer import Conv1D  # transformers' class

        layer: nn.Module = Conv1D(1, 1)
        layer.nf, layer.nx = out_features, in_features
    else:
        layer = nn.Linear(1, 1, bias=False)
        layer.out_features, layer.in_features = out_features, in_features
    weight_OI = torch.zeros(1).expand(out_features, in_features) if weight_OI is None else weight_OI
    layer.weight = nn.Parameter(weight_OI.t() if transposed else weight_OI, requires_grad=False)
    layer.bias = None
    if transposed:  # this class has no layers without one
        layer.bias = nn.Parameter(torch.zeros(out_features, device=weight_OI.device), requires_grad=False)
    return layer


def _make_config(adapter: PeftAdapter, paths: list[str]) -> Any:
    """Returns PEFT's config of a method.

    Raises:
        AdapterError: An option is not known, or has a value that PEFT refuses.
    """
    peft = _import_peft()
    _require_method(adapter.method)
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
                why=f"its options are {', '.join(sorted(fields - _OF_FILES))}",
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


def _require_method(method: str) -> None:
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


def _is_transposed(base: nn.Module) -> bool:
    return bool(getattr(base, "transposed", False)) or is_conv1d(base)


def _tensors(tuner: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers of a layer of PEFT, without those of its base."""
    named = (*tuner.named_parameters(remove_duplicate=False), *tuner.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in named if not name.startswith("base_layer.")}


def _layers(model: nn.Module) -> dict[str, PeftLinear]:
    return {path: each for path, each in adapted_modules(model).items() if isinstance(each, PeftLinear)}
