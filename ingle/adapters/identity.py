"""What an adapter was trained on: a SHA-256 over the base's bytes, and samples that tell how far another base is.

An adapter belongs to the very numbers it was trained on.  A packed weight counts with its bytes; a floating one with
its values rounded to bfloat16, so that one checkpoint held in bfloat16 here and in float32 there is the same base.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ingle.adapters.adapted import BEFORE, lora_modules
from ingle.adapters.lora import LoraLinear
from ingle.quant.linear import QuantLinear, QuantModule

#: Weights of each adapted layer that are kept to compare another base with.
NUM_SAMPLES = 64


@dataclass(frozen=True)
class BaseIdentity:
    """The base of an adapter.

    Attributes:
        sha256: Over the names, shapes and contents of all its tensors.
        formats: How many packed modules it holds in each format.
        tensors: The first 12 hexadecimal digits of each tensor's own SHA-256.
        samples: Some decoded weights of each adapted layer, always at the same places.
    """

    sha256: str
    formats: dict[str, int]
    tensors: dict[str, str]
    samples: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaseIdentity:
        """What :meth:`to_dict` gave.

        Raises:
            KeyError: When a field is missing.
            ValueError: When a field is of another type.
        """
        known = {key: values[key] for key in ("sha256", "formats", "tensors", "samples")}
        return TypeAdapter(cls).validate_python(known)

    def explain_difference(self, other: BaseIdentity) -> str:
        """How far ``other`` is from this base, in one sentence with figures."""
        held, theirs = (", ".join(f"{n} x {f}" for f, n in i.formats.items()) or "none" for i in (self, other))
        if held != theirs:
            words = f"packed modules: {held} there, {theirs} here"
        else:
            names = self.tensors.keys() | other.tensors.keys()
            differing = sum(self.tensors.get(name) != other.tensors.get(name) for name in names)
            words = f"{differing} of {len(names)} tensors differ"
        error = self.relative_error(other)
        if error is not None:
            count = sum(len(values) for values in self.samples.values())
            words += f"; the adapted layers' weights differ by {error:.2%} of their rms (from {count:,} samples)"
        return words

    def relative_error(self, other: BaseIdentity) -> float | None:
        """``|W' - W| / |W|`` over the sampled weights of the adapted layers; None where they cannot be compared."""
        counts, others_counts = ({name: len(v) for name, v in i.samples.items()} for i in (self, other))
        if counts != others_counts:
            return None
        own, others = (torch.tensor([i.samples[name] for name in self.samples]) for i in (self, other))
        return float((others - own).norm() / own.norm()) if own.any() else None


def identify(model: nn.Module) -> BaseIdentity:
    """What the base of a model is, its adapters left out and what is trained whole taken as it was before training.

    Args:
        model: A model with its weights in place and its adapters attached.
    """
    tensors = dict(base_tensors(model))
    with ThreadPoolExecutor() as pool:  # hashing leaves other threads free to run
        digests = dict(zip(tensors, pool.map(tensor_digest, tensors.values()), strict=True))
    formats = Counter(module.format.name for module in model.modules() if isinstance(module, QuantModule))
    return BaseIdentity(
        sha256=combine(digests),
        formats=dict(sorted(formats.items())),
        tensors={name: digest[:12] for name, digest in sorted(digests.items())},
        samples={name: sample(layer) for name, layer in sorted(lora_modules(model).items())},
    )


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name in the bare model and tensor of every parameter of the base; a shared one once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        bare = ".".join(part for part in path.split(".") if part != "base")
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or (isinstance(module, LoraLinear) and key.startswith("lora_")):
                continue
            seen.add(id(parameter))
            before = getattr(module, key + BEFORE, None)
            yield f"{bare}.{key}".lstrip("."), (parameter if before is None else before).detach()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and of its bytes, or of its values in bfloat16."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.bfloat16()
    digest = hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def combine(digests: Mapping[str, str]) -> str:
    """The SHA-256 of a base from those of its tensors, whatever order they come in."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def sample(layer: LoraLinear) -> list[float]:
    """Some weights of a layer as its base holds them, at places that depend on its shape alone."""
    dtype = torch.float32 if isinstance(layer.base, QuantLinear) else layer.weight.dtype
    weight_OI = layer.dense_weight(dtype)
    places = torch.randint(weight_OI.numel(), (NUM_SAMPLES,), generator=torch.Generator().manual_seed(0))
    places = places.to(weight_OI.device)
    rows, columns = places // layer.in_features, places % layer.in_features
    return [float(f"{value:.6g}") for value in weight_OI[rows, columns].tolist()]
