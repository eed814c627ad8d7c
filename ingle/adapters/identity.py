"""Identifies the base that an adapter was trained on.

The identity contains a SHA-256 over the base's tensors, and samples of its weights that show how far another base is
from it.  For a quantized weight, the bytes are hashed; for a floating-point weight, the values rounded to bfloat16, so
that a checkpoint loaded in bfloat16 and in float32 is the same base.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ingle.adapters.linear import is_linear
from ingle.adapters.states import BEFORE, INITIAL, adapted_modules, copied, own_parameters
from ingle.parallel import full
from ingle.quant.conversion import is_conv1d
from ingle.quant.linear import QuantLinear, QuantModule
from ingle.quant.task_heads import is_in_head

#: Weights of each adapted layer that are stored for comparison with another base.
NUM_SAMPLES = 64

#: Elements that :func:`tensor_digest` converts and hashes at once.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class BaseIdentity:
    """The base of an adapter.

    Attributes:
        sha256: Digest over the names, shapes and contents of all tensors.
        formats: Number of quantized modules by format.
        tensors: The first 12 hexadecimal digits of each tensor's own SHA-256.
        samples: Some decoded weights of each adapted layer, at fixed positions.
    """

    sha256: str
    formats: dict[str, int]
    tensors: dict[str, str]
    samples: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaseIdentity:
        """Reads the result of :meth:`to_dict`.

        Raises:
            KeyError: A field is missing.
            ValueError: A field has another type.
        """
        known = {key: values[key] for key in ("sha256", "formats", "tensors", "samples")}
        return TypeAdapter(cls).validate_python(known)

    def explain_difference(self, other: BaseIdentity) -> str:
        """Describes in one sentence fragment how ``other`` differs from this base."""
        expected, found = (", ".join(f"{n} x {f}" for f, n in i.formats.items()) or "none" for i in (self, other))
        if expected != found:
            text = f"quantized modules: expected {expected}, found {found}"
        else:
            names = self.tensors.keys() | other.tensors.keys()
            differing = sum(self.tensors.get(name) != other.tensors.get(name) for name in names)
            text = f"{differing} of {len(names)} tensors differ"
        error = self.relative_error(other)
        if error is not None:
            count = sum(len(values) for values in self.samples.values())
            text += f"; the weights of the adapted layers differ by {error:.2%} of their RMS ({count:,} samples)"
        return text

    def relative_error(self, other: BaseIdentity) -> float | None:
        """Returns ``|W' - W| / |W|`` over the sampled weights, or None if the two cannot be compared."""
        counts, other_counts = ({name: len(v) for name, v in i.samples.items()} for i in (self, other))
        if counts != other_counts:
            return None
        own, others = (torch.tensor([i.samples[name] for name in self.samples]) for i in (self, other))
        return float((others - own).norm() / own.norm()) if own.any() else None


