"""``report.html``: a self-contained page that shows uncertainty as clearly as gains."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rapidfuzz.distance import LCSseq

from ingle.config.loader import run_to_yaml
from ingle.config.objective import Classify, ObjectiveConfig, ObjectiveKind
from ingle.config.run import Run
from ingle.report import charts, training_curves, verdicts
from ingle.report.charts import Estimate, both_widths
from ingle.report.metrics import Metric, find_metric
from ingle.report.results import MetricComparison, Pair, RunReport, SampleComparison
from ingle.report.run_details import adapter_words, compare_memory, list_facts
from ingle.report.templates import render
from ingle.wording import plural, size

#: What the loss of each objective is measured in; that of a regression is a squared error.
_UNITS: Mapping[ObjectiveKind, str] = {
    "clm": "nats per supervised token",
    "sft": "nats per supervised token",
    "mlm": "nats per masked token",
    "span": "nats per target token",
    "seq2seq": "nats per target token",
    "classify": "nats per label",
    "tag": "nats per tagged word",
    "answer": "nats per window",
    "reward": "nats per pair",
    "dpo": "nats per pair",
    "kto": "per answer",
    "orpo": "nats per pair",
    "simpo": "nats per pair",
    "cpo": "nats per pair",
    "bco": "nats per answer",
    **dict.fromkeys(("ppo", "grpo", "rloo", "reinforce"), "units of the reward"),
    "online_dpo": "nats per pair",
    "raft": "nats per supervised token",
    "distill": "nats per token",
}

#: Longer answers are shown without marks.
MAX_MARKED_WORDS = 600


def render_page(run: Run, report: RunReport, steps: Sequence[Mapping[str, Any]]) -> str:
    """Returns the HTML of the page.

    Args:
        run: The resolved config.
        report: The content of ``report.json``.
        steps: Lines of ``metrics.jsonl``.
    """
    return render(
        "report.html",
        "report.css",
        name=Path(run.output).name,
        subtitle=_subtitle(run),
        hero=_hero(report),
        base_name=report.base_name or "base",
        others=[other.verdict for name, other in (report.comparisons or {}).items() if name != report.base_name],
        rows=[_metric_row(find_metric(name), row) for name, row in report.metrics.items()],
        correction=verdicts.correction(len(report.metrics)),
        classes=_classes(report),
        interval_charts=_interval_charts(report.metrics),
        curves=training_curves.draw(loss_unit(run.objective), steps, report.validation),
        groups=_groups(report),
        facts=list_facts(run, report),
        memory=compare_memory(report),
        modules=report.audit.get("classes", ()),
        size=size,
        config=run_to_yaml(run),
    )


def _subtitle(run: Run) -> str:
    adapter = adapter_words(run.adapter.model_dump(mode="json"))
    base = "" if run.base.format == "none" else f" on {run.base.format.upper()}"
    return f"{run.model.id} · {adapter}{base} · {', '.join(source.path for source in run.data.sources)}"


def _hero(report: RunReport) -> dict[str, Any] | None:
    if report.headline is None:
        return None
    row = report.metrics[report.headline]
    correction = verdicts.correction(len(report.metrics))
    words = {"better": "Better", "worse": "Worse", "unclear": "No significant difference"}
    metric = find_metric(report.headline)
    return {
        **_figures(metric, row),
        "word": "Not significant after correction" if verdicts.lost_by_correction(row) else words[row.outcome],
        "p": verdicts.p_relation(row.p, floor=row.p_floor),
        "corrected": f"{verdicts.corrected_p(row)} {correction}" if correction else None,
        "few": verdicts.few_samples(row.n),
        "counts": f"{plural(row.num_better, 'sample')} got better, {row.num_worse:,} worse, {row.num_equal:,} equal",
        "mde": metric.format(row.mde80, signed=True).removeprefix("+") if row.mde80 else None,
    }


def _figures(metric: Metric, row: MetricComparison) -> dict[str, str]:
    return {
        "title": metric.title,
        "base": metric.format(row.base),
        "tuned": metric.format(row.tuned),
        "delta": metric.format(row.delta, signed=True),
        "interval": metric.format_interval(row.ci95, signed=True),
        "n": f"{row.n:,}",
        "outcome": row.outcome,
    }


def _metric_row(metric: Metric, row: MetricComparison) -> dict[str, Any]:
    counts = {"better": row.num_better, "equal": row.num_equal, "worse": row.num_worse}
    return {
        **_figures(metric, row),
        "direction": metric.direction,
        "own": {"base": _plain_interval(metric, row.base_ci95), "tuned": _plain_interval(metric, row.tuned_ci95)},
        "p": _bare(verdicts.p_relation(row.p, floor=row.p_floor)),
        "p_holm": _bare(verdicts.corrected_p(row)),
        "p_exact": None if row.test == row.test_exact else _bare(verdicts.p_relation(row.p_exact)),
        "counts": {key: f"{count:,}" for key, count in counts.items()},
        "shares": {key: 100 * count / max(1, row.n) for key, count in counts.items()},
        "test": row.test,
        "test_exact": row.test_exact,
        "interval_name": row.interval,
        "signature": row.signature,
        "unparsed": row.unparsed if row.unparsed and (row.unparsed.base or row.unparsed.tuned) else None,
    }


def _classes(report: RunReport) -> dict[str, Any] | None:
    """Returns the figures of each label, and the confusion matrix with the share of each cell in its row."""
    table = report.classes
    if table is None:
        return None
    figures = ("precision", "recall", "f1")
    rows = [
        {
            "name": row.name,
            "support": f"{row.support:,}",
            "pairs": [(f"{pair.base:.3f}", f"{pair.tuned:.3f}") for pair in (getattr(row, name) for name in figures)],
        }
        for row in table.rows
    ]
    names = [row.name for row in table.rows]
    cells = [
        [(f"{count:,}", count / max(1, sum(counts)), i == j) for j, count in enumerate(counts)]
        for i, counts in enumerate(table.confusion or ())
    ]
    return {"rows": rows, "names": names, "confusion": list(zip(names, cells, strict=True)) if cells else []}


def _bare(relation: str) -> str:
    return relation.removeprefix("p ").removeprefix("= ")


def _plain_interval(metric: Metric, bounds: Sequence[float | None]) -> str:
    return f"{metric.format(bounds[0]).removesuffix(' %')} – {metric.format(bounds[1])}"


def _interval_charts(metrics: Mapping[str, MetricComparison]) -> list[dict[str, Markup]]:
    """Draws bounded metrics on one axis of points, others on one of percent of the base per direction."""
    units = {"points": "tuned − base, in points of 100", "relative": "tuned − base, in % of the base's score"}
    groups: dict[tuple[str, bool], list[Estimate]] = defaultdict(list)
    for name, row in metrics.items():
        metric = find_metric(name)
        scale = metric.high if metric.chart == "points" else row.base
        if scale:
            sign = 1.0 if metric.higher_is_better else -1.0
            groups[metric.chart, not metric.higher_is_better].append(_estimate(metric, row, sign * 100.0 / scale))
    return [_draw_intervals(rows, units[chart], flipped) for (chart, flipped), rows in sorted(groups.items())]


def _draw_intervals(rows: Sequence[Estimate], unit: str, flipped: bool) -> dict[str, Markup]:
    return both_widths(lambda width: charts.interval_plot(rows, width=width, unit=unit, flipped=flipped))


def _estimate(metric: Metric, row: MetricComparison, factor: float) -> Estimate:
    """Returns a row of the chart; improvements are positive."""
    ends = [math.nan if end is None else end * factor for end in row.ci95]
    delta = math.nan if row.delta is None else row.delta
    note = f"{metric.title} {metric.format(row.delta, signed=True)} {metric.format_interval(row.ci95, signed=True)}"
    return Estimate(metric.title, delta * factor, min(ends), max(ends), row.outcome, note)


def loss_unit(objective: ObjectiveConfig) -> str:
    """Returns what the loss of an objective is measured in."""
    if isinstance(objective, Classify) and objective.problem == "regression":
        return "mean squared error"
    return _UNITS[objective.kind]


def _groups(report: RunReport) -> list[dict[str, Any]]:
    if report.shown is None or report.samples is None:
        return []
    samples = {sample.index: sample for sample in report.samples}
    groups = []
    for indices, heading, note in (
        (report.shown.random, "Random samples", "Drawn by the seed, not by score: judge the quality by these."),
        (report.shown.gains, "Largest gains", "Selected by the first metric, so they flatter the tuned model."),
        (report.shown.losses, "Largest losses", "Samples on which the tuned model did worst against its base."),
        (report.shown.errors or (), "Worst errors", "Lowest scores of the tuned model; surest mistakes first."),
    ):
        cards = [_card(samples[index], report) for index in indices]
        if cards and cards[0]["has_answers"]:
            groups.append({"heading": heading, "note": note, "cards": cards})
    return groups


def _card(sample: SampleComparison, report: RunReport) -> dict[str, Any]:
    base_name = report.base_name or "base"
    prompt, reference = ("Prompt", "Reference") if report.classes is None else ("Text", "Label")
    references = sample.references if report.classes is None else (" ".join(sample.references),)
    return {
        "names": {"prompt": prompt, "reference": reference},
        "number": (sample.index or 0) + 1,
        "origin": sample.origin,
        "prompt": sample.prompt,
        "references": references,
        "has_answers": sample.base is not None,
        "answers": [
            {
                "side": side,
                "title": title.capitalize(),
                "runs": mark_shared((answer or "").strip(), references),
                "blank": "only white space" if answer else "empty answer",
            }
            for side, title, answer in (("base", base_name, sample.base), ("tuned", "tuned", sample.tuned))
        ],
        "scores": [_score(find_metric(name), pair) for name, pair in sample.scores.items()],
    }


def _score(metric: Metric, pair: Pair) -> dict[str, str]:
    outcome = "equal"
    if pair.base is not None and pair.tuned is not None and not math.isclose(pair.base, pair.tuned, rel_tol=1e-9):
        outcome = "better" if metric.is_better(pair.tuned - pair.base) else "worse"
    base, tuned = (metric.format_sample(value) for value in (pair.base, pair.tuned))
    return {"title": metric.title, "base": base, "tuned": tuned, "outcome": outcome}


def mark_shared(answer: str, references: Sequence[str]) -> list[tuple[str, bool]]:
    """Splits an answer into runs, each with whether the closest reference has its words in this order.

    White space belongs to the word before it, so the joined runs are the answer.
    """
    words = answer.split()
    if not words or not references or len(words) > MAX_MARKED_WORDS:  # a text may have none of several labels
        return [(answer, False)] if answer else []
    folded = [_fold(word) for word in words]
    targets = [[_fold(word) for word in reference.split()] for reference in references]
    closest = max(targets, key=lambda target: LCSseq.normalized_similarity(folded, target))
    shared = [False] * len(words)
    for code in LCSseq.opcodes(folded, closest):
        if code.tag == "equal":
            shared[code.src_start : code.src_end] = [True] * (code.src_end - code.src_start)
    runs: list[tuple[str, bool]] = []
    place = 0
    for index, (word, is_shared) in enumerate(zip(words, shared, strict=True)):
        end = answer.index(word, place) + len(word)
        while index + 1 < len(words) and end < len(answer) and answer[end].isspace():
            end += 1
        end = len(answer) if index + 1 == len(words) else end
        piece, place = answer[place:end], end
        if runs and runs[-1][1] == is_shared:
            runs[-1] = (runs[-1][0] + piece, is_shared)
        else:
            runs.append((piece, is_shared))
    return _bare_marks(runs)


def _bare_marks(runs: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Returns runs whose marks end with a word, not with the white space after it."""
    bare: list[tuple[str, bool]] = []
    for text, is_shared in runs:
        end = len(text.rstrip()) if is_shared else len(text)
        bare += [(text[:end], is_shared), (text[end:], False)]
    return [run for run in bare if run[0]]


def _fold(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower() or word
