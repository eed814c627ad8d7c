"""Combinations that make no sense in a run."""

from __future__ import annotations

import os
from pathlib import Path

from ingle.config.adapter import LoraAdapter, LowRankAdapter, QaLoraAdapter
from ingle.config.base import TernaryBase, folding_formats, folds, why_not_quantized
from ingle.config.paths import expand, find_path
from ingle.config.rule import Rule
from ingle.config.run import Run


def _model_path(run: Run) -> str:
    return find_path(run.model.id, run.paths_from)


def _same_folder(one: str, other: str) -> bool:
    return os.path.realpath(expand(one)) == os.path.realpath(expand(other))


def _inside(path: str, folder: str) -> bool:
    return Path(os.path.realpath(expand(path))).is_relative_to(os.path.realpath(expand(folder)))


def _blocking_file(path: str) -> Path | None:
    """The file that stands where ``path`` or a folder above it would be."""
    folder = Path(expand(path))
    return next((part for part in (folder, *folder.parents) if os.path.exists(part) and not os.path.isdir(part)), None)


def _divisor(run: Run) -> int:
    """The largest micro-batch that fits into the global batch and is no larger than the one asked for."""
    whole, micro = run.train.global_batch_size, run.train.micro_batch_size or 1
    return next(size for size in range(min(micro, whole), 0, -1) if whole % size == 0)


def _both_ways(run: Run) -> list[str]:
    """Modules that are asked to be trained whole and through LoRA."""
    adapter = run.adapter
    if not isinstance(adapter, LowRankAdapter) or isinstance(adapter.target_modules, str):
        return []
    return sorted(set(adapter.target_modules) & set(adapter.trainable_modules))


def _is_gguf(run: Run) -> bool:
    """Whether the model is a GGUF file, whose tensors say what they are held in."""
    return run.model.id.lower().endswith(".gguf")


def _merges_into(run: Run) -> str | None:
    """The format that merge-aware training rounds to; None without it."""
    aware = run.adapter.merge_aware if isinstance(run.adapter, LoraAdapter) else None
    if aware is None or (aware.format is None and _is_gguf(run)):
        return None
    return aware.format or run.base.format


def _only_read(run: Run) -> dict[str, str]:
    """Formats that weights would have to be packed in although none can be, and why."""
    names = {name for name in ("none" if _is_gguf(run) else run.base.format, _merges_into(run)) if name is not None}
    reasons = {name: why_not_quantized(name) for name in sorted(names)}
    return {name: why for name, why in reasons.items() if why is not None}


def _trains_base(run: Run) -> bool:
    """Whether the base's weights are trained through their rounding."""
    return isinstance(run.base, TernaryBase) and run.base.train


def _reads_otherwise(run: Run) -> bool:
    """Whether control tokens inside messages are tokens in training and text in evaluation, or the other way round."""
    return run.evaluate is not None and (run.evaluate.control_tokens == "keep") != (run.data.control_tokens == "keep")


