"""Objectives that sample answers: they learn, their first ratio is 1, and a killed run ends with the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ingle import flow
from ingle.config import load_run
from ingle.errors import Interrupted, RewardError
from ingle.events import Event, Progress, Sampled, Step, Warned
from ingle.models.generation.rollout import GrowingRollout
from ingle.objectives.policy import PolicyLoss
from ingle.report.results import RunReport
from ingle.training.folder import RunFolder

#: Figures that differ from run to run.
MEASURED = {"tokens_per_s", "peak_memory_bytes", "rollout_s", "score_s", "evaluate_s", "rollouts_per_s"}
#: Rewards lower-case letters, which a model of bytes can write at once.
REWARD = """
def reward(prompt, completion, **columns):
    assert prompt and completion is not None
    return sum(c.islower() for c in completion) / 6
"""

Train = Callable[..., RunReport]


def _ignore(event: Event) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "reward.py").write_text(REWARD)
    (folder / "config.yaml").write_text(f"""\
model: {{id: {tiny_model}, dtype: float32}}
adapter: {{kind: lora, rank: 4}}
data: {{sources: [{tiny_data}/train.jsonl], max_seq_len: 64}}
objective:
  kind: grpo
  rewards: [{{kind: function, path: {folder}/reward.py, name: letters}}, {{kind: length, high: 4, weight: 0.1}}]
  num_prompts: 4
  num_generations: 2
  rollout: {{max_new_tokens: 6}}
optim: {{lr: 1e-2, schedule: constant}}
train: {{num_steps: 4, global_batch_size: 4, micro_batch_size: 2, save_every: 1}}
output: {folder}/run
""")
    return folder


@pytest.fixture(scope="module")
def train(folder: Path) -> Train:
    def run(name: str, *flags: str, sink: Callable[[Event], None] = _ignore) -> RunReport:
        return flow.finetune(load_run(folder / "config.yaml", [f"--output={folder / name}", *flags]).run, sink)

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the figures of all steps, without those that are measured."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


EVERYWHERE = {"reward", "response_tokens", "entropy", "unfinished", "rewards/letters", "rewards/length"}
POLICY = {*EVERYWHERE, "kl", "clip_fraction", "ratio_deviation", "sampler_ess", "advantage_std"}
# No answer of the tiny model is finished, and the preset gives them all the same reward.
PPO = ("--objective.num_passes=2", "--objective.unfinished=score")
KINDS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "grpo": ((), {*POLICY, "kl_loss", "kl_coef"}),
    "rloo": ((), {*POLICY, "kl_coef"}),
    "reinforce": (("--train.global_batch_size=8", "--objective.num_generations=2"), POLICY),
    "ppo": (PPO, {*POLICY, "value_loss", "value_clip_fraction", "explained_variance"}),
    "raft": (("--objective.num_generations=2",), EVERYWHERE - {"entropy"}),
    "online_dpo": ((), {*EVERYWHERE, "kl", "rewards/chosen", "rewards/accuracy", "ties"}),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("ppo", "online_dpo") else pytest.mark.sweep) for kind in KINDS]
)
def test_every_kind_trains_and_logs_its_figures(train: Train, folder: Path, kind: str) -> None:
    flags, names = KINDS[kind]
    size = {"ppo": "4", "raft": "4", "online_dpo": "4"}.get(kind, "4")
    train(kind, f"--objective.kind={kind}", f"--train.global_batch_size={size}", "--train.num_steps=2", *flags)
    first, last = rows(folder / kind)
    assert names <= first.keys(), names - first.keys()
    assert first["grad_norm"] > 0 or last["grad_norm"] > 0
    if kind == "ppo":  # two steps with this learning rate move the bias by 0.02 from where it began
        bias = load_file(folder / kind / "value" / "head.safetensors")["bias"]
        assert float(bias) == pytest.approx(first["reward"], abs=0.03) != pytest.approx(0, abs=0.03)
    proof = json.loads((folder / kind / "start.json").read_text())
    if "ratio_deviation" in names:
        assert first["ratio_deviation"] == 0.0 and proof["importance ratios"]["measured"] == 1.0
    if "kl" in names:
        assert first["kl"] == 0.0 and last["kl"] == pytest.approx(0, abs=1)
        assert (last["kl"] == 0.0) is (last.get("iteration") == 0), "that of an iteration is measured before it"


def test_rewards_rise(train: Train, folder: Path, tiny_model: Path) -> None:
    # Larger embeddings let a tiny model become certain of a token.
    certain = shutil.copytree(tiny_model, folder / "certain")
    tensors = load_file(certain / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name] * 4
    save_file(tensors, certain / "model.safetensors", {"format": "pt"})
    flags = ("--objective.num_prompts=8", "--objective.num_generations=8", "--train.micro_batch_size=64")
    more = ("--train.global_batch_size=64", "--train.save_every=0", "--optim.lr=0.02", "--optim.warmup_steps=0")
    train("learns", f"--model.id={certain}", "--train.num_steps=20", *flags, *more)
    rewards = [row["rewards/letters"] for row in rows(folder / "learns")]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1, rewards


def test_an_alarm_ends_the_run_with_the_last_good_weights(train: Train, folder: Path) -> None:
    # The answers of the first two iterations differ in their reward, those of the others do not. The second iteration
    # is sampled with the weights of step 2, the third one, which shows the sign, with those of step 4.
    (folder / "tired.py").write_text("""
