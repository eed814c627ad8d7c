"""``ingle rehearse``: the stages of a run, and the errors that the run would show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ingle.models.loading.small_config import shrink
from ingle.models.loading.tiny_model import SIZE
from tests.contract.models.conftest import CONFIGS
from tests.e2e.conftest import Ingle


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_small_model_has_the_architecture_of_the_large_one(name: str) -> None:
    large = CONFIGS[name]()
    small = shrink(large, SIZE)
    model = AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16)
    assert small.model_type == large.model_type and small.vocab_size == large.vocab_size
    assert small.get_text_config().hidden_size == 256  # a block of every format
    assert 2 <= small.get_text_config().num_hidden_layers <= 4
    logits = model(torch.arange(6)[None]).logits
    assert logits.shape == (1, 6, small.vocab_size) and bool(logits.isfinite().all())


def test_it_fails_with_the_error_of_the_run_and_writes_nothing(ingle: Ingle, config: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "a question without an answer"}]}\n')
    done = ingle("rehearse", config, f"--data.sources={bad}", "--evaluate=null")
    trained = ingle("train", config, f"--data.sources={bad}", "--evaluate=null")
    assert done.returncode == trained.returncode == 2
    assert done.stderr.splitlines()[0] == trained.stderr.splitlines()[0]
    assert "model and tokenizer" in done.stdout  # the stages before it
    assert not (tmp_path / "run").exists()
    missing = ingle("rehearse", config, "--model.id=nowhere/nothing")
    assert missing.returncode == 2 and "nowhere/nothing" in missing.stderr


@pytest.mark.sweep
@pytest.mark.parametrize("options", [[], ["--processes=2", "--parallel.kind=fsdp"], ["--device", "2x rtx-4090"]])
def test_all_stages(ingle: Ingle, config: Path, tmp_path: Path, options: list[str]) -> None:
    done = ingle("rehearse", config, *options)
    assert done.returncode == 0, done.stderr
    for stage in ("run folder", "model and tokenizer", "save, kill", "resume, evaluate, report", "export"):
        assert stage in done.stdout
    assert "All stages went well on" in done.stdout
    assert not (tmp_path / "run").exists()
