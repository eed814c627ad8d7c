"""A tiny model, its data and the real command, for tests that run the whole way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ingle.cli.exit_status import run_command
from tests.tiny import write_llama

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIRS = [(f"{a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(12) for b in range(12)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers with a byte-level tokenizer, in the hub's layout."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for pair in PAIRS for text in pair], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHATML
    return write_llama(folder, fast, hidden_size=64, intermediate_size=128, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.jsonl`` and ``held-out.jsonl`` of small sums in words."""
    folder = tmp_path_factory.mktemp("tiny-data")
    for name, pairs in (("train", PAIRS[::2]), ("held-out", PAIRS[1:40:2])):
        rows = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in pairs
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Path:
    """A config of a dozen short steps whose run folder is ``tmp_path / "run"``."""
    return write_config(tmp_path, tiny_model, tiny_data)


def write_config(folder: Path, tiny_model: Path, tiny_data: Path) -> Path:
    """As :func:`config`, for fixtures that several tests share."""
    path = folder / "config.yaml"
    path.write_text(f"""\
model: {{id: {tiny_model}, dtype: float32}}
base: {{format: nf4}}
adapter: {{kind: lora, rank: 4, dropout: 0.1}}
data: {{sources: [{tiny_data}/train.jsonl], max_seq_len: 64}}
optim: {{lr: 5e-3}}
train: {{num_steps: 12, global_batch_size: 4, micro_batch_size: 2, save_every: 3}}
evaluate:
  sources: [{tiny_data}/held-out.jsonl]
  metrics: [chrf, exact_match, bits_per_byte]
  num_samples: 8
  max_new_tokens: 8
output: {folder}/run
""")
    return path


Ingle = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: str | Path) -> list[str]:
    """The command line that runs Ingle in a child process."""
    return [sys.executable, "-m", "ingle", *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment of a child process: one thread, no hub."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def ingle_process() -> Ingle:
    """Runs the command to its end in a child process, which spends seconds on loading libraries."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, env=environment())

    return run


@pytest.fixture
def ingle(monkeypatch: pytest.MonkeyPatch) -> Ingle:
    """Runs the command to its end in this process, from the words that were typed to the exit code."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = list(map(str, arguments))
        with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
            code = run_command(words)
        return subprocess.CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())

    return run
