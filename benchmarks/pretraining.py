"""Measures what pre-training is worth: each example with labels, from pretrained weights and from random ones.

    python -m benchmarks.pretraining --tasks classify tag seq2seq --steps 100 400

Both sides have the same config, data, order and number of steps; ``model.init`` alone differs. They are scored on the
same held-out rows, so the differences are paired; the script prints them with 95 % intervals. More steps need less
pre-training, so figures for a few numbers of steps say more than one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
TASKS = {
    "classify": "classify/polarity.yaml",
    "tag": "tag/entities.yaml",
    "answer": "answer/people.yaml",
    "seq2seq": "seq2seq/e2e.yaml",
}
SIDES = {"scratch": "random", "pretrained": "pretrained"}


def run_side(task: str, side: str, steps: int, folder: Path, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Trains one side without its own evaluation; returns the report, the model as a source, and the task."""
    from ingle import inference
    from ingle.config.loader import load_run
    from ingle.evaluation import make_source
    from ingle.flow import finetune

    output = folder / f"{task}-{side}-{steps}"
    overrides = [f"--train.num_steps={steps}", f"--model.init={SIDES[side]}"]
    overrides += [f"--output={output}", f"--seed={options.seed}", *options.set]
    run = load_run(EXAMPLES / TASKS[task], overrides).run
    assert run.task is not None, "the example has no held-out rows"
    held_out = run.task.model_copy(update={"num_samples": options.num_samples})
    report = finetune(run.model_copy(update={"evaluate": None}))
    source = inference.locate(str(output))
    opened = inference.load(source)
    longest = inference.longest_document(source, opened)
    return report, make_source(opened.model, opened.tokenizer, source.objective(), longest, side), held_out


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[100, 400], help="numbers of steps, each a run of its own"
    )
    parser.add_argument("--num-samples", type=int, help="score this many held-out rows; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="--KEY=VALUE", help="options of both sides")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    from ingle.evaluation import compare, run_task

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for task in options.tasks:
            for steps in options.steps:
                results, tokens = {}, 0
                for side in SIDES:
                    report, source, held_out = run_side(task, side, steps, Path(name), options)
                    results[side], tokens = run_task(source, held_out, task), report.num_tokens
                compared = compare(results["scratch"], results["pretrained"], held_out, base_name="scratch")
                print(f"{task}, {steps} steps, {tokens:,} tokens, n = {len(results['scratch'].samples)}")
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
