"""Measures what pre-training is worth: each example with labels, from pretrained weights and from random ones.

    python -m benchmarks.pretraining --tasks classify tag seq2seq --steps 100 400 --lr 3e-4 1e-3 3e-3

Both sides have the same config, data, order and number of steps; ``model.init`` alone differs. Given several learning
rates, each side trains with all of them and uses the one with the lowest validation loss; the held-out rows are not
part of that choice. Both sides are scored on the same held-out rows, so the differences are paired; the script prints
them with 95 % intervals. More steps need less pre-training, so figures for a few numbers of steps say more than one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = Path(__file__).parents[1] / "examples"
TASKS = {
    "classify": "classify/polarity.yaml",
    "tag": "tag/entities.yaml",
    "answer": "answer/people.yaml",
    "seq2seq": "seq2seq/e2e.yaml",
}
SIDES = {"scratch": "random", "pretrained": "pretrained"}


class Trained(NamedTuple):
    """A finished run of one side.

    Attributes:
        lr: Its learning rate.
        loss: Validation loss of its last step.
        tokens: Tokens that it read.
        folder: Its run folder.
    """

    lr: float
    loss: float
    tokens: int
    folder: Path


def load(task: str, steps: int, options: argparse.Namespace, *overrides: str) -> Any:
    """Returns the run of an example."""
    from ingle.config.loader import load_run

    common = (f"--train.num_steps={steps}", f"--seed={options.seed}", *options.set)
    return load_run(EXAMPLES / TASKS[task], [*common, *overrides]).run


def train_side(task: str, side: str, steps: int, folder: Path, options: argparse.Namespace) -> Trained:
    """Trains one side with each learning rate, without the example's own evaluation; returns the best."""
    from ingle.flow import finetune

    runs = []
    for lr in options.lr or [load(task, steps, options).optim.lr]:
        output = folder / f"{task}-{side}-{steps}-{lr}"
        run = load(task, steps, options, f"--model.init={SIDES[side]}", f"--optim.lr={lr}", f"--output={output}")
        report = finetune(run.model_copy(update={"evaluate": None}))
        assert report.validation is not None, "the example has no validation rows"
        loss = report.validation.history[-1].loss
        runs.append(Trained(lr, loss, report.num_tokens, output))
        print(f"{task:<9} {side:<10} {steps:>5} steps  lr {lr:g}  validation loss {loss:.4f}", flush=True)
    return min(runs, key=lambda each: each.loss)


def score_side(task: str, side: str, steps: int, trained: Trained, options: argparse.Namespace) -> Any:
    """Returns the result of a trained side on the held-out rows."""
    from ingle import inference
    from ingle.evaluation import make_source, run_task

    source = inference.locate(str(trained.folder))
    opened = inference.load(source)
    longest = inference.longest_document(source, opened)
    scored = make_source(opened.model, opened.tokenizer, source.objective(), longest, side)
    return run_task(scored, held_out(task, steps, options), task)


def held_out(task: str, steps: int, options: argparse.Namespace) -> Any:
    """Returns the task of an example."""
    found = load(task, steps, options).task
    assert found is not None, "the example has no held-out rows"
    return found.model_copy(update={"num_samples": options.num_samples})


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[100, 400], help="numbers of steps, each a run of its own"
    )
    parser.add_argument("--lr", nargs="+", type=float, help="learning rates to try; by default that of the example")
    parser.add_argument("--num-samples", type=int, help="score this many held-out rows; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="--KEY=VALUE", help="options of both sides")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    from ingle.evaluation import compare

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for task in options.tasks:
            for steps in options.steps:
                trained = {side: train_side(task, side, steps, Path(name), options) for side in SIDES}
                results = {side: score_side(task, side, steps, each, options) for side, each in trained.items()}
                compared = compare(
                    results["scratch"], results["pretrained"], held_out(task, steps, options), base_name="scratch"
                )
                rates = ", ".join(f"{side} lr {each.lr:g}" for side, each in trained.items())
                tokens = trained["pretrained"].tokens
                print(f"{task}, {steps} steps, {tokens:,} tokens, n = {len(results['scratch'].samples)}, {rates}")
                for metric, found in compared.metrics.items():
                    low, high = found.ci95
                    print(
                        f"  {metric:<16} scratch {found.base:.3f}  pretrained {found.tuned:.3f}  "
                        f"difference {found.delta:+.3f} [{low:+.3f}, {high:+.3f}]",
                        flush=True,
                    )
                    figures[f"{task} {steps} {metric}"] = [found.base, found.tuned, found.delta, low, high]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
