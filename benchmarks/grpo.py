"""Times steps of GRPO, against TRL on the same content.

    python -m benchmarks.grpo --trl PYTHON

Both sides continue the adapter of ``examples/models/ember-6m-notices`` in float32 on records of the noticeboard: 16
prompts and 8 answers to each per step, temperature 1, at most 64 tokens, one update of 128 answers, no divergence from
a reference, and the reward of ``examples/align/faithfulness.py``. The answers differ, because random streams do, but
have the same distribution. ``PYTHON`` is an interpreter that has ``trl`` and ``peft``. The sides take turns; the first
step of each turn is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL, ADAPTER = ROOT / "examples" / "models" / "ember-6m", ROOT / "examples" / "models" / "ember-6m-notices"
DATA, REWARD = ROOT / "examples" / "demo" / "train.jsonl", ROOT / "examples" / "align" / "faithfulness.py"
NUM_PROMPTS, NUM_GENERATIONS, MAX_NEW_TOKENS = 16, 8, 64
LR = 1e-6  # small, so that the answers keep their distribution


def time_ingle(num_steps: int) -> list[dict[str, float]]:
    """Returns the seconds and tokens of each step of Ingle."""
    from ingle import flow
    from ingle.config import load_run
    from ingle.events import Step

    steps: list[dict[str, float]] = []
    began = time.perf_counter()

    def receive(event: Any) -> None:
        nonlocal began
        if isinstance(event, Step):
            now, figures = time.perf_counter(), event.metrics
            answered = figures["response_tokens"] * NUM_PROMPTS * NUM_GENERATIONS
            rollout = figures["rollout_s"] + figures["score_s"]
            steps.append({"step": now - began, "rollout": rollout, "update": now - began - rollout, "tokens": answered})
            began = now

    with tempfile.TemporaryDirectory() as folder:
        words = [
            *(f"--model.id={MODEL}", "--model.dtype=float32", f"--adapter.path={ADAPTER}", "--adapter.rank=8"),
            *(f"--data.sources={DATA}", "--data.max_seq_len=256", f"--output={folder}/run"),
            *("--objective.kind=grpo", "--objective.preset=dr_grpo", "--objective.kl.place=none"),
            *(f"--objective.rewards.0.path={REWARD}", "--objective.rewards.0.function=faithfulness"),
            *(f"--objective.num_prompts={NUM_PROMPTS}", f"--objective.num_generations={NUM_GENERATIONS}"),
            *(f"--objective.rollout.max_new_tokens={MAX_NEW_TOKENS}", "--objective.rollout.num_slots=128"),
            *(f"--optim.lr={LR}", "--optim.schedule=constant", "--optim.warmup_steps=0", "--train.save_every=0"),
            *(f"--train.num_steps={num_steps}", "--train.global_batch_size=128", "--train.micro_batch_size=64"),
        ]
        flow.finetune(load_run(None, words).run, receive)
    return steps


def time_trl(num_steps: int) -> list[dict[str, float]]:
    """Returns the same of TRL's trainer."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    sys.path.append(str(REWARD.parent))
    from faithfulness import faithfulness

    rows = [json.loads(line)["messages"][:1] for line in DATA.read_text(encoding="utf-8").splitlines()[:1000]]
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    steps: list[dict[str, float]] = []

    class Timed(GRPOTrainer):  # type: ignore[misc] # without types
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            self.rollout = time.perf_counter() - began
            self.tokens = float(found["completion_mask"].sum())
            return found

        def training_step(self, *given: Any, **options: Any) -> Any:
            began = time.perf_counter()
            loss = super().training_step(*given, **options)
            taken = time.perf_counter() - began
            steps.append(
                {"step": taken, "rollout": self.rollout, "update": taken - self.rollout, "tokens": self.tokens}
            )
            return loss

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=NUM_PROMPTS * NUM_GENERATIONS,
            steps_per_generation=1,
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_NEW_TOKENS,
            temperature=1.0,
            beta=0.0,
            loss_type="dr_grpo",
            scale_rewards="none",
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_steps=num_steps,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10_000,
        )
        trainer = Timed(
            model=PeftModel.from_pretrained(base, ADAPTER, is_trainable=True),
            reward_funcs=faithfulness,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": row} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(MODEL, padding_side="left"),
        )
        trainer.train()
    return steps


def main() -> None:
    """Runs both sides in turns and prints the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo", description=__doc__)
    parser.add_argument("--trl", help="interpreter with trl and peft")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--side", choices=("ingle", "trl"), help="run one side in this process")
    options = parser.parse_args()
    if options.side:
        steps = (time_ingle if options.side == "ingle" else time_trl)(options.steps)
        print(json.dumps(steps[1:]))
        return
    sides = {"ingle": sys.executable} | ({"trl": options.trl} if options.trl else {})
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.turns):
        for side, python in sides.items():
            words = [python, "-m", "benchmarks.grpo", "--side", side, "--steps", str(options.steps)]
            done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            found[side] += json.loads(done.stdout.splitlines()[-1])
    print(f"{'':6} {'step s':>8} {'rollout s':>10} {'update s':>9} {'tokens per answer':>18} {'answer tokens/s':>16}")
    for side, steps in found.items():
        step, rollout, update, tokens = (
            statistics.median(each[name] for each in steps) for name in ("step", "rollout", "update", "tokens")
        )
        answers = NUM_PROMPTS * NUM_GENERATIONS
        print(f"{side:6} {step:8.2f} {rollout:10.2f} {update:9.2f} {tokens / answers:18.1f} {tokens / step:16.0f}")


if __name__ == "__main__":
    main()