class TensorHasher:
    """Computes the digest of one base tensor from chunks of its rows.

    A caller that streams a tensor from disk, or gathers it slice by slice from other ranks, needs no more memory than
    one chunk.

    Args:
        shape: Shape of the complete tensor.
        dtype: Data type in which the tensor is stored.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._dtype = torch.bfloat16 if dtype.is_floating_point else dtype
        self._missing = prod(shape)
        self._hash = hashlib.sha256(f"{list(shape)} {self._dtype}\n".encode())

    def update(self, rows: Tensor) -> None:
        """Adds the next rows; all rows must be added in order."""
        chunk = rows.detach().cpu().to(self._dtype).contiguous()
        self._missing -= chunk.numel()
        self._hash.update(chunk.flatten().view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Returns the SHA-256 of the shape, the data type and all bytes."""
        assert self._missing == 0, f"{self._missing} elements are missing"
        return self._hash.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor; see :class:`TensorHasher`."""
    hasher = TensorHasher(tensor.shape, tensor.dtype)
    num_rows = max(1, _CHUNK_ELEMENTS // max(1, prod(tensor.shape[1:])))
    for rows in tensor.split(num_rows) if tensor.dim() else (tensor,):
        hasher.update(rows)
    return hasher.hexdigest()


def identify(model: nn.Module, facts: Mapping[str, Any] | None = None) -> BaseIdentity:
    """Identifies the base of a model.

    Adapters are ignored, and the head of a task, which the adapter brings along. For another module in
    ``modules_to_save``, the weights from before training are hashed.

    Args:
        model: A model with its weights loaded and its adapters attached.
        facts: The results of :func:`describe` by the parameters' paths, for a model whose parameters are sharded.
    """
    formats = Counter(module.format.name for module in model.modules() if isinstance(module, QuantModule))
    bases = {name: layer.base for name, layer in adapted_modules(model).items()}
    layers = {name: base for name, base in bases.items() if base is not None and is_linear(base)}
    if facts is not None:
        known = {id(p): facts[path] for path, p in model.named_parameters(remove_duplicate=False) if path in facts}
        digests = {name: known[id(parameter)]["sha256"] for name, parameter, _ in _base_parameters(model)}
        samples = {name: known[id(next(base.parameters()))]["sample"] for name, base in layers.items()}
        return make_identity(digests, formats, samples)
    tensors = dict(base_tensors(model))
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        digests = dict(zip(tensors, pool.map(tensor_digest, tensors.values()), strict=True))
    return make_identity(digests, formats, {name: sample(base) for name, base in layers.items()})


def initial_digest(model: nn.Module, identity: BaseIdentity) -> str:
    """Returns a SHA-256 of the function that training began with; all ranks call it together.

    Args:
        model: A model in the state ``on``, see :func:`ingle.adapters.use`.
        identity: The identity of its base.
    """
    digest = hashlib.sha256(identity.sha256.encode())
    for path, module in model.named_modules():
        # The identity covers the weights that trained modules had before training, but not those of a head.
        suffix = INITIAL if copied(module, INITIAL) else BEFORE if is_in_head(model, path) else None
        if suffix is None:
            continue
        for key in copied(module, suffix):
            value = full(module.get_buffer(key + suffix)).cpu().contiguous()
            digest.update(f"{path}.{key} {list(value.shape)} {value.dtype}\n".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(module: nn.Module, key: str) -> dict[str, Any]:
    """Returns what :func:`identify` needs to know about one parameter, as plain data.

    Args:
        module: A module of the base, with its full values.
        key: A parameter or buffer of the module.
    """
    fact: dict[str, Any] = {"sha256": tensor_digest(getattr(module, key))}
    if is_linear(module) and key == next(iter(module._parameters)):
        fact["sample"] = sample(module)
    return fact


def make_identity(
    digests: Mapping[str, str], formats: Mapping[str, int], samples: Mapping[str, list[float]]
) -> BaseIdentity:
    """Builds an identity from the digests of all tensors, in any order.

    Args:
        digests: Result of :func:`tensor_digest` by tensor.
        formats: Number of quantized modules by format.
        samples: Result of :func:`sample` by adapted layer.
    """
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return BaseIdentity(
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
        formats=dict(sorted(formats.items())),
        tensors={name: digest[:12] for name, digest in sorted(digests.items())},
        samples=dict(sorted(samples.items())),
    )


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter of the base under its name in the bare model; a shared parameter once."""
    for name, parameter, before in _base_parameters(model):
        yield name, (parameter if before is None else before).detach()


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
    """Yields name, parameter and, if it is trained, its value from before training."""
    seen = own_parameters(model)
    for path, module in model.named_modules():
        bare = ".".join(part for part in path.split(".") if part != "base")
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or is_in_head(model, bare):
                continue
            seen.add(id(parameter))
            yield f"{bare}.{key}".lstrip("."), parameter, getattr(module, key + BEFORE, None)


def sample(base: nn.Module) -> list[float]:
    """Returns some weights of a linear layer, at positions that depend on its shape alone."""
    if isinstance(base, QuantLinear):
        weight_OI = base.decode(torch.float32, base.scratch(torch.float32))
    else:
        weight = base.get_parameter("weight").detach()
        weight_OI = weight.t() if is_conv1d(base) else weight
    positions = torch.randint(weight_OI.numel(), (NUM_SAMPLES,), generator=torch.Generator().manual_seed(0))
    positions = positions.to(weight_OI.device)
    rows, columns = positions // weight_OI.shape[1], positions % weight_OI.shape[1]
    return [float(f"{value:.6g}") for value in weight_OI[rows, columns].tolist()]
