"""Invalid combinations of the options of an objective."""

from __future__ import annotations

from ingle.config.evaluate import METRICS_OF
from ingle.config.objective import Answer, Classify, Mlm, Span, Tag, outside_scheme, reads_answers
from ingle.config.rule import Rule, duplicates
from ingle.config.run import Run
from ingle.wording import either

#: Options of ``span`` by the styles that read them.
_SPAN_OPTIONS = {
    "density": ("t5",),
    "mean_length": ("t5",),
    "sentinels": ("t5", "ul2"),
    "mode_tokens": ("ul2",),
    "rate": ("bart",),
    "poisson": ("bart",),
    "random": ("bart",),
    "permute_sentences": ("bart",),
}


def _unused_span_options(run: Run) -> str:
    """Returns the options of ``span`` that differ from their defaults and that its style does not read."""
    objective = run.objective
    if not isinstance(objective, Span):
        return ""
    default = Span(kind="span")
    changed = (name for name in _SPAN_OPTIONS if getattr(objective, name) != getattr(default, name))
    return ", ".join(f"objective.{name}" for name in changed if objective.style not in _SPAN_OPTIONS[name])


def _stride(run: Run) -> int:
    return run.objective.stride if isinstance(run.objective, Tag | Answer) else 0


def _labels(run: Run) -> tuple[str, ...]:
    return (run.objective.labels or ()) if isinstance(run.objective, Classify | Tag) else ()


def _outside(run: Run) -> str:
    """Returns the labels that the scheme of tags does not have."""
    scheme = run.objective.scheme if isinstance(run.objective, Tag) else "auto"
    return ", ".join(tag for tag in _labels(run) if outside_scheme(tag, scheme))


def _metrics(run: Run) -> tuple[str, ...]:
    return () if run.task is None else run.task.metrics or ()


def _unsuited_metrics(run: Run) -> str:
    """Returns the metrics of the task that a model of this objective cannot be scored by."""
    metrics = (run.evaluate.metrics or ()) if run.task is not None and run.evaluate is not None else ()
    return ", ".join(name for name in metrics if name not in METRICS_OF[run.objective.kind])


def _weighted(objective: Classify) -> bool:
    return objective.class_weights != "none"


OBJECTIVE_RULES: tuple[Rule[Run], ...] = (
    Rule(
        "only-sft-distinguishes-turns",
        lambda run: (
            run.objective.kind != "sft" and not reads_answers(run.objective.kind) and run.data.train_on == "last"
        ),
        lambda run: f"Only supervised fine-tuning (sft) distinguishes turns; {run.objective.kind} does not.",
        "data.train_on, objective.kind",
        "--objective.kind=sft, or remove data.train_on",
    ),
    Rule(
        "system-needs-conversations",
        lambda run: (
            run.objective.kind not in ("clm", "sft")
            and not reads_answers(run.objective.kind)
            and run.data.system is not None
        ),
        lambda run: f"data.system has no effect: {run.objective.kind} reads texts, not conversations.",
        "data.system, objective.kind",
        ("data.system=null", "objective.kind=sft"),
    ),
    Rule(
        "only-plain-text-splits",
        lambda run: run.objective.kind not in ("clm", "mlm", "span") and run.data.too_long == "split",
        lambda run: (
            "A conversation cannot be split: its second part would contain answers without their questions."
            if run.objective.kind == "sft" or reads_answers(run.objective.kind)
            else f"A row of {run.objective.kind} cannot be split: its parts would lack their labels."
        ),
        "data.too_long, objective.kind",
        ("data.too_long=truncate", "data.too_long=drop", "objective.kind=clm"),
    ),
    Rule(
        "masked-tokens-add-up",
        lambda run: isinstance(run.objective, Mlm) and run.objective.replace + run.objective.random > 1,
        "More tokens would be replaced than are chosen: the shares of masks and random tokens add up to more than 1.",
        "objective.replace, objective.random",
        ("objective.random=0",),
    ),
    Rule(
        "span-options-fit-the-style",
        lambda run: bool(_unused_span_options(run)),
        lambda run: f"{_unused_span_options(run)} has no effect with this style of span corruption.",
        "objective.style",
        lambda run: f"remove {_unused_span_options(run)}, or choose another objective.style",
    ),
    Rule(
        "modes-are-known",
        lambda run: (
            isinstance(run.objective, Span)
            and bool(run.objective.mode_tokens)
            and run.objective.mode_tokens.keys() != {"R", "X", "S"}
        ),
        "UL2 has the modes R, X and S; each needs its token.",
        "objective.mode_tokens",
        "objective.mode_tokens: {R: '[NLU]', X: '[NLG]', S: '[S2S]'}",
    ),
    Rule(
        "bytes-of-whole-texts",
        lambda run: isinstance(run.objective, Span) and "bits_per_byte" in _metrics(run),
        "bits_per_byte needs the likelihood of a whole text; span predicts what is removed from it.",
        "evaluate.metrics, objective.kind",
        ("evaluate.metrics=[perplexity]",),
    ),
    Rule(
        "windows-advance",
        lambda run: isinstance(run.objective, Tag | Answer) and 2 * run.objective.stride > run.data.max_seq_len,
        lambda run: (
            f"Windows of {run.data.max_seq_len} tokens that share {_stride(run)} hardly advance in a long text."
        ),
        "objective.stride, data.max_seq_len",
        lambda run: (f"objective.stride={run.data.max_seq_len // 4}", f"data.max_seq_len={4 * _stride(run)}"),
    ),
    Rule(
        "labels-once",
        lambda run: bool(duplicates(_labels(run))),
        lambda run: f"The list of labels contains duplicates: {duplicates(_labels(run))}.",
        "objective.labels",
        "name each label once",
    ),
    Rule(
        "tags-fit-the-scheme",
        lambda run: bool(_outside(run)),
        lambda run: f"The scheme of tags does not have {_outside(run)}.",
        "objective.labels, objective.scheme",
        ("objective.scheme=auto",),
    ),
    Rule(
        "metrics-suit-the-objective",
        lambda run: bool(_unsuited_metrics(run)),
        lambda run: f"A model of objective.kind = {run.objective.kind} cannot be scored by {_unsuited_metrics(run)}.",
        "evaluate.metrics, objective.kind",
        lambda run: f"use {either(sorted(METRICS_OF[run.objective.kind]))}, or remove evaluate.metrics",
    ),
    Rule(
        "one-weight-per-label",
        lambda run: (
            isinstance(run.objective, Classify)
            and isinstance(run.objective.class_weights, tuple)
            and len(run.objective.class_weights) != len(run.objective.labels or ())
        ),
        "A list of class weights needs a list of labels of the same length.",
        "objective.class_weights, objective.labels",
        ("objective.class_weights=balanced",),
    ),
    Rule(
        "numbers-have-no-classes",
        lambda run: (
            isinstance(run.objective, Classify)
            and run.objective.problem in ("regression", "multi")
            and (run.objective.label_smoothing > 0 or _weighted(run.objective))
        ),
        "Class weights and label smoothing need one class per row (problem: single).",
        "objective.problem, objective.class_weights, objective.label_smoothing",
        ("objective.problem=single",),
    ),
)
