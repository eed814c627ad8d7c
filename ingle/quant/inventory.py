"""What a model is made of: bytes per dtype, and packed and trainable parameters per class of module.

Every run prints it, so that a layer that stayed wide, or one that trains unexpectedly, is seen and not guessed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ingle.quant.linear import QuantModule


@dataclass(frozen=True)
class ClassAudit:
    """All modules of one class (and format) together; only what they hold themselves, not what is inside them.

    Attributes:
        class_name: For instance ``QuantLinear``.
        format: Of their packed weights, or None.
        modules: How many.
        parameters: Logical weights: a packed 4-bit weight counts as one.
        quantized: Those of them that are packed.
        trainable: Those of them that get gradients.
        bytes: What they take, scales and buffers included.
    """

    class_name: str
    format: str | None
    modules: int
    parameters: int
    quantized: int
    trainable: int
    bytes: int


@dataclass(frozen=True)
class Unquantized:
    """A matrix that stays in a floating dtype although the model's base is packed.

    Attributes:
        name: Of the module.
        class_name: Its class.
        parameters: Weights in its floating matrices.
        frozen: Whether none of them gets gradients.
    """

    name: str
    class_name: str
    parameters: int
    frozen: bool


@dataclass(frozen=True)
class Audit:
    """What a model is made of; a tensor shared by two modules counts once, where it comes first.

    Attributes:
        bytes_by_dtype: Bytes of parameters and buffers, by torch's name of the dtype.
        classes: Per class of module and format, the largest first.
        unquantized: Floating matrices in a model that also has packed ones; empty if nothing is packed.
        parameters: Logical weights of the whole model.
        quantized: Those of them that are packed.
        trainable: Those of them that get gradients.
        bytes: What parameters and buffers take.
    """

    bytes_by_dtype: dict[str, int]
    classes: tuple[ClassAudit, ...]
    unquantized: tuple[Unquantized, ...]
    parameters: int
    quantized: int
    trainable: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers, for JSON."""
        return asdict(self)


def audit(model: nn.Module) -> Audit:
    """Counts what a model holds; works on the meta device too."""
    seen: set[int] = set()
    by_dtype: Counter[str] = Counter()
    rows: dict[tuple[str, str | None], Counter[str]] = {}
    floating: list[Unquantized] = []
    for name, module in model.named_modules():
        format = module.format.name if isinstance(module, QuantModule) else None
        own = _own_tensors(module, seen)
        if not own:
            continue
        row = rows.setdefault((type(module).__name__, format), Counter())
        row.update(modules=1, **_count(module, own))
        for tensor in own.values():
            by_dtype[str(tensor.dtype).removeprefix("torch.")] += _num_bytes(tensor)
        matrices = [t for t in own.values() if isinstance(t, nn.Parameter) and t.is_floating_point() and t.dim() >= 2]
        if matrices:
            frozen = not any(matrix.requires_grad for matrix in matrices)
            floating.append(Unquantized(name, type(module).__name__, sum(m.numel() for m in matrices), frozen))
    classes = [
        ClassAudit(kind, format, **{k: row[k] for k in ("modules", "parameters", "quantized", "trainable", "bytes")})
        for (kind, format), row in rows.items()
    ]
    classes.sort(key=lambda row: -row.bytes)
    quantized = sum(row.quantized for row in classes)
    return Audit(
        bytes_by_dtype=dict(by_dtype.most_common()),
        classes=tuple(classes),
        unquantized=tuple(floating) if quantized else (),
        parameters=sum(row.parameters for row in classes),
        quantized=quantized,
        trainable=sum(row.trainable for row in classes),
        bytes=sum(row.bytes for row in classes),
    )


def _own_tensors(module: nn.Module, seen: set[int]) -> dict[str, Tensor]:
    """The module's direct parameters and buffers that no module before it held."""
    own = {}
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            own[key] = tensor
    return own


def _count(module: nn.Module, own: dict[str, Tensor]) -> dict[str, int]:
    planes = set(module.specs) if isinstance(module, QuantModule) else set()
    quantized = module.num_weights if isinstance(module, QuantModule) and planes & set(own) else 0
    plain = [t for key, t in own.items() if key not in planes and isinstance(t, nn.Parameter)]
    return {
        "parameters": quantized + sum(parameter.numel() for parameter in plain),
        "quantized": quantized,
        "trainable": sum(parameter.numel() for parameter in plain if parameter.requires_grad),
        "bytes": sum(_num_bytes(tensor) for tensor in own.values()),
    }


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
