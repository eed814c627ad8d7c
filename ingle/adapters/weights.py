"""``adapter_model.safetensors``: A and B under PEFT's names, and in the header what only Ingle asks for.

PEFT and every other reader pass over the header's entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ingle.adapters.adapted import tied_modules
from ingle.adapters.identity import BaseIdentity
from ingle.adapters.lora import features, is_linear
from ingle.adapters.settings import CONFIG, Settings
from ingle.atomic import write_atomically
from ingle.config.adapter import MergeAware
from ingle.config.base import BaseConfig, base_section
from ingle.config.section import Section
from ingle.errors import AdapterError
from ingle.wording import some

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = "ingle"
_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}


_GROUP_SIZES = TypeAdapter(dict[str, Annotated[int, Field(ge=1)]])


class _Special(Section):
    """The fields of the adapter section that PEFT does not know."""

    kind: Literal["lora", "qa_lora"] = "lora"
    train_rounding: bool = False
    merge_aware: MergeAware | None = None


@dataclass(frozen=True)
class Record:
    """What the file says beyond PEFT's layout.

    Attributes:
        adapter: What is special in the adapter section: ``kind``, ``train_rounding``, ``merge_aware``.
        group_sizes: Inputs that share a column of A, by path; those that do not are left out.
        base: What the base it was trained on is held in; None when unknown.
        identity: Of that base; None in adapters that are bound to none.
    """

    adapter: dict[str, Any] = field(default_factory=dict)
    group_sizes: dict[str, int] = field(default_factory=dict)
    base: BaseConfig | None = None
    identity: BaseIdentity | None = None

    @classmethod
    def from_json(cls, text: str) -> Record:
        """What a header says.

        Raises:
            ValueError: When it says what no adapter can be.
        """
        values = json.loads(text)
        base, identity = values["base"], values["identity"]
        return cls(
            _Special.model_validate(values["adapter"]).model_dump(exclude_unset=True),
            _GROUP_SIZES.validate_python(values["group_sizes"], strict=True),
            None if base is None else base_section(base),
            None if identity is None else BaseIdentity.from_dict(identity),
        )

    def to_json(self) -> str:
        """What :meth:`from_json` reads."""
        values = {
            "adapter": self.adapter,
            "group_sizes": self.group_sizes,
            "base": None if self.base is None else self.base.model_dump(mode="json"),
            "identity": None if self.identity is None else self.identity.to_dict(),
        }
        return json.dumps(values)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: Record) -> None:
    """Writes the file; a crash leaves the old one or the new one."""
    # Tied weights are written under each of their names, as readers untie them.
    own = {key: tensor.cpu().contiguous().clone() for key, tensor in sorted(tensors.items())}
    data = save(own, metadata={"format": "pt", _KEY: record.to_json()})
    # safetensors writes the metadata in an order that changes from call to call; the same adapter is the same bytes.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_atomically(path, len(header).to_bytes(8, "little") + header + data[end:])


def read_record(folder: str | Path) -> Record:
    """What Ingle knows of an adapter folder; an empty record for one that another program wrote.

    Raises:
        AdapterError: When the file is damaged.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        return Record()
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        return Record() if text is None else Record.from_json(text)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise AdapterError(
            "The adapter's weights cannot be read.", where=str(path), why=str(error), fix="copy the file again"
        ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file.

    Raises:
        AdapterError: When it is missing or damaged.
    """
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        raise AdapterError(
            "The adapter's weights are missing.",
            where=str(path),
            why="there is an adapter_model.bin, a pickle that can run code" if pickled else None,
            fix="save it again with safetensors" if pickled else "copy the whole folder",
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            "The adapter's weights cannot be read.", where=str(path), why=str(error), fix="copy the file again"
        ) from None


def sort_tensors(
    tensors: dict[str, Tensor], model: nn.Module, settings: Settings, folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict[str, Tensor]]]:
    """Splits the file into ``path -> (A, B)`` and ``path -> {key: tensor}`` for modules trained whole.

    Raises:
        AdapterError: When a tensor is neither or is there twice, when half of an adapter is missing, or when a module
            of ``modules_to_save`` is.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    saved = settings.modules_to_save or ()
    # As PEFT reads the list: "norm" means every module whose name ends so, input_layernorm too.
    paths = [name for name, _ in model.named_modules() if name and name.endswith(tuple(saved))]
    if settings.ensure_weight_tying:  # PEFT then names one module and saves all that share its weight
        paths += tied_modules(model, tuple(paths))
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        owner = next((path for path in paths if name.startswith(f"{path}.")), None)
        if match:
            pair = halves.setdefault(match[1], {})
            if match[2] in pair:
                raise AdapterError(f"The file holds {match[2]} of {match[1]} twice.", where=str(folder / WEIGHTS))
            if tensor.ndim != 2 or tensor.dtype not in _DTYPES:
                raise AdapterError(
                    f"{key} is no matrix of floating-point numbers.",
                    where=str(folder / WEIGHTS),
                    why=f"it is {list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}",
                    fix="save the adapter again in float32, float16 or bfloat16",
                )
            pair[match[2]] = tensor
        elif owner is not None:
            whole.setdefault(owner, {})[name.removeprefix(f"{owner}.")] = tensor
        else:
            raise AdapterError(
                f"{key} is no part of an adapter that is supported.",
                where=str(folder / WEIGHTS),
                why="only A and B of linear maps and the modules in modules_to_save are read",
                fix="merge it into its base with PEFT, or train it without LoRA on embeddings and head",
            )
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    absent = [path for path in outer if path not in whole and any(True for _ in model.get_submodule(path).parameters())]
    if absent:
        raise AdapterError(
            f"The weights of {some(absent)} are missing.",
            where=str(folder / WEIGHTS),
            why=f"{CONFIG} says that they were trained whole (modules_to_save)",
            fix="copy the whole adapter folder again",
        )
    broken = [name for name, pair in halves.items() if len(pair) != 2]
    if broken or not halves:
        raise AdapterError(
            f"Half of the adapter of {broken[0]} is missing." if broken else "The file holds no adapter.",
            where=str(folder / WEIGHTS),
            fix="copy the file again",
        )
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, whole


def check_targets(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], settings: Settings, folder: Path
) -> tuple[str, ...]:
    """Compares the modules and ranks that the config names with those in the file.

    Returns:
        Sentences about names in ``target_modules`` that fit no module of this model, which other readers ignore.

    Raises:
        AdapterError: When the two contradict each other.
    """
    config = str(folder / CONFIG)
    foreign = sorted(name for name in factors if not settings.is_target(name))
    if foreign:
        raise AdapterError(
            f"The adapter's config does not target {some(foreign)}, but the weights hold an adapter there.",
            where=f"{config}: target_modules",
            why="config and weights belong to different adapters; another reader would leave these weights out",
            fix="copy the whole adapter folder again",
        )
    for name, (lora_a, _) in factors.items():
        if len(lora_a) != settings.rank_of(name):
            raise AdapterError(
                f"The adapter of {name} has rank {len(lora_a)}; its config says {settings.rank_of(name)}.",
                where=f"{config}: r, rank_pattern",
                why="config and weights belong to different adapters, and the scale depends on the rank",
                fix="copy the whole adapter folder again",
            )
    if settings.target_modules in (None, "all-linear"):
        return ()
    paths = [name.removesuffix(".base") for name, module in model.named_modules() if is_linear(module)]
    missing = sorted(path for path in paths if settings.is_target(path) and path not in factors)
    if missing:
        raise AdapterError(
            f"The adapter of {some(missing)} is missing.",
            where=str(folder / WEIGHTS),
            why=f"the config names {len(missing) + len(factors)} modules of this model; the file has {len(factors)}",
            fix="copy the file again, or take the base it was trained on",
        )
    listed = settings.target_modules if isinstance(settings.target_modules, list) else []
    unknown = [entry for entry in listed if not any(f".{path}".endswith(f".{entry}") for path in paths)]
    return (f"target_modules names {some(unknown)}, which this model does not have",) if unknown else ()


