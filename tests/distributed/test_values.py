"""Ranks train a policy and its values as one process does, with recomputed layers, and both begin where they ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ingle import flow
from ingle.config.run import Run
from ingle.parallel import Mesh
from tests.conftest import make_tokenizer
from tests.distributed.ranks import run_ranks
from tests.tiny import write_llama

_REWARD = "def reward(completions, **columns):\n    return [len(set(map(str, each))) / 10 for each in completions]\n"


def _train(mesh: Mesh, config: dict[str, Any]) -> None:
    flow.finetune(Run.model_validate(config))


def _config(folder: Path, name: str, **parallel: Any) -> dict[str, Any]:
    return {
        "model": {"id": str(folder / "model"), "dtype": "float32"},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"sources": [{"path": str(folder / "prompts.jsonl")}], "max_seq_len": 64},
        "objective": {
            "kind": "ppo",
            "rewards": [str(folder / "reward.py")],
            "num_prompts": 4,
            "rollout": {"max_new_tokens": 6},
            "num_passes": 1,
            "value": {"lr_ratio": 2.0},
        },
        "optim": {"lr": 5e-3},
        "train": {"num_steps": 4, "global_batch_size": 2, "micro_batch_size": 1, "save_every": 2},
        "parallel": parallel,
        "output": str(folder / name),
    }


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["zero3", "zero1", "ddp"])
def test_ranks_train_values_as_one_process_does(tmp_path: Path, kind: str) -> None:
    write_llama(tmp_path / "model", make_tokenizer(), hidden_size=32, intermediate_size=64)
    (tmp_path / "reward.py").write_text(_REWARD)
    rows = [json.dumps({"prompt": f"how much is {i}?"}) for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    run_ranks(1, _train, _config(tmp_path, "one"))
    run_ranks(2, _train, _config(tmp_path, kind, kind=kind, recompute=True))
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", kind)
    ]
    for name in ("loss", "value_loss", "reward", "grad_norm", "entropy"):
        one, two = ([step[name] for step in steps] for steps in metrics)
        assert two == pytest.approx(one, rel=2e-3, abs=2e-5), name
    for file in ("adapter/adapter_model.safetensors", "value/adapter_model.safetensors", "value/head.safetensors"):
        torch.testing.assert_close(
            load_file(tmp_path / kind / file), load_file(tmp_path / "one" / file), rtol=2e-3, atol=2e-4
        )
    assert load_file(tmp_path / "one" / "value" / "head.safetensors")["bias"].any(), "the head is trained"
