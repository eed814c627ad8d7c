"""The commands and programs on the pages run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs import check
from docs.markdown import Page, read_pages
from tests.docs.hub import serve_hub
from tests.docs.running import Result, Runner, Worker

ROOT = Path(check.ROOT)

#: Rows of the demo's data that are used.
_ROWS = 64

#: Small models in place of those that the pages name, wide enough for every format, with the bundled tokenizer.
_MAKE_MODELS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
tokenizer = PreTrainedTokenizerFast.from_pretrained("{tokenizer}")
sizes = dict(
    vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, max_position_embeddings=1024, bos_token_id=None,
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
)
models = {{"llama": LlamaForCausalLM(LlamaConfig(**sizes)), "qwen3": Qwen3ForCausalLM(Qwen3Config(**sizes))}}
for name, model in models.items():
    model.to(torch.bfloat16).save_pretrained(name)
    tokenizer.save_pretrained(name)
"""


def is_run(page: Page) -> bool:
    """Returns whether the commands of a page are run one after the other."""
    return page.name == "README.md" or page.name.startswith(("docs/tutorials/", "docs/how-to/"))


def prepare(runner: Runner, folder: Path) -> None:
    """Creates what the pages assume: small models, a GGUF file, the finished demo."""
    tokenizer = ROOT / "examples" / "models" / "ember-6m"
    assert runner.worker.run_python(_MAKE_MODELS.format(tokenizer=tokenizer), folder).code == 0
    examples = folder / "examples"
    (examples / "models").mkdir(parents=True)
    for entry in (ROOT / "examples").iterdir():
        if entry.name not in ("models", "demo"):
            (examples / entry.name).symlink_to(entry)
    (examples / "demo").mkdir()
    for entry in (ROOT / "examples" / "demo").iterdir():
        lines = entry.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = lines[:_ROWS] if entry.suffix == ".jsonl" else lines
        (examples / "demo" / entry.name).write_text("".join(kept), encoding="utf-8")
    (examples / "models" / "ember-6m").symlink_to(folder / "llama")
    for name in ("ember-encoder", "ember-encoder-decoder"):
        (examples / "models" / name).symlink_to(ROOT / "examples" / "models" / name)
    (folder / "my-model").symlink_to(folder / "llama")
    for command in (
        "ingle quantize my-model --to q4_k_m --out some-model.Q4_K_M.gguf",
        "ingle train examples/demo/demo.yaml",
        "ingle train examples/align/sft.yaml --output=notices",
    ):
        done = runner.run_command(command, folder)
        assert done.code == 0, done.output
    (examples / "models" / "ember-6m-notices").symlink_to(folder / "notices" / "adapter")


@pytest.mark.slow
def test_every_command_of_the_pages_runs(tmp_path: Path) -> None:
    """Uses one process, because loading the libraries takes longer than most commands."""
    folder = tmp_path / "stage"
    (folder / "data").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "own-data" / "train.jsonl", folder / "data" / "train.jsonl")
    models = {"Qwen/Qwen3-0.6B": folder / "qwen3", "HuggingFaceTB/SmolLM2-360M-Instruct": folder / "llama"}
    with serve_hub(models, datasets={"HuggingFaceH4/no_robots": folder / "data"}) as (address, close_hub):
        hub = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1"}
        hub |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        with Worker(ROOT, hub | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}) as worker:
            runner = Runner(worker, ROOT, verifies=find_spec("llama_cpp") is not None)
            prepare(runner, folder)
            wrong = list(run_pages(runner, folder, tmp_path))
            assert not wrong, "\n\n".join(wrong)
            unknown = ask_hub(worker, folder, "nobody/nothing")
            assert unknown.code == 2 and "no model of that name on the hub" in unknown.output, unknown.output
            close_hub()
            away = ask_hub(worker, folder, "somebody/something")
            assert away.code == 2 and "HubUnavailable" in away.output and "go online once" in away.output, away.output
            cached = runner.run_command("ingle train examples/quickstart-hub.yaml --dry-run", folder)
            assert cached.code == 0, cached.output


def run_pages(runner: Runner, stage: Path, tmp_path: Path) -> Iterator[str]:
    """Runs each page in a folder of its own with a copy of the stage; yields the failures."""
    pages = [page for page in read_pages(ROOT) if is_run(page)]
    blocks = [block for page in pages for block in page.blocks]
    files = {name: block.text for block in blocks if (name := block.mark("file"))}
    whole = next(block.text for block in blocks if block.language == "yaml" and "output: runs/mine" in block.text)
    files = {"mine.yaml": whole} | files
    for number, page in enumerate(pages):
        folder = tmp_path / f"page-{number}"
        folder.mkdir()
        for name in ("examples", "my-model", "some-model.Q4_K_M.gguf"):
            (folder / name).symlink_to(stage / name)
        for name, text in files.items():
            (folder / name).write_text(text)
        shutil.copytree(stage / "runs", folder / "runs")
        yield from runner.run_page(page, folder)


def ask_hub(worker: Worker, folder: Path, model: str) -> Result:
    """Trains a model of the hub, which is the first thing that a run requests."""
    data = "--data.sources=examples/own-data/train.jsonl"
    return worker.run(["train", f"--model.id={model}", data, "--output=runs/asked", "--train.num_steps=1"], folder)
