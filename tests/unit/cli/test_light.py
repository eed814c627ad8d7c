"""What answers at once loads no heavy library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: The checkout that is tested, wherever the command is called.
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
CONFIG = "model: {id: m}\ndata: {sources: a.jsonl}\noutput: runs/x\n"
CHECK = """
import sys
from ingle.__main__ import main
code = main()
heavy = sorted({"torch", "transformers", "datasets", "numba", "numpy", "scipy", "pandas"} & set(sys.modules))
sys.stderr.write(f"{code} {heavy}")
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["config", "show", "run.yaml", "--optim.lr=1e-4"], 0),
        (["config", "schema"], 0),
        (["models", "t5"], 0),
        (["train", "run.yaml", "--optim.lrr=1"], 2),
        (["trian"], 2),
        (["generate", "m", "--prompt", "x", "--top-p", "0.5"], 2),
    ],
)
def test_no_heavy_library_is_loaded(tmp_path: Path, words: list[str], code: int) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *words], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.rsplit("\n", 1)[-1] == f"{code} []"
    if code == 0:
        assert done.stdout


ANSWER = """
import gc, sys
import torch
from transformers import LlamaForCausalLM
floor = set(sys.modules)
from ingle.__main__ import main
sys.argv = ["ingle", "generate", "examples/models/ember-6m", "--prompt", "x", "--max-new-tokens", "1"]
assert main() == 0
besides = set(sys.modules) - floor
others = {"accelerate", "bitsandbytes", "datasets", "gguf", "llama_cpp", "pandas", "peft", "pyarrow", "sacrebleu"}
others |= {"scipy", "sklearn", "sympy", "ingle.evaluation", "ingle.training.optim", "ingle.objectives"}
others |= {"ingle.kernels.ggml.decoders", "ingle.kernels.ggml.encoders"}
others |= {"ingle.kernels.hqq.decode", "ingle.gguf.reader"}
sys.stderr.write(f"{sorted(others & besides)} {gc.get_freeze_count() > 0}")
"""


def test_an_answer_loads_what_the_model_needs_and_nothing_of_other_commands() -> None:
    """Next to torch and the model's class, which bring libraries of their own."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", ANSWER], cwd=root, env=ENV, capture_output=True, text=True, timeout=600
    )
    assert done.stderr.rsplit("\n", 1)[-1] == "[] True", done.stderr


def test_importing_the_package_loads_no_torch() -> None:
    check = "import sys, ingle, ingle.config, ingle.sinks, ingle.cli.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, env=ENV, timeout=60)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ingle", "config", "schema"],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0
