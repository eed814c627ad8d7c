"""``report.html``: one page that needs no other file, and shows doubts as clearly as gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rapidfuzz.distance import LCSseq

from ingle.config.loader import run_to_yaml
from ingle.config.run import Run
from ingle.evaluation import wording
from ingle.evaluation.facts import compare_memory, list_facts, list_modules
from ingle.report import charts
from ingle.report.charts import Estimate
from ingle.report.templates import render
from ingle.wording import plural

#: Widths of the two drawings of a chart, in pixels.
WIDE, NARROW = 880, 340

#: Longer answers are shown without marks.
MAX_MARKED_WORDS = 600

_SCALED = {"exact_match": 100.0, "bleu": 1.0, "chrf": 1.0, "rouge_l": 100.0}


def render_page(run: Run, report: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        run: The resolved config.
        report: The content of ``report.json``.
        steps: Rows of ``metrics.jsonl``.
    """
    return render(
        "report.html",
        "report.css",
        name=Path(run.output).name,
        subtitle=_subtitle(run),
        hero=_hero(report),
        rows=[_metric_row(name, row) for name, row in report["metrics"].items()],
        correction=_correction(report["metrics"]),
        interval_charts=_interval_charts(report["metrics"]),
        loss=_loss(steps),
        groups=_groups(report),
        facts=list_facts(run, report),
        memory=compare_memory(report),
        audit=list_modules(report),
        config=run_to_yaml(run),
    )


def _subtitle(run: Run) -> str:
    if run.adapter.kind == "none":
        adapter = "full fine-tuning"
    else:
        adapter = f"{'QA-LoRA' if run.adapter.kind == 'qa_lora' else 'LoRA'} rank {run.adapter.rank}"
    base = "" if run.base.format == "none" else f" on {run.base.format.upper()}"
    return f"{run.model.id} · {adapter}{base} · {', '.join(source.path for source in run.data.sources)}"


def _hero(report: Mapping[str, Any]) -> dict[str, Any] | None:
    if not report["metrics"]:
        return None
    name = report["headline"]
    row = report["metrics"][name]
    correction = _correction(report["metrics"])
    words = {"better": "Better", "worse": "Worse", "unclear": "No significant difference"}
    if row["outcome"] == "unclear" and row["p"] < wording.LEVEL <= row["p_holm"]:
        words["unclear"] = "Not significant after correction"
    return {
        "outcome": row["outcome"],
        "word": words[row["outcome"]],
        "title": wording.title(name),
        "base": wording.score(name, row["base"]),
        "tuned": wording.score(name, row["tuned"]),
        "delta": wording.score(name, row["delta"], signed=True),
        "interval": wording.interval(name, row["ci95"]),
        "p": wording.p_value(row["p"], floor=row["p_floor"]),
        "corrected": f"{wording.corrected_p(row)} {correction}" if correction else None,
        "n": f"{row['n']:,}",
        "few": wording.few_samples(row["n"]),
        "counts": f"{plural(row['num_better'], 'sample')} got better, {row['num_worse']:,} worse, "
        f"{row['num_equal']:,} equal",
        "mde": wording.score(name, row["mde80"]) if row["mde80"] else None,
    }


def _correction(metrics: Mapping[str, Any]) -> str | None:
    """What p-values are corrected for; None where there is nothing to correct."""
    return f"after correction for {len(metrics)} metrics" if len(metrics) > 1 else None


def _metric_row(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    total = max(1, row["n"])
    shares = {key: 100 * row[f"num_{key}"] / total for key in ("better", "equal", "worse")}
    own = {side: _plain_interval(name, row[f"{side}_ci95"]) for side in ("base", "tuned")}
    exact = None if row["test"] == row["test_exact"] else wording.p_value(row["p_exact"]).removeprefix("p ")
    unparsed = row.get("unparsed", {"base": 0, "tuned": 0})
    return {
        "title": wording.title(name),
        "direction": "higher is better" if row["higher_is_better"] else "lower is better",
        "base": wording.score(name, row["base"]),
        "tuned": wording.score(name, row["tuned"]),
        "own": own,
        "delta": wording.score(name, row["delta"], signed=True),
        "interval": wording.interval(name, row["ci95"]),
        "p": wording.p_value(row["p"], floor=row["p_floor"]).removeprefix("p ").removeprefix("= "),
        "p_holm": wording.corrected_p(row).removeprefix("p ").removeprefix("= "),
        "n": f"{row['n']:,}",
        "p_exact": exact.removeprefix("= ") if exact else None,
        "outcome": row["outcome"],
        "counts": {key: f"{row[f'num_{key}']:,}" for key in ("better", "equal", "worse")},
        "shares": shares,
        "test": row["test"],
        "test_exact": row["test_exact"],
        "interval_name": row["interval"],
        "signature": row["signature"],
        "unparsed": unparsed if any(unparsed.values()) else None,
    }


def _plain_interval(name: str, bounds: Sequence[float | None]) -> str:
    return f"{wording.score(name, bounds[0]).removesuffix(' %')} – {wording.score(name, bounds[1])}"


def _interval_charts(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Markup]]:
    """Bounded metrics on one axis of points, likelihoods on one of percent of the base."""
    bounded = [_estimate(name, row, _SCALED[name]) for name, row in metrics.items() if name in _SCALED]
    relative = [
        _estimate(name, row, -100.0 / row["base"])
        for name, row in metrics.items()
        if name not in _SCALED and row["base"]
    ]
    drawn = []
    if bounded:
        unit = "tuned − base, in points of 100"
        drawn.append(_both(lambda width: charts.interval_plot(bounded, width=width, unit=unit)))
    if relative:
        unit = "tuned − base, in % of the base's score"
        drawn.append(_both(lambda width: charts.interval_plot(relative, width=width, unit=unit, flipped=True)))
    return drawn


