"""Reads and writes ``adapter_model.safetensors``: A and B under PEFT's names, and a record of Ingle's own.

The record is an entry of the header's metadata, which PEFT and other readers ignore.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ingle.adapters.adapted import tied_modules
from ingle.adapters.identity import BaseIdentity
from ingle.adapters.linear import features, is_linear
from ingle.adapters.peft_config import CONFIG_FILE, NO_TARGETS, PeftConfig
from ingle.atomic import write_atomically
from ingle.config.adapter import AdapterConfig, Init, LowRankAdapter, MergeAware
from ingle.config.adapter_kinds import Adapter
from ingle.config.base import BaseConfig, base_section
from ingle.config.section import Section
from ingle.errors import AdapterError
from ingle.parallel import copy_rows
from ingle.wording import some

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_METADATA_KEY = "ingle"
#: Only the magnitude is no module of PEFT's, so its key may end without ``weight``.
_KEY = re.compile(r"(.+)\.lora_(A(?=.*\.weight)|B(?=.*\.weight)|magnitude_vector)(?:\.default)?(?:\.weight)?")
DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_GROUP_SIZES = TypeAdapter(dict[str, Annotated[int, Field(ge=1)]])
_SECTION: TypeAdapter[Any] = TypeAdapter(AdapterConfig)
_COPY_FOLDER = "copy the complete adapter folder again"
_USE_OWN_BASE = f"use the base that the adapter was trained on (base_model_name_or_path in {CONFIG_FILE})"


class AdapterOptions(Section):
    """Fields of the adapter section that PEFT does not know; see :class:`~ingle.config.adapter.LoraAdapter`."""

    kind: Literal["lora", "dora", "qa_lora"] = "lora"
    train_rounding: bool = False
    merge_aware: MergeAware | None = None
    init: Init = "kaiming"
    freeze_a: bool = False

    @classmethod
    def of(cls, adapter: LowRankAdapter) -> AdapterOptions:
        """Returns the fields of a section, without the defaults of fields that older files do not have."""
        values = adapter.model_dump(include=set(cls.model_fields))
        added = {key: values.pop(key) for key in ("init", "freeze_a") if key in values}
        values |= {key: value for key, value in added.items() if value != cls.model_fields[key].default}
        return cls.model_validate(values)


class Factors(NamedTuple):
    """What a file has of one adapted layer.

    Attributes:
        a: ``[R, I]``.
        b: ``[O, R]``.
        magnitude: ``[O]`` of DoRA, or None.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Record:
    """What the file stores beyond PEFT's layout.

    Attributes:
        adapter: Fields of the adapter section that PEFT does not know.
        group_sizes: Number of inputs that share a column of A, by path, where it is above 1.
        base: Format of the base that the adapter was trained on; None if unknown.
        identity: Identity of that base; None if the adapter works with any base.
        section: The section of an adapter that is not low-rank; None for LoRA.
    """

    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    group_sizes: dict[str, int] = field(default_factory=dict)
    base: BaseConfig | None = None
    identity: BaseIdentity | None = None
    section: Adapter | None = None

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Reads the result of :meth:`to_json`.

        Raises:
            ValueError: A value is invalid.
        """
        values = json.loads(text)
        base, identity, section = values["base"], values["identity"], values.get("section")
        return cls(
            AdapterOptions.model_validate(values["adapter"]),
            _GROUP_SIZES.validate_python(values["group_sizes"], strict=True),
            None if base is None else base_section(base),
            None if identity is None else BaseIdentity.from_dict(identity),
            None if section is None else _SECTION.validate_json(json.dumps(section)),
        )

    def to_json(self) -> str:
        """Returns the record as JSON."""
        values = {
            "adapter": self.adapter.model_dump(mode="json", exclude_unset=True),
            "group_sizes": self.group_sizes,
            "base": None if self.base is None else self.base.model_dump(mode="json"),
            "identity": None if self.identity is None else self.identity.to_dict(),
        }
        if self.section is not None:
            values["section"] = self.section.model_dump(mode="json", exclude={"path", "allow_mismatch"})
        return json.dumps(values)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: Record) -> None:
    """Writes the file atomically."""
    # Tied weights are written under each of their names because readers untie them.
    own = {key: tensor.cpu().contiguous().clone() for key, tensor in sorted(tensors.items())}
    data = save(own, metadata={"format": "pt", _METADATA_KEY: record.to_json()})
    # safetensors orders metadata differently in every call; sorting makes equal adapters equal files.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_atomically(path, len(header).to_bytes(8, "little") + header + data[end:])


def read_record(folder: str | Path) -> Record:
    """Reads Ingle's record of an adapter folder; returns an empty record if another program wrote the adapter.

    Raises:
        AdapterError: The file is damaged.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        return Record()
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY)
        return Record() if text is None else Record.from_json(text)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise _unreadable(path, error) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of the file.

    Raises:
        AdapterError: The file is missing or damaged.
    """
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        raise AdapterError(
            "The adapter's weights are missing.",
            where=str(path),
            why="the folder contains adapter_model.bin, a pickle, which can run code" if pickled else None,
            fix="save the adapter again as safetensors" if pickled else _COPY_FOLDER,
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> AdapterError:
    return AdapterError(
        "The adapter's weights cannot be read.", where=str(path), why=str(error), fix="copy the file again"
    )


def sort_tensors(
    tensors: Mapping[str, Tensor], model: nn.Module, config: PeftConfig, folder: Path
) -> tuple[dict[str, Factors], dict[str, dict[str, Tensor]]]:
    """Splits the tensors into A, B and magnitude by path, and the tensors of each module in ``modules_to_save``.

    Raises:
        AdapterError: A tensor is none of these or is stored twice; or A, B or a module of ``modules_to_save`` is
            missing.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    where = str(folder / WEIGHTS_FILE)
    paths = _saved_paths(model, config)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _KEY.fullmatch(name)
        owner = next((path for path in paths if name.startswith(f"{path}.")), None)
        if match:
            pair = factors.setdefault(match[1], {})
            if match[2] in pair:
                raise AdapterError(f"The file contains {match[2]} of {match[1]} twice.", where=where)
            num_axes = 1 if match[2] == "magnitude_vector" else 2
            if tensor.ndim != num_axes or tensor.dtype not in DTYPES:
                raise AdapterError(
                    f"{key} is not a {'matrix' if num_axes == 2 else 'vector'} of floating-point numbers.",
                    where=where,
                    why=f"it has shape {list(tensor.shape)} and type {str(tensor.dtype).removeprefix('torch.')}",
                    fix="save the adapter again in float32, float16 or bfloat16",
                )
            pair[match[2]] = tensor
        elif owner is not None:
            saved.setdefault(owner, {})[name.removeprefix(f"{owner}.")] = tensor
        else:
            raise AdapterError(
                f"{key} is not part of a supported adapter.",
                where=where,
                why="Ingle reads A and B of linear layers and the modules in modules_to_save only",
                fix="merge the adapter into its base with PEFT, or train it without LoRA on embeddings and head",
            )
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    absent = [path for path in outer if path not in saved and any(True for _ in model.get_submodule(path).parameters())]
    if absent:
        raise AdapterError(
            f"The weights of {some(absent)} are missing.",
            where=where,
            why=f"modules_to_save in {CONFIG_FILE} names them",
            fix=_COPY_FOLDER,
        )
    wanted = {"A", "B", "magnitude_vector"} if config.use_dora else {"A", "B"}
    broken = [name for name, pair in factors.items() if pair.keys() != wanted]
    if broken or not (factors or (saved and config.target_modules == NO_TARGETS)):
        raise AdapterError(
            f"The adapter of {broken[0]} is incomplete." if broken else "The file contains no adapter.",
            where=where,
            why=f"it has {', '.join(factors[broken[0]])}; {CONFIG_FILE} implies {', '.join(sorted(wanted))}"
            if broken
            else None,
            fix="copy the complete folder again",
        )
    return {name: Factors(p["A"], p["B"], p.get("magnitude_vector")) for name, p in factors.items()}, saved


