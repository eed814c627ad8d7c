"""The tensors in the files of adapters, by the paths of the parameters that they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ingle.adapters.peft_tensors import PREFIX
from ingle.errors import AdapterError
from ingle.wording import some


def prefixed(paths: Iterable[str]) -> dict[str, str]:
    """Returns the keys of parameters whose names in PEFT are the same."""
    return {path: f"{PREFIX}{path}" for path in paths}


def by_name(tensors: Mapping[str, Tensor], names: Mapping[str, str], where: str) -> dict[str, Tensor]:
    """Returns tensors of a file by the paths of parameters.

    Args:
        tensors: The tensors by key.
        names: The key of each parameter.
        where: The file, for errors.

    Raises:
        AdapterError: A tensor is missing, or belongs to no parameter.
    """
    missing, unknown = set(names.values()) - set(tensors), set(tensors) - set(names.values())
    if missing or unknown:
        raise AdapterError(
            "This adapter does not change the same modules of this model.",
            where=where,
            why=f"only in the file: {some(unknown)}; only in the model: {some(missing)}",
            fix="use the base that the adapter was trained on, and the options of adapter that it was trained with",
        )
    return {path: tensors[key] for path, key in names.items()}