def check_factors(model: nn.Module, name: str, factors: tuple[Tensor, Tensor], folder: Path) -> None:
    """Whether A and B of one module fit the model.

    Raises:
        AdapterError: When the module is not there, is no linear map, is of another size, or a value is not finite.
    """
    where = str(folder / WEIGHTS)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterError(
            f"The adapter changes {name}, which this model does not have.",
            where=where,
            fix=f"take the base it was trained on (base_model_name_or_path in {CONFIG})",
        ) from None
    module = getattr(module, "base", module)
    if not is_linear(module):
        raise AdapterError(
            f"The adapter changes {name}, a {type(module).__name__}; only linear maps can be.", where=where
        )
    out_features, in_features = features(module)
    lora_a, lora_b = factors
    if lora_a.shape != (len(lora_a), in_features) or lora_b.shape != (out_features, len(lora_a)):
        raise AdapterError(
            f"The adapter of {name} has other sizes than the model.",
            where=where,
            why=f"A is {list(lora_a.shape)}, B {list(lora_b.shape)}; W is [{out_features}, {in_features}]",
            fix=f"take the base it was trained on (base_model_name_or_path in {CONFIG})",
        )
    if not (torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
        raise AdapterError(f"The adapter of {name} holds NaN or infinity.", where=where)


def load_whole(model: nn.Module, name: str, state: dict[str, Tensor], folder: Path) -> None:
    """Gives a module that was trained whole its weights.

    Raises:
        AdapterError: When they are of other names or sizes.
    """
    parameters = dict(model.get_submodule(name).named_parameters(remove_duplicate=False))
    if set(parameters) != set(state) or any(parameters[key].shape != tensor.shape for key, tensor in state.items()):
        raise AdapterError(
            f"{name}, trained whole, does not fit the model.",
            where=str(folder / WEIGHTS),
            why=f"the file has { {k: list(t.shape) for k, t in state.items()} }, "
            f"the model { {k: list(p.shape) for k, p in parameters.items()} }",
            fix=f"take the base it was trained on (base_model_name_or_path in {CONFIG})",
        )
    broken = [key for key, tensor in state.items() if tensor.dtype not in _DTYPES or not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterError(f"{name}.{broken[0]} holds NaN, infinity or no numbers.", where=str(folder / WEIGHTS))
    with torch.no_grad():
        for key, tensor in state.items():
            if parameters[key].is_meta:  # of a model whose bytes are elsewhere
                path, _, leaf = key.rpartition(".")
                own = nn.Parameter(tensor.to(parameters[key].dtype), requires_grad=True)
                setattr(model.get_submodule(name).get_submodule(path), leaf, own)
            else:
                parameters[key].copy_(tensor)