def _saved_paths(model: nn.Module, config: PeftConfig) -> list[str]:
    """Returns the modules that ``modules_to_save`` names, as PEFT reads it."""
    # "norm" means every module whose name ends so, input_layernorm too.
    endings = tuple(config.modules_to_save or ())
    paths = [name for name, _ in model.named_modules() if name and name.endswith(endings)]
    if config.ensure_weight_tying:  # PEFT then names one module and saves all that share its weight
        paths += tied_modules(model, tuple(paths))
    return paths


def check_targets(
    model: nn.Module, factors: Mapping[str, Factors], config: PeftConfig, folder: Path
) -> tuple[str, ...]:
    """Compares the modules and ranks in the config with those in the file.

    Returns:
        Notes about names in ``target_modules`` that match no module of this model; other readers ignore them.

    Raises:
        AdapterError: Config and file contradict each other.
    """
    where = str(folder / CONFIG_FILE)
    foreign = sorted(name for name in factors if not config.is_target(name))
    if foreign:
        raise AdapterError(
            f"The adapter's config does not target {some(foreign)}, but its weights include an adapter for it.",
            where=f"{where}: target_modules",
            why="config and weights belong to different adapters; another reader would ignore these weights",
            fix=_COPY_FOLDER,
        )
    for name, found in factors.items():
        rank = config.rank_of(name)
        if len(found.a) != rank:
            raise AdapterError(
                f"The adapter of {name} has rank {len(found.a)}, but its config says {rank}.",
                where=f"{where}: r, rank_pattern",
                why="config and weights belong to different adapters, and the scale depends on the rank",
                fix=_COPY_FOLDER,
            )
    if config.target_modules in (None, "all-linear"):
        return ()
    paths = [name.removesuffix(".base") for name, module in model.named_modules() if is_linear(module)]
    missing = sorted(path for path in paths if config.is_target(path) and path not in factors)
    if missing:
        raise AdapterError(
            f"The adapter of {some(missing)} is missing.",
            where=str(folder / WEIGHTS_FILE),
            why=f"the config names {len(missing) + len(factors)} modules of this model; the file has {len(factors)}",
            fix="copy the file again, or use the base that the adapter was trained on",
        )
    listed = config.target_modules if isinstance(config.target_modules, list) else []
    unknown = [entry for entry in listed if not any(f".{path}".endswith(f".{entry}") for path in paths)]
    return (f"The adapter targets {some(unknown)}, which this model does not have.",) if unknown else ()


