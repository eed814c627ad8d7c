"""Makes the inputs that are mutated: a tiny model in every file format, its data, and a run."""

from __future__ import annotations

import csv
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import torch

from tests.conftest import make_tokenizer, write_model
from tests.tiny import write_llama

CONFIG = """\
# a comment
model: {{id: {model}, dtype: float32}}
base: {{format: nf4, block_size: 64}}
adapter: {{kind: lora, rank: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj, v_proj]}}
data:
  sources:
    - path: {data}
      limit: 100
      columns: {{prompt: question}}
  max_seq_len: 64
optim: {{lr: 3e-4, schedule: cosine, warmup_steps: 2}}
train: {{num_steps: 2, global_batch_size: 2, micro_batch_size: 1, save_every: 1}}
seed: 7
output: {output}
"""
#: A run of two steps with a checkpoint after each.
RUN = """\
model: {{id: {model}, dtype: float32}}
base: {{format: none}}
adapter: {{kind: lora, rank: 2, dropout: 0.1}}
data: {{sources: [{data}], max_seq_len: 64}}
optim: {{lr: 5e-3}}
train: {{num_steps: 2, global_batch_size: 2, micro_batch_size: 1, save_every: 1, keep_checkpoints: 2, compile: false}}
output: {output}
"""


def _row(*contents: str) -> dict[str, list[dict[str, str]]]:
    """Returns a conversation; the first of three texts is the system message."""
    roles = ("system", "user", "assistant")[-len(contents) :]
    return {
        "messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)],
    }


ROWS = [*(_row(f"what is {n} plus two?", f"{n + 2}.") for n in range(5)), _row("be kind", "hello", "hello, fox")]


def write_folder(folder: Path) -> Path:
    """Writes the model in the hub's layout."""
    tokenizer = make_tokenizer(eos="<|im_end|>", special=("<|im_start|>",))
    return write_llama(
        folder, tokenizer, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip


def write_gguf_file(path: Path, model: Path) -> None:
    """Writes the model as a GGUF file."""
    write_model(model, path, "q8_0")


def write_family(path: Path, case: str) -> None:
    """Writes a random model of a family of GGUF files."""
    from tests.numerics.test_gguf_families import random_model, written

    written(random_model(case), path)


def write_sharded(folder: Path, model: Path) -> None:
    """Writes the model as two safetensors files with an index."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_quantized(folder: Path, model: Path, to: str) -> None:
    """Writes the model quantized in the layout of bitsandbytes or hqq."""
    from ingle.export import quantize

    quantize(str(model), to, folder)


def write_adapter(folder: Path, model: Path) -> None:
    """Writes an adapter with nonzero B."""
    from ingle import adapters, models
    from ingle.config.adapter import LoraAdapter
    from ingle.config.model import ModelConfig

    loaded = models.load_model(ModelConfig(id=str(model), dtype="float32"))
    section = LoraAdapter(kind="lora", rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"))
    adapters.attach(loaded, section, seed=0)
    with torch.no_grad():
        for name, parameter in sorted(loaded.named_parameters()):
            if "lora_b" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    adapters.save_adapter(loaded, folder, section, str(model))


def write_run(folder: Path, model: Path, data: Path) -> None:
    """Makes a finished run."""
    from ingle import flow
    from ingle.config import load_run

    config = folder.with_suffix(".yaml")
    config.write_text(RUN.format(model=model, data=data, output=folder))
    flow.finetune(load_run(config).run)
    config.unlink()
    (folder / "run.lock").unlink(missing_ok=True)


def unfinish(folder: Path) -> None:
    """Resets a run to its first checkpoint."""
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-2")
    for name in ("report.json", "report.html"):
        (folder / name).unlink()


def write_imatrix_files(folder: Path, model: Path) -> None:
    """Writes an importance matrix in both formats of llama.cpp."""
    from safetensors import safe_open

    from ingle.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    entries: dict[str, ImatrixEntry] = {}
    with safe_open(model / "model.safetensors", "np") as file:
        for name in sorted(file.keys()):
            words = name.split(".")
            if words[-2] in parts:
                sums = rng.random((1, file.get_slice(name).get_shape()[1]), np.float32)
                entries[f"blk.{words[2]}.{parts[words[-2]]}.weight"] = ImatrixEntry(sums, np.full(1, 8, np.float32))
    write_imatrix(folder / "imatrix.gguf", Imatrix(entries, ("text.jsonl",), 2, 4))
    legacy = struct.pack("<i", len(entries))
    for name, entry in entries.items():
        values = entry.sums[0]
        legacy += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 8, len(values)) + values.tobytes()
    (folder / "imatrix.dat").write_bytes(legacy + struct.pack("<ii", 2, 5) + b"a.txt")


def _make_preferences(pairs: list[dict[str, str]]) -> list[dict[str, object]]:
    """Returns preferences of every form that one file may have."""
    found: list[dict[str, object]] = []
    for number, pair in enumerate(pairs):
        answers = {"chosen": pair["completion"], "rejected": pair["completion"] + " no"}
        asked = [{"role": "user", "content": pair["prompt"]}]
        turns = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        forms: list[dict[str, object]] = [
            {"prompt": pair["prompt"], **answers, "margin": 0.5},
            {"prompt": asked, **turns, "system": "be brief"},
            {**{name: asked + own for name, own in turns.items()}, "score_chosen": 3, "score_rejected": 1},
        ]
        found.append(forms[number % len(forms)])
    return found


def write_data(folder: Path) -> None:
    """Writes the same rows in every file format."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    pairs = [{"prompt": row["messages"][-2]["content"], "completion": row["messages"][-1]["content"]} for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _make_preferences(pairs)))
    (folder / "rows.json").write_text(json.dumps({"data": ROWS}, indent=1))
    (folder / "array.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "text.txt").write_text("the quick brown fox\n\njumps over the lazy dog\n" * 20)
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(folder / f"rows.{suffix}", "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter, lineterminator="\n")
            writer.writeheader()
            writer.writerows(pairs)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), folder / "rows.parquet")
