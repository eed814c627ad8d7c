"""The adapter section that describes an adapter folder, from its config and Ingle's record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ingle.adapters.kind_files import read_section
from ingle.adapters.peft_config import CONFIG_FILE, NO_TARGETS, PeftConfig, alpha_of, read_peft_config
from ingle.adapters.peft_tensors import read_record
from ingle.config.adapter import SUBTRACTING, AdapterConfig, DoraAdapter, LoraAdapter, QaLoraAdapter
from ingle.errors import AdapterError


def adapter_config(folder: str | Path) -> AdapterConfig:
    """Returns the adapter section that describes an adapter folder, without reading its weights.

    Raises:
        AdapterError: The folder contains no adapter, or one that cannot be computed exactly.
    """
    other: Any = read_section(Path(folder))
    return _low_rank(Path(folder)) if other is None else other


def _low_rank(folder: Path) -> LoraAdapter | DoraAdapter | QaLoraAdapter:
    config = read_peft_config(folder)
    if config.lora_alpha <= 0 or config.lora_dropout == 1:
        raise AdapterError(
            "Training cannot start from this adapter.",
            where=str(folder / CONFIG_FILE),
            why=f"lora_alpha is {config.lora_alpha:g} and lora_dropout is {config.lora_dropout or 0:g}",
            fix="use an adapter with lora_alpha above 0 and lora_dropout below 1",
        )
    targets = config.target_modules
    patterns: Any = tuple(sorted(targets)) if isinstance(targets, list) and targets else "all-linear"
    if targets == NO_TARGETS:
        patterns = "none"
    options = read_record(folder).adapter
    # The change that such an adapter began with is saved with it, as the second half of its rank.
    times = 2 if options.init in SUBTRACTING else 1
    ranks = config.rank_pattern or {}
    if any(rank % times for rank in (config.r, *ranks.values())):
        raise AdapterError(
            f"An adapter that began with init = {options.init} has even ranks only.",
            where=f"{folder / CONFIG_FILE}: r, rank_pattern",
            fix="copy the complete adapter folder again",
        )
    rslora = bool(config.use_rslora)
    shared: dict[str, Any] = {
        "rank": config.r // times,
        "rank_pattern": {name: rank // times for name, rank in ranks.items()},
        "alpha": _alpha(config, times),
        "dropout": config.lora_dropout or 0.0,
        "rslora": rslora,
        "target_modules": patterns,
        "trainable_modules": tuple(config.modules_to_save or ()),
    }
    if options.kind == "qa_lora":
        return QaLoraAdapter(kind="qa_lora", train_rounding=options.train_rounding, **shared)
    shared |= {"init": options.init, "freeze_a": options.freeze_a}
    if config.use_dora:
        return DoraAdapter(kind="dora", **shared)
    return LoraAdapter(merge_aware=options.merge_aware, **shared)


def _alpha(config: PeftConfig, times: int) -> float | None:
    """Returns the alpha of ranks that are ``times`` smaller; None where each module's is twice its rank."""

    def shrink(alpha: float, rank: int) -> float:
        scale = alpha / rank**0.5 if config.use_rslora else alpha / rank
        return alpha_of(scale, rank // times, bool(config.use_rslora))

    alpha = config.lora_alpha if times == 1 else shrink(config.lora_alpha, config.r)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    own = [(shrink(alphas.get(name, config.lora_alpha), rank), rank // times) for name, rank in ranks.items()]
    doubled = all(abs(value - 2 * rank) < 1e-6 * value for value, rank in (*own, (alpha, config.r // times)))
    return None if own and doubled else alpha
