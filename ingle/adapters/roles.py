"""Several functions over one frozen base: a policy with a value or a reward, each with an A and B in every layer.

``use(model, NAME)`` makes a model compute the function of a role. Each is saved as an adapter of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ingle.adapters.adapted import lora_modules
from ingle.adapters.identity import BaseIdentity, identify
from ingle.adapters.lora import LoraLinear, Role, generator_of
from ingle.adapters.peft_config import CONFIG_FILE, PeftConfig, describe_adapter, read_peft_config
from ingle.adapters.peft_files import check_base
from ingle.adapters.peft_tensors import (
    PREFIX,
    WEIGHTS_FILE,
    Record,
    check_factors,
    check_targets,
    read_record,
    read_tensors,
    sort_tensors,
    write_tensors,
)
from ingle.adapters.states import own_parameters
from ingle.atomic import write_atomically
from ingle.config.adapter import LoraAdapter
from ingle.config.base import BaseConfig
from ingle.errors import AdapterError
from ingle.parallel import Mesh, copy_rows, trained_parameters
from ingle.wording import some


def add_role(model: nn.Module, name: str, *, rank: int, scale: float = 2.0, trained: bool = True) -> None:
    """Adds A and B of another function to every adapted layer, after :func:`insert` and before the model is sharded.

    :func:`initialize` gives them their values; their B is zero, so the function begins at the base.

    Args:
        model: A model with its adapter inserted.
        name: The role, which :func:`use` takes.
        rank: Rank of its change.
        scale: Factor on its change.
        trained: Whether A and B are trained.

    Raises:
        AdapterError: The name is taken or is no name, or no layer has an adapter.
    """
    layers = lora_modules(model)
    if not layers:
        raise AdapterError("Only layers with an adapter can have a role.", where=name, fix="--adapter.kind=lora")
    taken = name in ("on", "off", "initial") or any(layer.has_role(name) for layer in layers.values())
    if taken or not name.isidentifier():
        raise AdapterError(f"{name!r} cannot name a role.", where="add_role", fix="use another name")
    for layer in layers.values():
        layer.add_role(name, rank, scale).requires_grad_(trained)


def initialize_roles(layers: Mapping[str, LoraLinear], seed: int) -> None:
    """Gives all roles their initial values, which depend on the seed, the path and the name."""
    for path, layer in layers.items():
        for name, role in layer.named_roles():
            role.initialize(generator_of(seed, f"{path}.{name}"))


class RoleShape(NamedTuple):
    """Rank of an adapter, and the factor on its change."""

    rank: int
    scale: float


def read_shape(folder: str | Path) -> RoleShape:
    """Returns the rank and the scale that a role needs to have the values of an adapter folder.

    Raises:
        AdapterError: Files are missing or damaged.
    """
    config = read_peft_config(Path(folder))
    return RoleShape(config.r, config.scale_of("", config.r))


def base_of(folder: str | Path) -> str:
    """Returns the base that an adapter folder names; empty if it names none."""
    try:
        named = json.loads((Path(folder) / CONFIG_FILE).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return named if isinstance(named, str) else ""


def fits_role(model: nn.Module, folder: str | Path) -> bool:
    """Returns whether an adapter folder is plain LoRA of one rank for exactly the adapted layers of a model.

    Raises:
        AdapterError: Files are missing or damaged.
    """
    config = read_peft_config(Path(folder))
    keys = read_tensors(Path(folder) / WEIGHTS_FILE).keys()
    suffix = ".lora_A.weight"
    changed = {key.removeprefix(PREFIX).removesuffix(suffix) for key in keys if key.endswith(suffix)}
    return not config.use_dora and not config.rank_pattern and changed == lora_modules(model).keys()


def load_role(
    model: nn.Module, name: str, folder: str | Path, *, identity: BaseIdentity | None = None
) -> dict[str, Tensor]:
    """Gives a role the values of an adapter folder, which must be plain LoRA of the same layers, rank and scale.

    Args:
        model: A model with its weights loaded.
        name: The role.
        folder: Adapter folder; that of a model with the head of a task fits too.
        identity: The identity of the base; computed if None.

    Returns:
        The tensors of modules that the adapter brings along and the model does not have, such as ``score.weight``.

    Raises:
        AdapterError: Files are missing or damaged, or do not fit the model or the role.
    """
    folder, layers = Path(folder), _layers_with(model, name)
    config, record = read_peft_config(folder), read_record(folder)
    heads, tensors = _split_heads(read_tensors(folder / WEIGHTS_FILE), model, config)
    own = config.model_copy(
        update={"modules_to_save": [key for key in config.modules_to_save or () if key not in heads]}
    )
    factors, saved = sort_tensors(tensors, model, own, folder)
    check_targets(model, factors, own, folder)
    if saved or config.use_dora or factors.keys() != layers.keys():
        raise AdapterError(
            f"This adapter cannot have the role {name}.",
            where=str(folder),
            why=f"it changes {some(factors.keys() ^ layers.keys())} on one side only"
            if factors.keys() != layers.keys()
            else "it has trained modules or magnitudes, and a role has A and B alone",
            fix="train it as plain LoRA of the same target_modules",
        )
    check_base(model, _of_common_tensors(record, identity or identify(model)), folder, False, identity)
    for path, found in factors.items():
        check_factors(model, path, found, folder)
        role, scale = layers[path], config.scale_of(path, len(found.a))
        if role.lora_a.shape != found.a.shape or abs(role.scale - scale) > 1e-9 * scale:
            raise AdapterError(
                f"This adapter has rank {len(found.a)} and scale {scale:g}, but the role {name} has rank "
                f"{len(role.lora_a)} and scale {role.scale:g}.",
                where=str(folder),
                fix="add the role with the rank and scale of the adapter",
            )
        copy_rows(role.lora_a, found.a)
        copy_rows(role.lora_b, found.b)
    return {f"{head}.{key}": tensor for head, found in heads.items() for key, tensor in found.items()}


def _split_heads(
    tensors: Mapping[str, Tensor], model: nn.Module, config: PeftConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Returns the tensors of modules that the model does not have, by module, and all others."""
    paths = [path for path, _ in model.named_modules()]
    absent = [key for key in config.modules_to_save or () if not any(path.endswith(key) for path in paths)]
    heads: dict[str, dict[str, Tensor]] = {key: {} for key in absent}
    others = {}
    for key, tensor in tensors.items():
        owner = next((head for head in absent if key.startswith(f"{PREFIX}{head}.")), None)
        if owner is None:
            others[key] = tensor
        else:
            heads[owner][key.removeprefix(f"{PREFIX}{owner}.")] = tensor
    return heads, others


