"""Linear layers that an adapter changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ingle.adapters.states import Adapted
from ingle.errors import AdapterError
from ingle.kernels.layers.lora import spread
from ingle.quant.conversion import is_conv1d
from ingle.quant.linear import QuantLinear


class AdaptedLinear(Adapted):
    """A frozen linear layer of any base format with an adapter.

    Args:
        base: An ``nn.Linear``, transformers' ``Conv1D`` or a ``QuantLinear``. It is frozen.

    Attributes:
        out_features: O.
        in_features: I.
        group_size: Number of neighboring inputs that share a change.
    """

    base: nn.Module
    group_size: int = 1

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.out_features, self.in_features = features(base)

    @property
    def unmerged(self) -> str | None:
        """Why the adapter cannot be merged into the weights of the base; None if it can."""
        return None

    def is_changed(self) -> bool:
        """Returns whether the adapter changes what the layer computes."""
        return True

    def merge(self, weight_OI: Tensor) -> Tensor:
        """Returns the weight with the adapter, ``[O, I]`` float32, given that of the base.

        Raises:
            AdapterError: The adapter is no change of a weight.
        """
        raise cannot_merge(self.unmerged or "it changes no weight")

    def merge_bias(self, bias_O: Tensor) -> Tensor:
        """Returns the bias with the adapter, given that of the base."""
        return bias_O

    def spread(self, values: Tensor) -> Tensor:
        """Repeats ``[..., groups]`` to ``[..., in_features]``: each value for all inputs of its group."""
        return spread(values, self.group_size, self.in_features)

    def own_device(self) -> torch.device:
        """Returns the device for the adapter's tensors; they are small, so they are never on the meta device."""
        device = next(self.base.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def weight(self) -> Tensor:
        """The base's weight; some architectures read it from their layers."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the base's weight ``[out_features, in_features]``; the next call, of any layer, may overwrite it."""
        if isinstance(self.base, QuantLinear):
            return self.base.decode(dtype, self.base.scratch(dtype))
        weight = self.weight.detach()
        return (weight.t() if is_conv1d(self.base) else weight).to(dtype)

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """Returns the dtype in which the base multiplies ``x``."""
        return x.dtype if isinstance(self.base, QuantLinear) else self.weight.dtype


def cannot_merge(why: str) -> AdapterError:
    """Returns the error for an adapter that is no change of weights."""
    return AdapterError(
        "This adapter cannot be merged into the weights of the base.",
        where="adapter.kind",
        why=why,
        fix="use it with its base (ingle predict, ingle serve), or train --adapter.kind=lora",
    )


def is_linear(module: nn.Module) -> bool:
    """Returns whether LoRA can adapt a module: an ``nn.Linear``, ``Conv1D`` or ``QuantLinear``.

    A subclass that overrides ``forward`` (the router of Phi-3.5-MoE) computes something else and does not count.
    """
    linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return linear or isinstance(module, QuantLinear) or is_conv1d(module)


def features(module: nn.Module) -> tuple[int, int]:
    """Returns ``out_features, in_features`` of a linear layer."""
    if is_conv1d(module):
        in_features, out_features = module.get_parameter("weight").shape
        return out_features, in_features
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
