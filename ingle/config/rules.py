"""Invalid combinations of options: one table for runs, one for tasks.

A rule says when it applies, what is wrong, which options it concerns and what to type instead. All rules are checked,
so that every violation is reported at once.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from ingle.config.adapter import LoraAdapter, QaLoraAdapter
from ingle.config.adapter_kinds import Adapter
from ingle.config.adapter_rules import ADAPTER_RULES
from ingle.config.base import TernaryBase, folding_formats, folds, why_not_quantized
from ingle.config.evaluate import TaskConfig
from ingle.config.objective_rules import OBJECTIVE_RULES
from ingle.config.optim_rules import OPTIM_RULES
from ingle.config.paths import expand, find_path
from ingle.config.policy_rules import POLICY_RULES
from ingle.config.preference_rules import PREFERENCE_RULES
from ingle.config.problems import Problem, raise_problems
from ingle.config.reward_rules import REWARD_RULES
from ingle.config.rewards import ModelReward
from ingle.config.rule import Rule, duplicates
from ingle.config.run import Run
from ingle.config.section import Section
from ingle.config.validation_rules import VALIDATION_RULES


def find_violations(section: Section) -> list[Problem]:
    """Returns every violation of a rule by ``section``, a run or a task."""
    if isinstance(section, TaskConfig):
        found = [rule.check(section) for rule in TASK_RULES]
    else:
        assert isinstance(section, Run)
        found = [rule.check(section) for rule in RUN_RULES]
        if section.task is not None:
            found += [rule.check(section.task, "evaluate.") for rule in TASK_RULES]
    return [problem for problem in found if problem is not None]


def check(section: Run | TaskConfig) -> None:
    """Checks a run or task that was built in Python; the loader does this for files.

    Raises:
        ConfigError: With every rule that ``section`` violates.
    """
    raise_problems(find_violations(section))


def _model_path(run: Run) -> str:
    return find_path(run.model.id, run.paths_from)


def _same_folder(one: str, other: str) -> bool:
    return os.path.realpath(expand(one)) == os.path.realpath(expand(other))


def _is_inside(path: str, folder: str) -> bool:
    return Path(os.path.realpath(expand(path))).is_relative_to(os.path.realpath(expand(folder)))


def _blocking_file(path: str) -> Path | None:
    """Returns the file at ``path`` or at one of its parent folders."""
    folder = Path(expand(path))
    return next((part for part in (folder, *folder.parents) if os.path.exists(part) and not os.path.isdir(part)), None)


def _trained_twice(run: Run) -> str:
    """Returns the modules that are both fully trained and adapted."""
    targets = getattr(run.adapter, "target_modules", None)
    if not isinstance(run.adapter, Adapter) or isinstance(targets, str):
        return ""
    return ", ".join(sorted(set(targets or ()) & set(run.adapter.trainable_modules)))


def _is_gguf(run: Run) -> bool:
    return run.model.id.lower().endswith(".gguf")


def _merge_format(run: Run) -> str | None:
    """Returns the format that merge-aware training rounds to; None without it, or where a GGUF file decides."""
    aware = run.adapter.merge_aware if isinstance(run.adapter, LoraAdapter) else None
    if aware is None or (aware.format is None and _is_gguf(run)):
        return None
    return aware.format or run.base.format


def _read_only(run: Run) -> str:
    """Returns what is wrong with the formats that weights cannot be quantized to."""
    # The experts of a published gpt-oss are in MXFP4; loading refuses any other model.
    is_read = _is_gguf(run) or run.base.format == "mxfp4"
    names = {name for name in ("none" if is_read else run.base.format, _merge_format(run)) if name is not None}
    reasons = {name: why_not_quantized(name) for name in sorted(names)}
    return " ".join(f"Weights cannot be quantized to {name}: {why}." for name, why in reasons.items() if why)


def _trains_base(run: Run) -> bool:
    return isinstance(run.base, TernaryBase) and run.base.train


def _tokens_read_differently(run: Run) -> bool:
    return run.task is not None and (run.task.control_tokens == "keep") != (run.data.control_tokens == "keep")


RUN_RULES: tuple[Rule[Run], ...] = (
    Rule(
        "control-tokens-alike",
        _tokens_read_differently,
        "Training and evaluation would read control tokens inside messages differently.",
        "data.control_tokens, evaluate.control_tokens",
        lambda run: f"--evaluate.control_tokens={run.data.control_tokens}",
    ),
    Rule(
        "one-process-shares-nothing",
        lambda run: run.parallel.kind == "none" and (run.parallel.num_processes or 1) > 1,
        lambda run: f"parallel.kind = none is one process, not {run.parallel.num_processes}.",
        "parallel.kind, parallel.num_processes",
        ("parallel.kind=auto", "parallel.num_processes=1"),
    ),
    Rule(
        "groups-need-hsdp",
        lambda run: run.parallel.shard_size is not None and run.parallel.kind != "hsdp",
        lambda run: f"parallel.shard_size has no effect with parallel.kind = {run.parallel.kind}.",
        "parallel.shard_size, parallel.kind",
        ("parallel.kind=hsdp", "parallel.shard_size=null"),
    ),
    Rule(
        "groups-are-equal",
        lambda run: bool((run.parallel.num_processes or 0) % (run.parallel.shard_size or 1)),
        lambda run: f"{run.parallel.num_processes} processes cannot form groups of {run.parallel.shard_size} for hsdp.",
        "parallel.num_processes, parallel.shard_size",
        lambda run: (f"parallel.shard_size={math.gcd(run.parallel.num_processes or 1, run.parallel.shard_size or 1)}",),
    ),
    Rule(
        "only-a-frozen-base-is-offloaded",
        lambda run: run.parallel.offload is True and run.adapter.kind == "none",
        "parallel.offload keeps the frozen base in host memory, but full fine-tuning has none.",
        "parallel.offload, adapter.kind",
        ("parallel.offload=auto", "adapter.kind=lora"),
    ),
    Rule(
        "offload-needs-shards",
        lambda run: run.parallel.offload is True and run.parallel.kind in ("ddp", "zero1", "zero2"),
        lambda run: f"parallel.offload cannot be combined with parallel.kind = {run.parallel.kind}.",
        "parallel.offload, parallel.kind",
        ("parallel.kind=fsdp", "parallel.offload=auto"),
    ),
    Rule(
        "imatrix-needs-eager-layers",
        lambda run: run.train.imatrix and run.train.compile is True,
        "An importance matrix cannot be collected from compiled layers, because they hide their inputs.",
        "train.imatrix, train.compile",
        ("train.compile=auto", "train.imatrix=false"),
    ),
    Rule(
        "warmup-shorter-than-run",
        lambda run: run.train.num_steps is not None and (run.optim.warmup_steps or 0) >= run.train.num_steps,
        lambda run: (
            f"The warm-up of {run.optim.warmup_steps} steps is not shorter than the run of {run.train.num_steps} "
            "steps, so the learning rate would never reach its peak."
        ),
        "optim.warmup_steps, train.num_steps",
        lambda run: f"--optim.warmup_steps={(run.train.num_steps or 0) // 10}",
    ),
    Rule(
        "constant-has-no-end",
        lambda run: run.optim.schedule == "constant" and run.optim.min_lr_ratio > 0,
        "optim.min_lr_ratio has no effect: a constant learning rate does not fall.",
        "optim.min_lr_ratio, optim.schedule",
        ("optim.min_lr_ratio=0", "optim.schedule=cosine"),
    ),
    Rule(
        "full-needs-plain-base",
        lambda run: run.adapter.kind == "none" and run.base.format != "none" and not _trains_base(run),
        lambda run: f"Full fine-tuning needs unquantized weights; {run.base.format} weights cannot be trained.",
        "adapter.kind, base.format",
        ("base.format=none", "adapter.kind=lora"),
    ),
    Rule(
        "some-formats-are-only-read",
        lambda run: bool(_read_only(run)),
        _read_only,
        "base.format, adapter.merge_aware.format, model.id",
        "--base.format=q2_k, or --model.id=FILE.gguf with a file that is already in this format",
    ),
    Rule(
        "trained-base-needs-no-adapter",
        lambda run: _trains_base(run) and run.adapter.kind != "none",
        lambda run: f"base.train trains the weights of the base, which leaves nothing frozen for {run.adapter.kind}.",
        "base.train, adapter.kind",
        ("adapter.kind=none", "base.train=false"),
    ),
    Rule(
        "random-needs-plain-base",
        lambda run: run.model.init == "random" and run.base.format != "none" and not _trains_base(run),
        lambda run: f"Random weights must be trained, but {run.base.format} weights are frozen.",
        "model.init, base.format",
        ("base.format=none", "model.init=pretrained"),
    ),
    Rule(
        "random-needs-full",
        lambda run: run.model.init == "random" and run.adapter.kind != "none",
        "Random weights must be trained, but an adapter leaves the base frozen.",
        "model.init, adapter.kind",
        ("adapter.kind=none", "model.init=pretrained"),
    ),
    Rule(
        "qa-lora-needs-offsets",
        lambda run: isinstance(run.adapter, QaLoraAdapter) and not _is_gguf(run) and not folds(run.base),
        lambda run: f"QA-LoRA needs a format with a free offset per group of weights; {run.base.format} has none.",
        "adapter.kind, base.format",
        (*(f"base.format={name}" for name in folding_formats()), "adapter.kind=lora"),
    ),
    Rule(
        "merges-into-a-format",
        lambda run: _merge_format(run) == "none",
        "Merge-aware training needs the format of the merged weights.",
        "adapter.merge_aware.format, base.format",
        "--adapter.merge_aware.format=q4_k, or the format that you will serve",
    ),
    Rule(
        "output-is-not-the-model",
        lambda run: _same_folder(run.output, _model_path(run)),
        lambda run: f"The run would overwrite the model that it starts from ({run.model.id}).",
        "output, model.id",
        ("output=runs/NAME",),
    ),
    Rule(
        "output-is-a-folder",
        lambda run: _blocking_file(run.output) is not None,
        lambda run: f"The run folder cannot be created: {_blocking_file(run.output)} is a file.",
        "output",
        ("output=runs/NAME",),
    ),
    Rule(
        "output-is-not-the-adapter",
        lambda run: (
            isinstance(run.adapter, Adapter)
            and run.adapter.path is not None
            and _is_inside(find_path(run.adapter.path, run.paths_from), run.output)
        ),
        "The run would overwrite the adapter that it starts from.",
        "output, adapter.path",
        ("output=runs/NAME",),
    ),
    Rule(
        "trained-or-adapted",
        lambda run: bool(_trained_twice(run)),
        lambda run: f"Modules cannot be both fully trained and adapted: {_trained_twice(run)}.",
        "adapter.target_modules, adapter.trainable_modules",
        "name each module in only one of the two lists",
    ),
    Rule(
        "local-models-have-no-revision",
        lambda run: run.model.revision is not None and Path(_model_path(run)).is_dir(),
        lambda run: f"{run.model.id} is a local folder, which has no revisions.",
        "model.revision, model.id",
        ("model.revision=null",),
    ),
    Rule(
        "foreign-code-is-pinned",
        lambda run: run.model.trust_remote_code and run.model.revision is None and not Path(_model_path(run)).exists(),
        lambda run: f"Python code from {run.model.id} would run in its latest version, which can change at any time.",
        "model.trust_remote_code, model.revision",
        "--model.revision=COMMIT, a commit whose code you have read",
    ),
    *ADAPTER_RULES,
    *OBJECTIVE_RULES,
    *OPTIM_RULES,
    *PREFERENCE_RULES,
    *POLICY_RULES,
    *REWARD_RULES,
    *VALIDATION_RULES,
)


def _compile(pattern: str | None) -> re.Pattern[str] | str | None:
    """Compiles a regular expression, or returns what is wrong with it."""
    try:
        return None if pattern is None else re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # the last two: huge repetitions, deep nesting
        return str(error)


def _has_no_group(pattern: str | None) -> bool:
    compiled = _compile(pattern)
    return isinstance(compiled, re.Pattern) and compiled.groups == 0


TASK_RULES: tuple[Rule[TaskConfig], ...] = (
    Rule(
        "reward-needs-rewards",
        lambda task: "reward" in (task.metrics or ()) and not task.rewards,
        "The metric reward needs something to add up.",
        "metrics, rewards",
        ("rewards=FILE.py",),
    ),
    Rule(
        "models-are-no-metric",
        lambda task: any(isinstance(reward, ModelReward) for reward in task.rewards),
        "A trained reward model cannot score the answers of a task.",
        "rewards",
        "remove the reward of kind model",
    ),
    Rule(
        "metrics-once",
        lambda task: bool(duplicates(task.metrics or ())),
        lambda task: f"The list of metrics contains duplicates: {duplicates(task.metrics or ())}.",
        "metrics",
        lambda task: (f"metrics=[{','.join(dict.fromkeys(task.metrics or ()))}]",),
    ),
    Rule(
        "pattern-is-a-regex",
        lambda task: isinstance(_compile(task.answer_pattern), str),
        lambda task: f"The answer pattern is not a regular expression: {_compile(task.answer_pattern)}.",
        "answer_pattern",
        (r"answer_pattern='#### (\S+)'",),
    ),
    Rule(
        "pattern-has-a-group",
        lambda task: _has_no_group(task.answer_pattern),
        "The answer pattern needs a group that captures the answer.",
        "answer_pattern",
        lambda task: (f"answer_pattern='({task.answer_pattern})'",),
    ),
    Rule(
        "pattern-needs-exact-match",
        lambda task: task.answer_pattern is not None and "exact_match" not in (task.metrics or ()),
        "The answer pattern has no effect: only the metric exact_match uses it.",
        "answer_pattern, metrics",
        lambda task: (f"metrics=[{','.join(('exact_match', *(task.metrics or ())))}]", "answer_pattern=null"),
    ),
    Rule(
        "top-p-needs-temperature",
        lambda task: task.top_p < 1 and task.temperature == 0,
        lambda task: f"top_p = {task.top_p} has no effect: decoding at temperature 0 is greedy.",
        "top_p, temperature",
        ("temperature=0.7", "top_p=1"),
    ),
    Rule(
        "stop-is-not-empty",
        lambda task: "" in task.stop,
        "An empty stop string would end every answer before its first token.",
        "stop",
        lambda task: (f"stop={[text for text in task.stop if text]}",),
    ),
)