def _of_common_tensors(record: Record, found: BaseIdentity) -> Record:
    """Returns a record whose base is the model's if both have the same bytes where both have a tensor.

    A model with the head of a task has no output layer, and a language model has no such head.
    """
    own = record.identity
    if own is None or any(found.tensors.get(name, digest) != digest for name, digest in own.tensors.items()):
        return record
    return replace(record, identity=found) if own.tensors.keys() & found.tensors.keys() else record


def save_role(
    model: nn.Module,
    name: str,
    folder: str | Path,
    base_model_id: str,
    *,
    base: BaseConfig | None = None,
    identity: BaseIdentity | None = None,
    mesh: Mesh | None = None,
) -> None:
    """Saves a role as a LoRA adapter in PEFT's layout; all ranks call it together. See :func:`save_adapter`.

    Raises:
        AdapterError: There is no such role.
    """
    layers = _layers_with(model, name)
    values = trained_parameters(model, keep=mesh is None or mesh.is_main, also=own_parameters(model))
    write = partial(
        _write, model, name, layers, Path(folder), base_model_id, values, Record(base=base, identity=identity)
    )
    write() if mesh is None else mesh.on_main(write)


def _write(
    model: nn.Module,
    name: str,
    layers: Mapping[str, Role],
    folder: Path,
    base_model_id: str,
    values: Mapping[str, Tensor],
    record: Record,
) -> None:
    first = next(iter(layers.values()))
    rank = len(first.lora_a)
    tensors = {
        f"{PREFIX}{path}.lora_{kind}.weight": values[f"{path}.roles.{name}.lora_{kind.lower()}"]
        for path in layers
        for kind in "AB"
    }
    section = LoraAdapter(rank=rank, alpha=first.scale * rank)
    config = describe_adapter(model, section, base_model_id, (), is_role=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, tensors, record)
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def _layers_with(model: nn.Module, name: str) -> dict[str, Role]:
    """Returns the A and B of a role by the path of their layer."""
    layers = lora_modules(model)
    if not any(layer.has_role(name) for layer in layers.values()):
        raise AdapterError(f"This adapter has no role {name!r}.", where="adapter", fix="add_role before it is used")
    return {path: dict(layer.named_roles())[name] for path, layer in layers.items()}