RUN_RULES: tuple[Rule[Run], ...] = (
    Rule(
        "control-tokens-alike",
        _reads_otherwise,
        lambda run: "Training and evaluation would read control tokens inside messages differently.",
        "data.control_tokens, evaluate.control_tokens",
        lambda run: f"--evaluate.control_tokens={run.data.control_tokens}",
    ),
    Rule(
        "micro-batch-divides",
        lambda run: (
            run.train.micro_batch_size is not None and run.train.global_batch_size % run.train.micro_batch_size != 0
        ),
        lambda run: (
            f"A global batch of {run.train.global_batch_size} sequences cannot be cut into micro-batches of "
            f"{run.train.micro_batch_size}."
        ),
        "train.micro_batch_size, train.global_batch_size",
        lambda run: f"--train.micro_batch_size={_divisor(run)}",
    ),
    Rule(
        "imatrix-needs-eager-layers",
        lambda run: run.train.imatrix and run.train.compile is True,
        lambda run: "Compiled layers do not show their inputs, so no importance matrix can be gathered from them.",
        "train.imatrix, train.compile",
        lambda run: "--train.compile=auto or --train.imatrix=false",
    ),
    Rule(
        "warmup-shorter-than-run",
        lambda run: run.train.num_steps is not None and (run.optim.warmup_steps or 0) >= run.train.num_steps,
        lambda run: (
            f"A warm-up of {run.optim.warmup_steps} steps leaves nothing of a run of {run.train.num_steps} steps: "
            "the learning rate would never reach its peak."
        ),
        "optim.warmup_steps, train.num_steps",
        lambda run: f"--optim.warmup_steps={(run.train.num_steps or 0) // 10}",
    ),
    Rule(
        "constant-has-no-end",
        lambda run: run.optim.schedule == "constant" and run.optim.min_lr_ratio > 0,
        lambda run: "A constant learning rate has no minimum to fall to.",
        "optim.min_lr_ratio, optim.schedule",
        lambda run: "--optim.min_lr_ratio=0 or --optim.schedule=cosine",
    ),
    Rule(
        "full-needs-plain-base",
        lambda run: run.adapter.kind == "none" and run.base.format != "none" and not _trains_base(run),
        lambda run: (
            f"Full fine-tuning changes every weight, and {run.base.format} weights are frozen bytes that cannot "
            "take a gradient."
        ),
        "adapter.kind, base.format",
        lambda run: "--base.format=none or --adapter.kind=lora",
    ),
    Rule(
        "some-formats-are-only-read",
        lambda run: bool(_only_read(run)),
        lambda run: " ".join(f"Weights cannot be packed as {name}: {why}." for name, why in _only_read(run).items()),
        "base.format, adapter.merge_aware.format, model.id",
        lambda run: "--model.id=FILE.gguf, a downloaded file in that type, or --base.format=q2_k",
    ),
    Rule(
        "trained-base-needs-no-adapter",
        lambda run: _trains_base(run) and run.adapter.kind != "none",
        lambda run: (
            f"The weights of the base are trained themselves; nothing is frozen for {run.adapter.kind} to adapt."
        ),
        "base.train, adapter.kind",
        lambda run: "--adapter.kind=none or --base.train=false",
    ),
    Rule(
        "random-needs-plain-base",
        lambda run: run.model.init == "random" and run.base.format != "none" and not _trains_base(run),
        lambda run: f"A random model held in {run.base.format} could never be trained out of its noise.",
        "model.init, base.format",
        lambda run: "--base.format=none or --model.init=pretrained",
    ),
    Rule(
        "random-needs-full",
        lambda run: run.model.init == "random" and run.adapter.kind != "none",
        lambda run: "LoRA learns a small change of a trained model; on a random one it has nothing to change.",
        "model.init, adapter.kind",
        lambda run: "--adapter.kind=none or --model.init=pretrained",
    ),
    Rule(
        "qa-lora-needs-offsets",
        lambda run: isinstance(run.adapter, QaLoraAdapter) and not _is_gguf(run) and not folds(run.base),
        lambda run: (
            f"QA-LoRA folds its change into a free offset for each group of weights, and {run.base.format} has none."
        ),
        "adapter.kind, base.format",
        lambda run: " or ".join(f"--base.format={name}" for name in folding_formats()) + ", or --adapter.kind=lora",
    ),
    Rule(
        "merges-into-a-format",
        lambda run: _merges_into(run) == "none",
        lambda run: "Merge-aware training needs to know the format that the merged weights will be held in.",
        "adapter.merge_aware.format, base.format",
        lambda run: "--adapter.merge_aware.format=q4_k, or the format that will be served",
    ),
    Rule(
        "clm-trains-on-all",
        lambda run: run.objective.kind == "clm" and run.data.train_on == "last",
        lambda run: "Language modelling (clm) learns from every token, so there is no last turn to single out.",
        "data.train_on, objective.kind",
        lambda run: "--objective.kind=sft, or leave data.train_on out",
    ),
    Rule(
        "only-clm-splits",
        lambda run: run.objective.kind == "sft" and run.data.too_long == "split",
        lambda run: "A conversation cannot be split: its second part would be answers without their questions.",
        "data.too_long, objective.kind",
        lambda run: "--data.too_long=truncate, --data.too_long=drop or --objective.kind=clm",
    ),
    Rule(
        "output-is-not-the-model",
        lambda run: _same_folder(run.output, _model_path(run)),
        lambda run: f"The run would be written over the model it starts from ({run.model.id}).",
        "output, model.id",
        lambda run: "--output=runs/NAME",
    ),
    Rule(
        "output-is-a-folder",
        lambda run: _blocking_file(run.output) is not None,
        lambda run: f"The run folder cannot be made: {_blocking_file(run.output)} is a file.",
        "output",
        lambda run: "--output=runs/NAME",
    ),
    Rule(
        "output-holds-no-start",
        lambda run: (
            isinstance(run.adapter, LowRankAdapter)
            and run.adapter.path is not None
            and _inside(find_path(run.adapter.path, run.paths_from), run.output)
        ),
        lambda run: "The run would write over the adapter it starts from.",
        "output, adapter.path",
        lambda run: "--output=runs/NAME",
    ),
    Rule(
        "one-way-of-training",
        lambda run: bool(_both_ways(run)),
        lambda run: f"{', '.join(_both_ways(run))} would be trained whole and through LoRA at once.",
        "adapter.target_modules, adapter.trainable_modules",
        lambda run: "name a module in one of the two lists only",
    ),
    Rule(
        "local-models-have-no-revision",
        lambda run: run.model.revision is not None and Path(_model_path(run)).is_dir(),
        lambda run: f"{run.model.id} is a folder, and a folder has no revisions.",
        "model.revision, model.id",
        lambda run: "--model.revision=null",
    ),
    Rule(
        "foreign-code-is-pinned",
        lambda run: run.model.trust_remote_code and run.model.revision is None and not Path(_model_path(run)).exists(),
        lambda run: (
            f"Python code from {run.model.id} would run on this machine, in whatever version the hub has today."
        ),
        "model.trust_remote_code, model.revision",
        lambda run: "--model.revision=COMMIT, the commit whose code you have read",
    ),
)
