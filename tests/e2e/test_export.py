"""The command ``ingle export``: files that other programs serve, refusals, exit codes, no leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ingle import flow
from ingle.config import load_run
from ingle.gguf import read_gguf
from tests.e2e.conftest import Ingle, command, environment, write_config

needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama.cpp's Python binding: make judge")


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on a base in q8_0, which no test changes."""
    config = write_config(tmp_path_factory.mktemp("exported"), tiny_model, tiny_data)
    flags = ["--base.format=q8_0", "--train.num_steps=4", "--evaluate.num_samples=2"]
    flow.finetune(load_run(config, flags).run)
    return config.parent / "run"


def test_merged_safetensors_are_verified_and_described(
    ingle_process: Ingle, ingle: Ingle, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    done = ingle_process("export", run, "--to", "safetensors", "--out", out, "--verify", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["path"] == str(out) and result["certificate"]["passed"]
    assert json.loads((out / "certificate.json").read_text())["passed"] is True
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card and "num_steps: 4" in card and "train.jsonl" in card
    again = ingle("export", run, "--to", "safetensors", "--out", out)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr
    answer = ingle("generate", out, "--prompt", "2 plus 3?", "--max-new-tokens", "4")
    assert answer.returncode == 0, answer.stderr


def test_a_gguf_file_is_a_model_again(ingle: Ingle, run: Path, tmp_path: Path) -> None:
    first = tmp_path / "a" / "m.gguf"
    done = ingle("export", run, "--to", "gguf", "--out", first)
    assert done.returncode == 0, done.stderr
    assert "KL" in done.stdout and "`as-trained` keeps the type of every tensor, not the exact values" in done.stdout
    assert ingle("export", first, "--to", "gguf", "--out", tmp_path / "b" / "m.gguf").returncode == 0
    before, after = read_gguf(first), read_gguf(tmp_path / "b" / "m.gguf")
    assert all(np.array_equal(tensor.read(), after.tensors[name].read()) for name, tensor in before.tensors.items())


@needs_llama
@pytest.mark.parametrize("to", ["gguf", "gguf-adapter"])
def test_llama_cpp_certifies(ingle: Ingle, run: Path, tmp_path: Path, to: str) -> None:
    done = ingle("export", run, "--to", to, "--out", tmp_path / "served", "--verify")
    assert done.returncode == 0, done.stderr
    (certificate,) = (tmp_path / "served").glob("*.certificate.json")
    assert json.loads(certificate.read_text())["passed"] is True
    assert "llama.cpp" in done.stdout


def test_mistakes_exit_with_2_and_leave_nothing(ingle: Ingle, run: Path, tmp_path: Path) -> None:
    for words, message in (
        (("--to", "gguf", "--type", "q4km"), "did you mean q4_k_m?"),
        (("--to", "peft", "--type", "bf16"), "--type"),
        (("--to", "gguf", "--type", "q2_k", "--max-kl", "0"), "lose too much"),
        (("--to", "onnx"), "onnx"),
        (("--to", "gguf", "--imatrix", "nowhere.gguf"), "--imatrix nowhere.gguf"),
    ):
        done = ingle("export", run, *words, "--out", tmp_path / "x" / "y")
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("x*"))


def test_ctrl_c_leaves_nothing(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    process = subprocess.Popen(
        command("export", run, "--to", "safetensors", "--out", out), stderr=subprocess.PIPE, env=environment()
    )
    while process.poll() is None and not list(tmp_path.glob("x.partial-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode in (0, 130)  # 0 when it was faster than the signal
    assert os.listdir(tmp_path).count("x") == (process.returncode == 0)
    assert not list(tmp_path.glob("x.partial-*"))
