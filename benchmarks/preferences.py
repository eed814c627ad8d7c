"""Compares trained models with the model that they began with, on the records of the noticeboard: pairwise, by rule.

    python -m benchmarks.preferences examples/models/ember-6m-notices runs/align-dpo runs/align-kto

Every model answers the same held-out records, greedily or sampled with the same random streams. A notice wins if it has
fewer faults (values that it leaves out or makes up, see ``examples/align/faithfulness.py``); equal numbers count half.
Intervals are Wilson's for shares, and of a paired bootstrap over records for differences; p is that of an exact
sign-flip test.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ingle.data import Message
from ingle.evaluation.scorers.ngrams import Chrf
from ingle.evaluation.scorers.scorer import Outputs
from ingle.evaluation.statistics.intervals import bootstrap, wilson
from ingle.evaluation.statistics.significance import sign_flip_exact
from ingle.inference import open_model

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples" / "align"))

from faithfulness import find_faults  # noqa: E402 - a script

Floats = npt.NDArray[np.float64]


def read_rows(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Returns prompt and references of each held-out record."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        row = json.loads(line)
        prompt, answer = (message["content"] for message in row["messages"])
        rows.append({"prompt": prompt, "references": [answer, *row.get("references", ())]})
    return rows


def answer(model: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Returns one answer for each record."""
    engine = open_model(model)
    prompts = [[Message("user", row["prompt"])] for row in rows]
    found = engine.generate(
        prompts, max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=0, batch_size=100
    )
    return [each.text for each in found]


def describe(rows: list[dict[str, Any]], answers: list[str]) -> dict[str, Floats]:
    """Returns the figures of each answer."""
    faults = [len(find_faults(row["prompt"], text)) for row, text in zip(rows, answers, strict=True)]
    chrf = Chrf().score(Outputs(answers=tuple(answers)), [row["references"] for row in rows]).per_sample
    return {
        "faults": np.array(faults, float),
        "chrf": chrf,
        "words": np.array([len(text.split()) for text in answers], float),
    }


def compare(own: dict[str, Floats], first: dict[str, Floats]) -> dict[str, Any]:
    """Returns the shares of faithful answers and of wins, and paired differences with their intervals."""
    count = len(own["faults"])
    faithful, before = own["faults"] == 0, first["faults"] == 0
    share = wilson(int(faithful.sum()), count)
    wins, losses = own["faults"] < first["faults"], own["faults"] > first["faults"]
    points = (wins + 0.5 * (own["faults"] == first["faults"])).astype(float)
    rate = bootstrap(lambda weights: weights @ points / weights.sum(-1), count)
    gain = faithful.astype(float) - before
    chrf = own["chrf"] - first["chrf"]
    return {
        "faithful": (float(faithful.mean()), share.low, share.high),
        "faults": float(own["faults"].mean()),
        "win_rate": (float(points.mean()), rate.low, rate.high),
        "wins": int(wins.sum()),
        "losses": int(losses.sum()),
        "p_wins": sign_flip_exact(wins.astype(float) - losses),
        "p_faithful": sign_flip_exact(gain),
        "chrf": float(own["chrf"].mean()),
        "chrf_gain": float(chrf.mean()),
        "chrf_stderr": float(chrf.std(ddof=1) / count**0.5),
        "words": float(own["words"].mean()),
    }


def main() -> None:
    """Prints a line for each model, and writes all answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", help="run or adapter folders; the first is what the others are compared with"
    )
    parser.add_argument("--rows", type=Path, default=ROOT / "examples" / "demo" / "heldout.jsonl")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = read_rows(options.rows, options.limit)
    first: dict[str, Floats] | None = None
    records = []
    for model in options.models:
        answers = answer(model, rows, options)
        own = describe(rows, answers)
        first = own if first is None else first
        found = compare(own, first)
        records.append({"model": model, **found, "answers": answers})
        share, low, high = found["faithful"]
        print(f"{model}: faithful {share:.1%} [{low:.1%}, {high:.1%}], faults {found['faults']:.2f}, ", end="")
        if own is not first:
            rate, low, high = found["win_rate"]
            print(
                f"win rate {rate:.1%} [{low:.1%}, {high:.1%}] ({found['wins']} won, {found['losses']} lost, "
                f"p = {found['p_wins']:.2g}), p of faithful {found['p_faithful']:.2g}, "
                f"chrF {found['chrf_gain']:+.2f} +- {found['chrf_stderr']:.2f}, ",
                end="",
            )
        print(f"chrF {found['chrf']:.1f}, {found['words']:.1f} words, n = {len(rows)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
