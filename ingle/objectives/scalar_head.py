"""A head that maps the hidden states of a language model to one number each: a value, or a reward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ingle.atomic import write_atomically
from ingle.errors import AdapterError
from ingle.parallel import Mesh, copy_rows, trained_parameters

#: The head next to an adapter of Ingle's own.
HEAD_FILE = "head.safetensors"
#: The adapter in the folder of a run.
_ADAPTER = "adapter"


class ScalarHead(nn.Module):
    """Maps hidden states to one number each, in float32; all are equal to the bias until weights are learned or loaded.

    Random weights, with which a reward model begins, give values near 1. Where rewards are smaller, advantages would
    consist of these values until they are unlearned.

    Args:
        size: H.
        device: Where it is.

    Attributes:
        weight: float32 [1, H].
        bias: float32 [1].
    """

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, size, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Returns a number for each token, float32 [N]."""
        return nn.functional.linear(hidden_NH.to(self.weight.dtype), self.weight, self.bias)[:, 0]

    def load(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Reads the head that lies next to an adapter, or that the adapter brings along.

        Args:
            folder: The folder of the adapter.
            tensors: The tensors of the adapter's modules, such as ``score.weight``, see
                :func:`ingle.adapters.load_role`.

        Raises:
            AdapterError: There is no head for one number, or it does not fit.
        """
        path = folder / HEAD_FILE
        try:
            found = load_file(path) if path.is_file() else dict(tensors)
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError("The head cannot be read.", where=str(path), why=str(error)) from None
        weights = [value for key, value in found.items() if key.rpartition(".")[2] == "weight"]
        biases = [value for key, value in found.items() if key.rpartition(".")[2] == "bias"]
        if len(weights) != 1 or weights[0].shape != self.weight.shape or any(each.shape != (1,) for each in biases):
            raise AdapterError(
                "The adapter has no head that scores answers.",
                where=str(folder),
                why=f"wanted is a weight of {list(self.weight.shape)}; found: "
                + (", ".join(f"{key} {list(value.shape)}" for key, value in found.items()) or "nothing"),
                fix="name a run with --objective.kind=reward on the same base",
            )
        copy_rows(self.weight, weights[0])
        copy_rows(self.bias, biases[0] if biases else torch.zeros(1))

    def save(self, folder: Path, mesh: Mesh | None = None) -> None:
        """Writes the head into a folder; all ranks call it together."""
        tensors = trained_parameters(self, keep=mesh is None or mesh.is_main)
        write = partial(_write, folder / HEAD_FILE, tensors)
        write() if mesh is None else mesh.on_main(write)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({name: value.detach().contiguous() for name, value in sorted(tensors.items())}))


def adapter_folder(path: str) -> Path:
    """Returns the adapter of a run, or the folder itself."""
    inner = Path(path).expanduser() / _ADAPTER
    return inner if inner.is_dir() else inner.parent
