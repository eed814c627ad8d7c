"""Runs that read another model: a teacher, or a reward model on the policy's own base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ingle import flow
from ingle.config import load_run
from ingle.errors import Interrupted
from ingle.events import Event, Saved
from ingle.report.results import RunReport
from tests.tiny import write_llama

Train = Callable[..., RunReport]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_models")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    write_llama(folder / "teacher", tokenizer, hidden_size=48, intermediate_size=96, initializer_range=0.2)
    pairs = [{"prompt": f"how much is {i}?", "chosen": f"it is {i}", "rejected": "no"} for i in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "config.yaml").write_text(f"""\
model: {{id: {tiny_model}, dtype: float32}}
adapter: {{kind: lora, rank: 4}}
data: {{sources: [{tiny_data}/train.jsonl], max_seq_len: 64}}
optim: {{lr: 1e-2, schedule: constant}}
train: {{num_steps: 6, global_batch_size: 2, micro_batch_size: 1, save_every: 2}}
""")
    return folder


@pytest.fixture(scope="module")
def train(folder: Path) -> Train:
    def run(name: str, *flags: str, stop_at: int | None = None) -> RunReport:
        def sink(event: Event) -> None:
            if isinstance(event, Saved) and event.step == stop_at:
                raise KeyboardInterrupt

        return flow.finetune(load_run(folder / "config.yaml", [f"--output={folder / name}", *flags]).run, sink)

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def distill(folder: Path, share: int) -> tuple[str, ...]:
    objective = {"kind": "distill", "teacher": str(folder / "teacher"), "beta": 0.5, "on_policy_share": share}
    return (f"--objective={json.dumps(objective)}",)


def test_a_student_comes_closer_and_resumes_with_the_same_bytes(train: Train, folder: Path) -> None:
    flags = distill(folder, 0)
    train("whole", *flags)
    losses = [row["loss"] for row in rows(folder / "whole")]
    assert sum(losses[-2:]) < 0.98 * sum(losses[:2])
    with pytest.raises(Interrupted):
        train("stopped", *flags, stop_at=2)
    train("stopped", *flags)
    file = Path("adapter") / "adapter_model.safetensors"
    assert (folder / "stopped" / file).read_bytes() == (folder / "whole" / file).read_bytes()


@pytest.mark.sweep
def test_a_student_learns_from_its_own_answers(train: Train, folder: Path) -> None:
    answers = ("--objective.num_prompts=8", "--objective.rollout.max_new_tokens=6", "--train.global_batch_size=8")
    train("own", *distill(folder, 1), *answers, "--train.num_steps=8")
    losses = [row["loss"] for row in rows(folder / "own")]
    assert sum(losses[-2:]) < 0.98 * sum(losses[:2])


@pytest.mark.sweep
def test_a_reward_model_scores_and_begins_the_values(train: Train, folder: Path) -> None:
    train("reward", "--objective=reward", f"--data.sources={folder / 'pairs.jsonl'}", "--data.packing=false")
    objective = {
        "kind": "ppo",
        "rewards": [{"kind": "model", "path": str(folder / "reward")}],
        "num_prompts": 4,
        "rollout": {"max_new_tokens": 6},
        "value": {"path": str(folder / "reward"), "lr_ratio": 0.0001},
    }
    train("ppo", f"--objective={json.dumps(objective)}", "--train.global_batch_size=4", "--train.num_steps=2")
    assert all(row["rewards/model"] != 0 and row["unscored"] == 0 for row in rows(folder / "ppo"))
    with safe_open(folder / "reward" / "adapter" / "adapter_model.safetensors", "pt") as file:
        score = file.get_tensor("base_model.model.score.weight")
    head = load_file(folder / "ppo" / "value" / "head.safetensors")["weight"]
    assert (head - score).norm() < 0.01 * score.norm(), "the values begin with the head of the reward model"
    names = load_file(folder / "ppo" / "adapter" / "adapter_model.safetensors").keys()
    assert not any("role" in name or "score" in name for name in names)