def check_factors(model: nn.Module, name: str, factors: Factors, folder: Path) -> None:
    """Checks that A and B of one module fit the model.

    Raises:
        AdapterError: The module is missing, is not a linear layer or has another size, or a value is not finite.
    """
    where = str(folder / WEIGHTS_FILE)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterError(
            f"The adapter changes {name}, which this model does not have.", where=where, fix=_USE_OWN_BASE
        ) from None
    module = getattr(module, "base", module)
    if not is_linear(module):
        raise AdapterError(
            f"The adapter changes {name}, a {type(module).__name__}; only linear layers can be adapted.", where=where
        )
    out_features, in_features = features(module)
    lora_a, lora_b, magnitude = factors
    if lora_a.shape != (len(lora_a), in_features) or lora_b.shape != (out_features, len(lora_a)):
        raise AdapterError(
            f"The adapter of {name} does not have the sizes of the model.",
            where=where,
            why=f"A is {list(lora_a.shape)}, B {list(lora_b.shape)}; W is [{out_features}, {in_features}]",
            fix=_USE_OWN_BASE,
        )
    if magnitude is not None and magnitude.shape != (out_features,):
        raise AdapterError(
            f"The magnitude of {name} does not have the size of the model.",
            where=where,
            why=f"it has {len(magnitude)} values; the layer has {out_features} outputs",
            fix=_USE_OWN_BASE,
        )
    if not all(torch.isfinite(tensor).all() for tensor in factors if tensor is not None):
        raise AdapterError(f"The adapter of {name} contains NaN or infinity.", where=where)


def load_module(model: nn.Module, name: str, state: Mapping[str, Tensor], folder: Path) -> None:
    """Copies the weights of a module in ``modules_to_save`` into the model.

    Raises:
        AdapterError: Names or sizes differ, or a value is not finite.
    """
    where = str(folder / WEIGHTS_FILE)
    parameters = dict(model.get_submodule(name).named_parameters(remove_duplicate=False))
    expected, found = ({key: list(t.shape) for key, t in each.items()} for each in (parameters, state))
    if expected != found:
        raise AdapterError(
            f"The saved weights of {name} do not fit the model.",
            where=where,
            why=f"the file has {found}, the model {expected}",
            fix=_USE_OWN_BASE,
        )
    broken = [key for key, tensor in state.items() if tensor.dtype not in DTYPES or not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterError(
            f"{name}.{broken[0]} contains NaN or infinity, or is not a floating-point tensor.", where=where
        )
    for key, tensor in state.items():
        if parameters[key].is_meta:  # a model on the meta device: export reads its base weight by weight
            path, _, leaf = key.rpartition(".")
            own = nn.Parameter(tensor.to(parameters[key].dtype), requires_grad=True)
            setattr(model.get_submodule(name).get_submodule(path), leaf, own)
        else:
            copy_rows(parameters[key], tensor)
