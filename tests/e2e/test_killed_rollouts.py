"""Runs that sample their own data, killed by SIGKILL at random moments: a resumed run ends with the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import command, environment
from tests.e2e.test_rollouts import REWARD, rows

_CONFIG = """\
model: {{id: {model}, dtype: float32}}
adapter: {{kind: lora, rank: 4}}
data: {{sources: [{data}/train.jsonl], max_seq_len: 64}}
objective:
  kind: {kind}
  rewards: [{{path: {folder}/reward.py}}]
  num_prompts: 16
  num_generations: 4
  num_passes: 2
  rollout: {{max_new_tokens: 24}}
optim: {{lr: 1e-2, schedule: constant}}
train: {{num_steps: 12, global_batch_size: 32, micro_batch_size: 2, save_every: 3}}
output: {folder}/whole
"""


def _run(folder: Path, name: str, kill_after_s: float | None = None) -> int:
    """Starts or resumes a run, kills it some time after its first step, and returns its exit code."""
    words = ("train", folder / "config.yaml", f"--output={folder / name}")
    with subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        if kill_after_s is not None:
            events, before = folder / name / "events.jsonl", time.time()
            while process.poll() is None and not (events.exists() and events.stat().st_mtime > before):
                time.sleep(0.02)
            time.sleep(kill_after_s)
            process.kill()
    return process.returncode


def _damage(journal: Path, chance: random.Random) -> None:
    """Cuts a journal off, empties it, or writes other bytes to its end or into it, as a crash of the machine may."""
    content = bytearray(journal.read_bytes())
    match chance.randrange(4):
        case 0:
            del content[chance.randrange(len(content) + 1) :]
        case 1:
            content.clear()
        case 2:
            content += chance.randbytes(100)
        case _ if content:
            content[chance.randrange(len(content))] ^= 1
    journal.write_bytes(content)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_that_is_killed_at_random_ends_with_the_same_bytes(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    slow = REWARD.replace("    assert", "    __import__('time').sleep(0.005)\n    assert")
    (tmp_path / "reward.py").write_text(slow)
    config = _CONFIG.format(model=tiny_model, data=tiny_data, kind=kind, folder=tmp_path)
    (tmp_path / "config.yaml").write_text(config)
    assert _run(tmp_path, "whole") == 0
    chance, num_killed = random.Random(kind), 0
    for _ in range(6):
        num_killed += _run(tmp_path, "killed", chance.uniform(0, 1.5)) == -signal.SIGKILL
        for journal in (tmp_path / "killed").rglob("iteration-*.jsonl"):
            _damage(journal, chance)
    assert num_killed >= 3, "it was never killed"
    assert _run(tmp_path, "killed") == 0
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        if "checkpoints" not in path.parts:
            assert (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "killed").rglob("*partial*"))
