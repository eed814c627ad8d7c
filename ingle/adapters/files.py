"""Adapters on disk, in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT, vLLM and llama.cpp's converter read what is written here, and adapters that PEFT trained load here. What
cannot be computed exactly (DoRA, trained biases, bases that the initialisation changed, ...) is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ingle.adapters.adapted import AttachReport, adapt, lora_modules, report, tied_modules, train_whole
from ingle.adapters.lora import features, is_linear
from ingle.adapters.targets import Selection
from ingle.atomic import write_atomically
from ingle.config.adapter import LoraAdapter
from ingle.errors import AdapterError
from ingle.quant.conversion import is_conv1d

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

#: Settings of PEFT's that change the arithmetic, with the value that leaves it plain.
_MUST_BE_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def adapter_config(folder: str | Path) -> LoraAdapter:
    """The adapter section that describes an adapter folder, without reading its weights.

    Raises:
        AdapterError: When the folder holds no adapter, or one that cannot be computed exactly.
    """
    settings = _read_settings(Path(folder))
    targets = settings.get("target_modules")
    patterns: Any = tuple(sorted(targets)) if isinstance(targets, list) and targets else "all-linear"
    return LoraAdapter(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        dropout=float(settings.get("lora_dropout") or 0.0),
        rslora=bool(settings.get("use_rslora")),
        target_modules=patterns,
        trainable_modules=tuple(settings.get("modules_to_save") or ()),
    )


def save_adapter(model: nn.Module, folder: str | Path, adapter: LoraAdapter, base_model_id: str) -> None:
    """Writes all adapters and all modules trained whole; a crash leaves the old file or the new one.

    Args:
        model: A model that ``attach`` has prepared.
        folder: Made if need be.
        adapter: What it was attached with.
        base_model_id: Hub id or folder of the base, for those who read the adapter.

    Raises:
        AdapterError: When the model holds no adapter.
    """
    modules = lora_modules(model)
    if not modules:
        raise AdapterError("this model has no adapter to save.", where=str(folder))
    whole = _trained_whole(model)
    tensors = {f"{_PREFIX}{name}.{key}": tensor for name in whole for key, tensor in _own_state(model, name).items()}
    for name, module in modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = module.lora_a.detach()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = module.lora_b.detach()
    # Tied weights are written under each of their names, as readers untie them.
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in sorted(tensors.items())}
    odd = {name: m for name, m in modules.items() if m.rank != adapter.rank or m.scale != adapter.scale}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_id,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": _alpha(adapter.scale, adapter.rank, adapter.rslora),
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(module.base) for module in modules.values()),
        "target_modules": _shortest_names(model, set(modules)),
        "modules_to_save": list(whole) or None,
        "init_lora_weights": True,
        "rank_pattern": {name: m.rank for name, m in odd.items() if m.rank != adapter.rank},
        "alpha_pattern": {name: _alpha(m.scale, m.rank, adapter.rslora) for name, m in odd.items()},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, (json.dumps(settings, indent=2) + "\n").encode())


def load_adapter(model: nn.Module, folder: str | Path) -> AttachReport:
    """Puts the adapter of a folder on a model: adapters are attached where it has some, and their weights read.

    Adapters that are there already must be those of the folder. Everything else is frozen.

    Raises:
        AdapterError: When files are missing, damaged, do not fit the model, or describe another kind of adapter.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    factors, whole = _sort_tensors(tensors, model, settings, folder)
    _check_targets(model, set(factors), settings, folder)
    existing = lora_modules(model)
    if existing and set(existing) != set(factors):
        raise AdapterError(
            "this adapter sits on other modules than adapter.target_modules names.",
            where=str(folder),
            why=f"only in the files: {_some(set(factors) - set(existing))}; "
            f"only in the config: {_some(set(existing) - set(factors))}",
            fix="give the target_modules it was trained with",
        )
    frozen = sorted(name for name in whole if existing and not _is_trained(model, name))
    if frozen:
        raise AdapterError(
            f"this adapter holds {', '.join(frozen)}, trained whole, which would stay frozen here.",
            where=str(folder),
            fix=f"set adapter.trainable_modules to [{', '.join(frozen)}]",
        )
    apart = tied_modules(model, tuple(whole))
    if existing and apart:
        raise AdapterError(
            f"this adapter trained {', '.join(whole)} apart from {', '.join(apart)}, and this model ties them.",
            where=str(folder),
            fix="train it with ensure_weight_tying in PEFT, or start without adapter.path",
        )
    for name, (lora_a, _) in factors.items():
        _check_factors(model, name, factors[name], folder)
        rank, scale = len(lora_a), _scale_of(name, len(lora_a), settings)
        if name in existing and (existing[name].rank != rank or abs(existing[name].scale - scale) > 1e-9 * scale):
            raise AdapterError(
                f"this adapter has rank {rank} and scale {scale:g}; the config asks for "
                f"rank {existing[name].rank} and scale {existing[name].scale:g}.",
                where=str(folder),
                fix=f"set adapter.rank to {rank} and adapter.alpha to {_alpha(scale, rank, False):g}",
            )
    if not existing:
        model.requires_grad_(False)
    for name, (lora_a, lora_b) in factors.items():
        rank = len(lora_a)
        dropout = float(settings.get("lora_dropout") or 0.0)
        module = existing.get(name) or adapt(model, name, rank, _scale_of(name, rank, settings), dropout)
        with torch.no_grad():
            module.lora_a.copy_(lora_a)
            module.lora_b.copy_(lora_b)
    names = tuple(whole)
    notes = () if existing else (*_untie(model, names), *train_whole(model, names))
    for name, state in whole.items():
        _load_whole(model, name, state, folder)
    return report(model, Selection(tuple(factors), names), notes)