def _estimate(name: str, row: Mapping[str, Any], factor: float) -> Estimate:
    ends = [math.nan if end is None else end * factor for end in row["ci95"]]
    delta = math.nan if row["delta"] is None else row["delta"]
    note = (
        f"{wording.title(name)} {wording.score(name, row['delta'], signed=True)} {wording.interval(name, row['ci95'])}"
    )
    return Estimate(wording.title(name), delta * factor, min(ends), max(ends), row["outcome"], note)


def _both(draw: Any) -> dict[str, Markup]:
    return {"wide": Markup(draw(WIDE)), "narrow": Markup(draw(NARROW))}


def _loss(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    rows = [row for row in steps if math.isfinite(row["loss"])]
    if not rows:
        return None
    number, losses = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("step", "loss"))
    lrs = np.array([row["lr"] for row in rows], dtype=np.float64) if all("lr" in row for row in rows) else None
    means = charts.smooth(losses, charts.smoothing_span(len(losses)))
    drawn = _both(lambda width: charts.loss_curve(number, losses, lrs, width=width, height=300 if width > 500 else 230))
    return {
        **drawn,
        "first": f"{losses[0]:.3f}",
        "last": f"{means[-1]:.3f}",
        "span": charts.smoothing_span(len(losses)),
        "num_steps": f"{int(number[-1]):,}",
    }


def _groups(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    samples = {sample["index"]: sample for sample in report.get("samples", ())}
    texts = {
        "random": ("Drawn at random", "Chosen by the seed, not by score: judge the quality by these."),
        "gains": ("Largest gains", "Picked by the first metric; flattering by construction."),
        "losses": ("Largest losses", "Where the tuned model did worst against its base."),
    }
    groups = []
    for key, (heading, note) in texts.items():
        cards = [_card(samples[index], report) for index in report.get("shown", {}).get(key, ())]
        if cards and cards[0]["has_answers"]:
            groups.append({"heading": heading, "note": note, "cards": cards})
    return groups


def _card(sample: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    scores = []
    for name, pair in sample["scores"].items():
        was, now = pair["base"], pair["tuned"]
        rising = report["metrics"][name]["higher_is_better"]
        changed = was is not None and now is not None and not math.isclose(was, now, rel_tol=1e-9)
        outcome = ("better" if (now > was) == rising else "worse") if changed else "equal"
        scores.append(
            {
                "title": wording.title(name),
                "base": wording.sample_score(name, was),
                "tuned": wording.sample_score(name, now),
                "outcome": outcome,
            }
        )
    return {
        "number": sample["index"] + 1,
        "origin": sample["origin"],
        "prompt": sample["prompt"],
        "references": sample["references"],
        "has_answers": sample["base"] is not None,
        "answers": [
            {
                "side": side,
                "title": title,
                "runs": mark_shared((sample[side] or "").strip(), sample["references"]),
                "blank": "only white space" if sample[side] else "empty answer",
            }
            for side, title in (("base", "Base"), ("tuned", "Tuned"))
        ],
        "scores": scores,
    }


def mark_shared(answer: str, references: Sequence[str]) -> list[tuple[str, bool]]:
    """The answer in runs, each with whether the closest reference has its words, in order.

    White space goes with the word before it, so the runs joined are the answer.
    """
    words = answer.split()
    if not words or len(words) > MAX_MARKED_WORDS:
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
    """Runs whose marks end with a word, not with the white space after it."""
    bare: list[tuple[str, bool]] = []
    for text, is_shared in runs:
        end = len(text.rstrip()) if is_shared else len(text)
        bare += [(text[:end], is_shared), (text[end:], False)]
    return [run for run in bare if run[0]]


def _fold(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower() or word
