"""The commands and programs that the pages tell a reader to run do run."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import check
from docs.markdown import Page, read_pages
from tests.docs.hub import serve_hub
from tests.docs.running import Runner, Worker

ROOT = Path(check.ROOT)

#: Stand-ins of the models that the pages name: as large as a packed format needs, with the bundled tokenizer.
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


def of_readers(page: Page) -> bool:
    """Whether a page is one whose commands a reader types one after the other."""
    return page.name == "README.md" or page.name.startswith(("docs/tutorials/", "docs/how-to/"))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[tuple[Runner, Path]]:
    """A runner with a hub, and a folder that holds all that the pages take for granted."""
    folder = tmp_path / "stage"
    (folder / "data").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "own-data" / "train.jsonl", folder / "data" / "train.jsonl")
    models = {"Qwen/Qwen3-0.6B": folder / "qwen3", "HuggingFaceTB/SmolLM2-360M-Instruct": folder / "llama"}
    with serve_hub(models, datasets={"HuggingFaceH4/no_robots": folder / "data"}) as address:
        home = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1"}
        offline = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        worker = Worker(ROOT, home | offline | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"})
        try:
            yield Runner(worker, ROOT, importlib.util.find_spec("llama_cpp") is not None), folder
        finally:
            worker.close()


def prepare(runner: Runner, folder: Path) -> None:
    """Makes what the pages take for granted: small models, a GGUF file, the finished demo."""
    tokenizer = ROOT / "examples" / "models" / "ember-6m"
    assert runner.worker.run_python(_MAKE_MODELS.format(tokenizer=tokenizer), folder).code == 0
    examples = folder / "examples"
    (examples / "models").mkdir(parents=True)
    for entry in (ROOT / "examples").iterdir():
        if entry.name != "models":
            (examples / entry.name).symlink_to(entry)
    (examples / "models" / "ember-6m").symlink_to(folder / "llama")
    (folder / "my-model").symlink_to(folder / "llama")
    for command in (
        "ingle quantize my-model --to q4_k_m --out some-model.Q4_K_M.gguf",
        "ingle train examples/demo/demo.yaml",
    ):
        done = runner.run_command(command, folder)
        assert done.code == 0, done.output


@pytest.mark.slow
def test_every_command_of_the_pages_runs(stage: tuple[Runner, Path], tmp_path: Path) -> None:
    """One test, since loading the libraries takes longer than most commands."""
    runner, folder = stage
    prepare(runner, folder)
    pages = [page for page in read_pages(ROOT) if of_readers(page)]
    files = {name: block.text for page in pages for block in page.blocks if (name := block.mark("file"))}
    whole = [block.text for page in pages for block in page.blocks if "output: runs/mine" in block.text]
    files = {"mine.yaml": next(text for text in whole if "Qwen" in text)} | files
    wrong = []
    for number, page in enumerate(pages):
        place = tmp_path / f"page-{number}"
        place.mkdir()
        for name in ("examples", "my-model", "some-model.Q4_K_M.gguf"):
            (place / name).symlink_to(folder / name)
        for name, text in files.items():
            (place / name).write_text(text)
        shutil.copytree(folder / "runs", place / "runs")
        try:
            runner.run_page(page, place)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n\n".join(wrong)