def _untie(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Gives modules that share a weight with one outside ``names`` their own, as PEFT does with what it trains whole.

    Returns:
        Sentences about what is no longer shared.
    """
    apart = tied_modules(model, names)
    shared = {id(p) for path in apart for p in model.get_submodule(path).parameters(recurse=False)}
    for name in names:
        for module in model.get_submodule(name).modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in shared:
                    setattr(module, key, nn.Parameter(parameter.detach().clone()))
    return tuple(f"{path} keeps its own weight: the adapter trained {', '.join(names)} without it" for path in apart)


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    alpha = scale * rank**0.5 if rslora else scale * rank
    return int(alpha) if alpha == int(alpha) else alpha


def _scale_of(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Scale of one module; ``alpha_pattern`` may single it out."""
    alpha = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return float(alpha) / rank**0.5 if settings.get("use_rslora") else float(alpha) / rank


def _trained_whole(model: nn.Module) -> tuple[str, ...]:
    """Outermost modules that are trained whole, and those that share a weight with them."""
    names: list[str] = []
    for name, module in model.named_modules():
        own = [p for key, p in module.named_parameters() if ".lora_" not in f".{key}"]
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and own and not inside and all(p.requires_grad for p in own) and not _holds_lora(module):
            names.append(name)
    return (*names, *(n for n in tied_modules(model, tuple(names)) if n not in names))


def _is_trained(model: nn.Module, name: str) -> bool:
    return all(parameter.requires_grad for parameter in model.get_submodule(name).parameters())


def _holds_lora(module: nn.Module) -> bool:
    return bool(lora_modules(module))


def _own_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: p.detach() for key, p in model.get_submodule(name).named_parameters(remove_duplicate=False)}


def _shortest_names(model: nn.Module, names: set[str]) -> list[str]:
    """Last parts of the paths where they single out the adapted modules, whole paths otherwise."""
    others = {n.removesuffix(".base") for n, module in model.named_modules() if is_linear(module)} - names
    short: set[str] = set()
    for name in names:
        last = name.rpartition(".")[2]
        ambiguous = any(other.rpartition(".")[2] == last for other in others) or last.isdigit()
        short.add(name if ambiguous else last)
    return sorted(short)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{folder} holds no adapter.",
            where=str(path),
            fix="give a folder with adapter_config.json and adapter_model.safetensors in it",
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"adapters of type {kind} are not supported yet, only LORA.", where=f"{path}: peft_type")
        if not (isinstance(settings.get("r"), int) and isinstance(settings.get("lora_alpha"), int | float)):
            raise AdapterError("r or lora_alpha is missing.", where=str(path), fix="the file is damaged: copy it again")
    except (ValueError, AttributeError) as error:
        raise AdapterError("the adapter's config cannot be read.", where=str(path), why=str(error)) from None
    for key, plain in _MUST_BE_PLAIN.items():
        value = settings.get(key, plain[0])
        if value not in plain:
            raise AdapterError(
                f"this adapter uses {key} = {value!r}, which is not supported yet.",
                where=f"{path}: {key}",
                why="without it the model would answer differently from the one that was trained",
                fix="merge it into its base with PEFT, or train a plain LoRA",
            )
    return dict(settings)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        raise AdapterError(
            "the adapter's weights are missing.",
            where=str(path),
            why="there is an adapter_model.bin, a pickle that can run code" if pickled else None,
            fix="save it again with safetensors" if pickled else "copy the whole folder",
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            "the adapter's weights cannot be read.", where=str(path), why=str(error), fix="copy the file again"
        ) from None


