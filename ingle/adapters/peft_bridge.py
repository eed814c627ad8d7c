"""Methods of the PEFT library, computed by PEFT's own layers over frozen layers of any format.

PEFT builds its layers over a skeleton: a model that has only the layers to change, whose weights take no memory. Each
of PEFT's layers then calls our layer as its base. Saving and loading go through a skeleton too, so that PEFT's own
functions decide what a file has. Merging computes a layer on the unit vectors, which is exact wherever it is linear.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ingle.adapters.linear import AdaptedLinear, cannot_merge
from ingle.adapters.peft_skeleton import OF_FILES, Skeleton, is_transposed, make_config, require_method, stand_in
from ingle.adapters.states import adapted_modules
from ingle.adapters.targets import Selection, linear_layers
from ingle.adapters.targets import select as select_linears
from ingle.config.adapter_kinds import PeftAdapter
from ingle.config.peft_methods import METHODS
from ingle.errors import AdapterError
from ingle.parallel import Mesh, compute_device, copy_rows
from ingle.quant.conversion import is_conv1d
from ingle.quant.linear import QuantLinear
from ingle.wording import some


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
        probe = torch.randn(3, self.in_features, generator=torch.Generator().manual_seed(0)).to(weight_OI.device)
        base = self.tuner.__dict__["base_layer"]
        try:
            self.tuner.__dict__["base_layer"] = stand_in(self.base, weight_OI)
            once, twice, offset = (self.tuner(factor * probe) for factor in (1.0, 2.0, 0.0))
            merged_IO: Tensor = self.tuner(torch.eye(self.in_features, device=weight_OI.device)).float()
        finally:
            self.tuner.__dict__["base_layer"] = base
        if offset.abs().max() > 0:
            raise cannot_merge(f"PEFT's {self.method} adds a bias")
        if (twice - 2 * once).abs().max() > 1e-4 * once.abs().max():
            raise cannot_merge(f"PEFT's {self.method} is not linear in its inputs")
        return merged_IO.t().contiguous()


def select(model: nn.Module, adapter: PeftAdapter) -> Selection:
    """Returns the layers to change; see :class:`ingle.adapters.kinds.Kind`.

    Raises:
        AdapterError: A pattern matches nothing, or the method reads weights that are quantized.
    """
    require_method(adapter.method)
    option = "adapter.target_modules"
    targets: Any = adapter.target_modules
    if "target_modules" in adapter.options:
        option, targets = "adapter.options.target_modules", adapter.options["target_modules"]
    if isinstance(targets, str) and targets != "all-linear":  # PEFT takes a text as a regular expression
        targets = tuple(path for path in linear_layers(model) if re.fullmatch(targets, path))
        if not targets:
            raise AdapterError("The regular expression matches no linear layer.", where=option, fix="list the names")
    elif isinstance(targets, list):
        targets = tuple(map(str, targets))
    found = select_linears(model, targets, adapter.trainable_modules, option=option)
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
    skeleton = Skeleton(bases, adapter)
    for path, base in bases.items():
        layer = PeftLinear(base, skeleton.layer(path), adapter.method)
        model.set_submodule(path, layer.train(base.training))


def start(model: nn.Module, adapter: PeftAdapter, seed: int, mesh: Mesh | None) -> None:
    """Gives parameters and buffers PEFT's initial values, drawn from a seed, and from the weights for some methods."""
    layers = _layers(model)
    reads = METHODS[adapter.method].reads == "values"
    bases = {path: layer.base for path, layer in layers.items()}
    skeleton = Skeleton(bases, adapter, seed=seed, with_weights=reads)
    for path, layer in layers.items():
        device = compute_device(next(layer.base.parameters()))
        for part in layer.tuner.modules():  # parameters are where the layer computes already
            part._buffers.update({key: each.to(device) for key, each in part._buffers.items() if each is not None})
        targets = _tensors(layer.tuner)
        for name, value in _tensors(skeleton.layer(path)).items():
            copy_rows(targets[name], value.detach())


def describe(model: nn.Module, adapter: PeftAdapter) -> dict[str, Any]:
    """Returns the fields of PEFT's config."""
    layers = _layers(model)
    config = make_config(adapter, list(layers)).to_dict()
    shared = {"task_type", "base_model_name_or_path", "inference_mode", "modules_to_save"}
    found = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items() if key not in shared}
    if "fan_in_fan_out" in found:
        found["fan_in_fan_out"] = any(is_transposed(layer.base) for layer in layers.values())
    return found


