"""Counts the shapes of a model for the planner."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ingle.adapters import Selection
from ingle.models import Model, layer_uses, task_of
from ingle.planning import LayerShape, LinearShape, ModelShape
from ingle.planning.architecture import group_layers
from ingle.planning.families import FUSED, HEADS, Settings, mixer_of
from ingle.quant import Formats
from ingle.quant.conversion import is_conv1d
from ingle.quant.experts import PROJECTIONS, is_experts, projection_shapes
from ingle.quant.task_heads import is_in_head, task_heads


def model_shape(model: Model, trained: Selection, formats: Formats | None = None) -> ModelShape:
    """Counts the shapes of a model before its linear layers are replaced.

    A fused expert parameter ``[experts, out, in]`` counts as ``experts`` linear layers, of which each token uses
    ``num_experts_per_tok``.

    Args:
        model: The model; it may be on the meta device.
        trained: Which of its modules get an adapter, and which are trained in full.
        formats: Chooses the format of each linear layer, if they may differ.
    """
    embedding: Any = model.get_input_embeddings()
    settings = {"hidden_size": embedding.weight.shape[1], **_settings(model)}
    counter = _Counter(model, trained, formats, int(settings.get("num_experts_per_tok") or 1))
    stack = layer_uses(model)
    layers = [counter.layer(layer, settings, index, uses) for index, (layer, uses) in enumerate(stack.items())]
    head: Any = model.get_output_embeddings()
    is_task = bool(task_heads(model))
    tied = head is not None and head.weight is embedding.weight
    inside = {id(module) for layer in stack for module in layer.modules()}
    outer = [
        lin
        for name, module in model.named_modules()
        if id(module) not in inside and module is not head and module is not embedding
        for lin in counter.linears(module, name, name)
    ]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    learned = [
        m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Embedding) and _is_learned(name)
    ]
    in_embeddings = embedding.weight.numel() + sum(learned)
    in_head = 0 if tied or is_task else sum(parameter.numel() for parameter in head.parameters())
    counted = sum(layer.num_parameters for layer in layers) + sum(lin.num_weights * lin.count for lin in outer)
    return ModelShape(
        layers=group_layers(layers),
        hidden_size=embedding.weight.shape[1],
        vocab_size=task_of(model).num_outputs if is_task else head.weight.shape[0],
        embedding_parameters=in_embeddings,
        head_parameters=in_head,
        final_parameters=num_parameters - counted - in_embeddings - in_head,
        outer_linears=tuple(outer),
        saved_parameters=_count_parameters(model, trained.modules_to_save),
        tied=tied,
        model_type=str(settings.get("model_type", "")),
        positions="learned" if learned else "rotary",
        max_positions=Settings(settings).size("max_position_embeddings", "n_positions", default=0),
        fused=settings.get("model_type") in FUSED,
    )


def _settings(model: Model) -> dict[str, Any]:
    """Returns the content of a config under the names that architectures share (DistilBERT: ``n_heads``, ``dim``)."""
    config = model.config.get_text_config()
    shared = {name: getattr(config, name, None) for name in config.attribute_map}
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    named = given | {name: value for name, value in shared.items() if isinstance(value, int)}
    heads = named.get("num_attention_heads") or next((named[name] for name in HEADS if named.get(name)), 1)
    return named | {"num_attention_heads": heads}  # 1 where no layer attends, as in Mamba


class _Counter:
    """Counts linear layers of modules."""

    def __init__(self, model: nn.Module, trained: Selection, formats: Formats | None, experts_per_token: int) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._adapted = set(trained.adapted)
        self._model = model
        self._formats = formats
        self._experts_per_token = experts_per_token

    def layer(self, layer: nn.Module, settings: dict[str, Any], index: int, uses: int = 1) -> LayerShape:
        """Returns the shape of a layer."""
        linears = tuple(
            lin for name, module in layer.named_modules() for lin in self.linears(module, self._names[id(module)], name)
        )
        experts = next((module for module in layer.modules() if is_experts(module)), None)
        weights = sum(lin.num_weights * lin.count for lin in linears)
        norms = [type(module).__name__ for module in layer.children() if "norm" in type(module).__name__.lower()]
        mixer, window = mixer_of(settings, index)
        found = Settings(settings)
        return LayerShape(
            linears,
            other_parameters=sum(parameter.numel() for parameter in layer.parameters()) - weights,
            mixer="recurrent" if any(isinstance(module, nn.Conv1d) for module in layer.modules()) else mixer,
            num_heads=found.heads,
            num_kv_heads=found.kv_heads,
            head_dim=found.head_dim,
            window=window,
            num_norms=len(norms),
            head_norms=any(name.endswith("q_norm") for name, _ in layer.named_modules()),
            norm="rms" if all("RMS" in name for name in norms) else "layer",
            activation=found.activation,
            gated=any(re.search(r"(gate|gate_up)_proj$", lin.name) for lin in linears),
            num_experts=int(getattr(experts, "num_experts", 0)),
            experts_per_token=self._experts_per_token if experts is not None else 0,
            uses=uses,
        )

    def linears(self, module: nn.Module, path: str, name: str) -> list[LinearShape]:
        """Returns the shapes of a linear module, or of the projections of fused experts; none of another module.

        Args:
            module: The module.
            path: Its path in the model.
            name: Its path in its layer.
        """
        if isinstance(module, nn.Linear) or is_conv1d(module):
            weight = module.get_parameter("weight")
            out_features, in_features = weight.shape[::-1] if is_conv1d(module) else weight.shape
            bits = None if self._formats is None else _bits(self._formats, path, weight, out_features, in_features)
            if is_in_head(self._model, path):
                bits = 8.0 * weight.element_size()  # never quantized
            has_bias = module._parameters.get("bias") is not None
            adapted = int(path in self._adapted)
            return [LinearShape(in_features, out_features, 1, 1, adapted, bits, name, has_bias)]
        shapes = []
        for key, stacked in module._parameters.items():
            if stacked is not None and stacked.dim() == 3 and key in PROJECTIONS and not isinstance(module, nn.Conv1d):
                out_features, in_features = projection_shapes(module)[key]
                own = f"{path}.{key}"
                bits = None if self._formats is None else _bits(self._formats, own, stacked, out_features, in_features)
                count = stacked.shape[0]
                active = min(self._experts_per_token, count)
                shapes.append(LinearShape(in_features, out_features, count, active, 0, bits, f"{name}.{key}"))
        return shapes


def _is_learned(path: str) -> bool:
    """Returns whether an embedding is one of positions."""
    return "position" in path or path.endswith("wpe")


def _bits(formats: Formats, name: str, weight: Tensor, out_features: int, in_features: int) -> float:
    """Returns the bits per weight of a module in its format."""
    format = formats(name, out_features, in_features)
    if format is None:
        return 8.0 * weight.element_size()
    num_bytes = sum(spec.num_bytes for spec in format.plane_specs(out_features, in_features).values())
    return 8 * num_bytes / (out_features * in_features)


def _count_parameters(model: Model, paths: Iterable[str]) -> int:
    """Counts the parameters of modules; shared ones once."""
    parameters = {id(p): p.numel() for path in paths for p in model.get_submodule(path).parameters()}
    return sum(parameters.values())