def _sort_tensors(
    tensors: dict[str, Tensor], model: nn.Module, settings: Mapping[str, Any], folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict[str, Tensor]]]:
    """Splits the file into ``path -> (A, B)`` and ``path -> {key: tensor}`` for modules trained whole."""
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    saved = settings.get("modules_to_save") or ()
    paths = [name for name, _ in model.named_modules() if any(name == s or name.endswith(f".{s}") for s in saved)]
    if settings.get("ensure_weight_tying"):  # PEFT then names one module and saves all that share its weight
        paths += tied_modules(model, tuple(paths))
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        owner = next((path for path in paths if name.startswith(f"{path}.")), None)
        if match:
            halves.setdefault(match[1], {})[match[2]] = tensor
        elif owner is not None:
            whole.setdefault(owner, {})[name.removeprefix(f"{owner}.")] = tensor
        else:
            raise AdapterError(f"{key} is no part of an adapter that is supported.", where=str(folder / WEIGHTS))
    broken = [name for name, pair in halves.items() if len(pair) != 2]
    if broken or not halves:
        raise AdapterError(
            f"half of the adapter of {broken[0]} is missing." if broken else "the file holds no adapter.",
            where=str(folder / WEIGHTS),
            fix="copy the file again",
        )
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, whole


def _check_targets(model: nn.Module, found: set[str], settings: Mapping[str, Any], folder: Path) -> None:
    """Finds modules that the config names and the file lacks, where the config says it plainly."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or settings.get("layers_to_transform") or settings.get("exclude_modules"):
        return
    paths = {name.removesuffix(".base") for name, module in model.named_modules() if is_linear(module)}
    named = {path for path in paths if any(path == t or path.endswith(f".{t}") for t in targets)}
    missing = {
        path
        for path in named - found
        if not any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", path) for m in settings.get("modules_to_save") or ())
    }
    if missing:
        raise AdapterError(
            f"the adapter of {_some(missing)} is missing.",
            where=str(folder / WEIGHTS),
            why=f"target_modules names {len(named)} modules of this model; the file has {len(found)}",
            fix="copy the file again, or take the base it was trained on",
        )


def _check_factors(model: nn.Module, name: str, factors: tuple[Tensor, Tensor], folder: Path) -> None:
    where = str(folder / WEIGHTS)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterError(
            f"the adapter changes {name}, which this model does not have.",
            where=where,
            fix=f"take the base it was trained on (base_model_name_or_path in {CONFIG})",
        ) from None
    module = getattr(module, "base", module)
    if not is_linear(module):
        raise AdapterError(
            f"the adapter changes {name}, a {type(module).__name__}; only linear maps can be.", where=where
        )
    out_features, in_features = features(module)
    lora_a, lora_b = factors
    if lora_a.shape != (len(lora_a), in_features) or lora_b.shape != (out_features, len(lora_a)):
        raise AdapterError(
            f"the adapter of {name} has other sizes than the model.",
            where=where,
            why=f"A is {list(lora_a.shape)}, B {list(lora_b.shape)}; W is [{out_features}, {in_features}]",
            fix=f"take the base it was trained on (base_model_name_or_path in {CONFIG})",
        )
    if not (torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
        raise AdapterError(f"the adapter of {name} holds NaN or infinity.", where=where)


def _load_whole(model: nn.Module, name: str, state: dict[str, Tensor], folder: Path) -> None:
    parameters = dict(model.get_submodule(name).named_parameters(remove_duplicate=False))
    if set(parameters) != set(state) or any(parameters[key].shape != tensor.shape for key, tensor in state.items()):
        raise AdapterError(
            f"{name}, trained whole, does not fit the model.",
            where=str(folder / WEIGHTS),
            why=f"the file has { {k: list(t.shape) for k, t in state.items()} }, "
            f"the model { {k: list(p.shape) for k, p in parameters.items()} }",
            fix=f"take the base it was trained on (base_model_name_or_path in {CONFIG})",
        )
    with torch.no_grad():
        for key, tensor in state.items():
            if parameters[key].is_meta:  # of a model whose bytes are elsewhere
                path, _, leaf = key.rpartition(".")
                own = nn.Parameter(tensor.to(parameters[key].dtype), requires_grad=True)
                setattr(model.get_submodule(name).get_submodule(path), leaf, own)
            else:
                parameters[key].copy_(tensor)


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return (", ".join(shown) or "none") + (f" and {len(names) - 3} more" if len(names) > 3 else "")