def to_file(model: nn.Module, adapter: PeftAdapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what PEFT stores of the adapter."""
    layers = _layers(model)
    skeleton = Skeleton({path: layer.base for path, layer in layers.items()}, adapter)
    with torch.no_grad():
        for path, layer in layers.items():
            own = {name: values.get(f"{path}.tuner.{name}", tensor) for name, tensor in _tensors(layer.tuner).items()}
            for name, target in _tensors(skeleton.layer(path)).items():
                if name in own:
                    target.copy_(own[name])
    return skeleton.state()


def from_file(model: nn.Module, adapter: PeftAdapter, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns parameters and buffers by path, as PEFT reads them.

    Raises:
        AdapterError: The file has other layers, or lacks what follows from weights that are not here.
    """
    layers = _layers(model)
    skeleton = Skeleton({path: layer.base for path, layer in layers.items()}, adapter)
    expected = skeleton.state()
    if differing := expected.keys() ^ tensors.keys():
        raise AdapterError(
            "This adapter does not change the same layers of this model.",
            where=where,
            why=f"only in the file or only in the model: {some(differing)}",
            fix="use the base that the adapter was trained on, and the options of adapter that it was trained with",
        )

    if adapter.method == "ADALORA":  # PEFT leaves out what it removed
        tensors = {key: _padded(tensor, expected[key].shape) for key, tensor in tensors.items()}

    def found() -> dict[str, Tensor]:
        return {
            f"{path}.tuner.{name}": value.detach().clone()
            for path, layer in layers.items()
            for name, value in _tensors(skeleton.layer(path)).items()
            if name in _tensors(layer.tuner)
        }

    skeleton.load(tensors, where)
    values = found()
    if METHODS[adapter.method].reads != "values":
        return values
    marked = {key: torch.full_like(tensor, torch.nan) for key, tensor in tensors.items() if tensor.is_floating_point()}
    skeleton.load({**tensors, **marked}, where)
    stored = {path for path, value in found().items() if bool(value.isnan().all()) or not value.is_floating_point()}
    if stored < values.keys() and any(parameter.is_meta for parameter in model.parameters()):
        raise AdapterError(
            f"An adapter of PEFT's {adapter.method} cannot be merged weight by weight.",
            where=where,
            why="parts of it follow from the weights of the base, and the file does not have them",
            fix="--to peft exports the adapter alone",
        )
    return {path: value for path, value in values.items() if path in stored}


def read(config: Mapping[str, Any], folder: Path) -> PeftAdapter:
    """Returns the section of an adapter that PEFT trained.

    Raises:
        AdapterError: It chooses its layers otherwise than by their names, or PEFT refuses its options.
    """
    method = str(config["peft_type"])
    for key in ("exclude_modules", "layers_to_transform"):
        if config.get(key):
            raise AdapterError(
                f"This adapter uses {key}, which is not supported.",
                where=f"{folder / 'adapter_config.json'}: {key}",
                fix="list the layers in target_modules",
            )
    # Of AdaLoRA, the ranks follow from the tensors.
    unused = {*OF_FILES, "rank_pattern"} if method == "ADALORA" else OF_FILES
    options = {key: value for key, value in config.items() if key not in unused and value is not None}
    if (targets := config.get("target_modules")) is not None:
        options["target_modules"] = targets
    section = PeftAdapter(
        kind="peft",
        method=method,
        options=options,
        trainable_modules=tuple(config.get("modules_to_save") or ()),
    )
    make_config(section, ["a"])
    return section


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Returns a tensor with zeros for the directions that it lacks."""
    if tensor.dim() != len(shape) or any(own > wanted for own, wanted in zip(tensor.shape, shape, strict=True)):
        return tensor
    found = tensor.new_zeros(shape)
    found[tuple(slice(size) for size in tensor.shape)] = tensor
    return found


def _tensors(tuner: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers of a layer of PEFT, without those of its base."""
    named = (*tuner.named_parameters(remove_duplicate=False), *tuner.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in named if not name.startswith("base_layer.")}


def _layers(model: nn.Module) -> dict[str, PeftLinear]:
    return {path: each for path, each in adapted_modules(model).items() if isinstance(each, PeftLinear)}