def reward(completions, trainer_state, **columns):
    assert trainer_state.max_steps in (2, 12)
    assert (trainer_state.epoch > 0) is (trainer_state.global_step > 0)
    return [float(place) if trainer_state.global_step < 3 else 0.0 for place in range(len(completions))]
""")
    warnings: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Warned) and event.where == "objective.alarms.idle":
            warnings.append(event.message)

    flags = (f"--objective.rewards={folder}/tired.py", "--objective.alarms.idle=stop", "--optim.warmup_steps=0")
    train("alarm", "--train.num_steps=12", *flags, sink=listen)
    assert [row["step"] for row in rows(folder / "alarm")] == [*range(1, 9)]  # two steps an iteration
    assert len(warnings) == 1 and "ends with the weights of step 2" in warnings[0]
    train("short", "--train.num_steps=2", *flags)
    assert weights(folder / "alarm") == weights(folder / "short")


class _Fault(Exception):
    pass


def _faults() -> Iterator[Callable[[Event], None]]:
    """Yields sinks that end a run at one point each: in a rollout, after it, between two updates of an iteration."""

    def at(kind: type[Event], number: int, *, politely: bool = False) -> Callable[[Event], None]:
        seen = 0

        def sink(event: Event) -> None:
            nonlocal seen
            if isinstance(event, kind) and (not isinstance(event, Progress) or event.stage == "Sampling answers"):
                seen += 1
                if seen == number and politely:
                    signal.raise_signal(signal.SIGINT)
                elif seen == number:
                    raise _Fault

        return sink

    yield at(Progress, 3)  # in the first rollout
    yield at(Step, 2)  # between two steps, after a checkpoint with answers
    yield at(Sampled, 1)  # after the second rollout
    yield at(Step, 1, politely=True)


def _stops_at_first(patch: pytest.MonkeyPatch, name: str) -> list[object]:
    """Makes the first call of a method of the loss request a stop; returns a list of its calls."""
    calls: list[object] = []
    method = getattr(PolicyLoss, name)

    def call(self: PolicyLoss, batch: object) -> object:
        if not calls:
            signal.raise_signal(signal.SIGINT)
        calls.append(batch)
        return method(self, batch)

    patch.setattr(PolicyLoss, name, call)
    return calls


def test_a_run_that_ends_at_every_point_goes_on_to_the_same_bytes(
    train: Train, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--objective.kl={place: reward, estimator: k1, coef: 0.05, budget: 8}", "--objective.num_passes=2")
    train("whole", *flags, "--train.num_steps=8")
    sampled: list[int | None] = []

    def end_by(fault: Callable[[Event], None]) -> None:
        def sink(event: Event) -> None:
            if isinstance(event, Progress) and event.stage == "Sampling answers" and event.done == 1:
                sampled.append(event.total)
            fault(event)

        with pytest.raises((_Fault, Interrupted)):
            train("broken", *flags, "--train.num_steps=8", sink=sink)

    *faults, last = _faults()
    for fault in faults:
        end_by(fault)
    for name in ("evaluate", "reference_logps"):
        with monkeypatch.context() as patch:
            calls = _stops_at_first(patch, name)
            end_by(_ignore)
        assert len(calls) == 1, "four micro-batches are evaluated after the second rollout"
    end_by(last)
    train("broken", *flags, "--train.num_steps=8")
    assert rows(folder / "broken") == rows(folder / "whole")
    assert weights(folder / "broken") == weights(folder / "whole")
    assert sampled[1] is not None and sampled[1] < 8, "finished answers were sampled again"


def test_a_stop_does_not_wait_for_a_reward_to_load(train: Train, folder: Path) -> None:
    (folder / "slow.py").write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)\n")
    began = time.monotonic()
    with pytest.raises(Interrupted):
        train("slow", f"--objective.rewards=[{folder}/slow.py]")
    assert time.monotonic() - began < 30


def test_a_sampler_that_differs_from_the_update_is_not_trusted(
    train: Train, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--train.global_batch_size=8", "--objective.kl={place: none}", "--train.num_steps=2")
    train("exact", *flags)
    first, second = rows(folder / "exact")
    assert first["sampler_deviation"] < 1e-6 and "sampler_deviation" not in second, "it is measured once"
    finish = GrowingRollout.finish
    monkeypatch.setattr(GrowingRollout, "finish", lambda self: (own := finish(self))._replace(logps=own.logps + 0.01))
    with pytest.raises(_Fault):
        train("differs", *flags, sink=[*_faults()][1])
    train("differs", *flags)
    for row in rows(folder / "differs"):
        assert row["sampler_deviation"] == pytest.approx(0.01, rel=0.01) and row["ratio_deviation"] == 0.0


def test_rewards_that_fail_end_the_run_with_their_reason_and_a_checkpoint(train: Train, folder: Path) -> None:
    function = "def reward(completions, trainer_state, **columns):\n    return [{}] * len(completions)\n"
    (folder / "bad.py").write_text(function.format("None if trainer_state.global_step < 2 else columns['nothing']"))
    warnings: list[Event] = []
    flags = (f"--objective.rewards=[{folder}/bad.py]", "--train.save_every=0")
    with pytest.raises(RewardError, match="failed for 8 of 8") as caught:
        train("bad", *flags, sink=warnings.append)
    assert "nothing" in str(caught.value)
    assert any(isinstance(event, Warned) and "No answer of iteration 1" in event.message for event in warnings)
    assert RunFolder(folder / "bad").last_step() == 2, "the steps before it are lost"
    (folder / "bad.py").write_text(function.format("0"))
    train("bad", *flags)
    assert [row["step"] for row in rows(folder / "bad")] == [1, 2, 3, 4]


def test_validation_measures_the_reward_of_held_out_prompts(train: Train, folder: Path) -> None:
    report = train("validated", "--data.validation=.2", "--evaluate.every=2")
    assert report.validation is not None
    first, *_, last = report.validation.history
    assert first.metrics["reward"] == -first.loss and {"response_tokens", "rewards/letters"} <= first.metrics.keys()
    assert last.step == 4


def test_dynamic_sampling_replaces_prompts_that_teach_nothing(train: Train, folder: Path) -> None:
    (folder / "even.py").write_text(
        "def reward(prompt, completion, **columns):\n    return float('plus 2' in str(prompt)) * len(completion)\n"
    )
    train("refilled", f"--objective.rewards=[{folder}/even.py]", "--objective.refill=3", "--train.num_steps=2")
    first, _ = rows(folder / "refilled")
    assert first["discarded"] > 0 and first["epoch"] > 4 / 72
