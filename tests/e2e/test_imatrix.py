"""An importance matrix gathered while training: what it holds, and that a resumed run's is the same to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ingle import flow
from ingle.config import load_run
from ingle.errors import CheckpointError
from ingle.events import Event, Saved, Step
from ingle.gguf.imatrix import read_imatrix
from ingle.quant.imatrix_collector import ImatrixCollector

STEPS = 6


class Stopped(Exception):
    pass


def train(config: Path, output: Path, *, until: int | None = None) -> list[Event]:
    overrides = [f"--output={output}", f"--train.num_steps={STEPS}", "--train.imatrix=true", "--evaluate=null"]
    events: list[Event] = []

    def sink(event: Event) -> None:
        events.append(event)
        if until is not None and isinstance(event, Saved) and event.step == until:
            raise Stopped

    flow.finetune(load_run(config, overrides).run, sink)
    return events


def test_a_run_leaves_an_importance_matrix(config: Path, tmp_path: Path) -> None:
    events = train(config, tmp_path / "whole")
    saved = [event.kind for event in events if isinstance(event, Saved)]
    assert saved[-3:] == ["adapter", "imatrix", "report"]
    found = read_imatrix(tmp_path / "whole" / "imatrix.gguf")
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(found.entries) == {f"blk.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}
    num_tokens = [event.num_tokens for event in events if isinstance(event, Step)][-1]
    assert {float(entry.counts[0]) for entry in found.entries.values()} == {num_tokens}
    assert all((entry.sums > 0).all() for entry in found.entries.values())
    assert (found.chunk_size, found.chunk_count) == (64, num_tokens // 64)
    assert found.datasets[0].endswith("train.jsonl")
    # q, k and v have the same input; the normalised rows of the first layer have a mean square near 1.
    queries, values = (found.entries[f"blk.0.{kind}.weight"] for kind in ("attn_q", "attn_v"))
    np.testing.assert_array_equal(queries.sums, values.sums)
    assert queries.mean.mean() == pytest.approx(1.0, abs=0.05)


def test_a_resumed_run_gathers_the_same(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", until=3)
    train(config, tmp_path / "cut")
    whole, resumed = (read_imatrix(tmp_path / name / "imatrix.gguf").entries for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    for name, entry in whole.items():
        np.testing.assert_array_equal(entry.sums, resumed[name].sums)
        np.testing.assert_array_equal(entry.counts, resumed[name].counts)


def test_gathering_changes_no_weight(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "with")
    overrides = [f"--output={tmp_path}/without", f"--train.num_steps={STEPS}", "--evaluate=null"]
    flow.finetune(load_run(config, overrides).run)
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("with", "without")
    ]
    assert adapters[0] == adapters[1]
    assert not (tmp_path / "without" / "imatrix.gguf").exists()


def test_a_checkpoint_without_it_is_damaged(config: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", until=3)
    (tmp_path / "cut" / "checkpoints" / "step-3" / "imatrix.safetensors").unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        train(config, tmp_path / "cut")


def test_an_architecture_without_names_is_told_before_training(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingle.errors import GgufError
    from ingle.gguf import families

    monkeypatch.setattr(families, "BY_MODEL_TYPE", {})
    monkeypatch.setattr(ImatrixCollector, "__init__", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(GgufError, match="not supported"):
        train(config, tmp_path / "run")
