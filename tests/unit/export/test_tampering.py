"""A certificate compares with the trained model, so a damaged file is found even if Ingle reads the same damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from ingle.errors import DependencyError, ExportError
from ingle.events import Event, Saved
from ingle.export import export
from ingle.export.request import Target

MakeAdapter = Callable[..., Path]
needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama.cpp's Python binding: make judge")


def reverse_rows(file: GGUFReader) -> None:
    """Reverses the rows of a weight."""
    rows = next(tensor.data for tensor in file.tensors if tensor.name == "blk.0.ffn_up.weight")
    rows[:] = rows[::-1].copy()


def leave_order(file: GGUFReader) -> None:
    """Puts queries and keys into the order of the hub's files, as if they had not been permuted."""
    for tensor in file.tensors:
        heads = {"attn_q": 8, "attn_k": 4}.get(tensor.name.removesuffix(".weight").rpartition(".")[2])
        if heads is not None:
            rows = np.array(tensor.data)
            turned = rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2)
            tensor.data[:] = turned.reshape(rows.shape)


def end_elsewhere(file: GGUFReader) -> None:
    """Changes the token that ends an answer."""
    entry: Any = file.get_field("tokenizer.ggml.eos_token_id")
    entry.parts[entry.data[0]][:] = 9


def misspell_template(file: GGUFReader) -> None:
    """Misspells a role of the chat template, keeping its length."""
    entry: Any = file.get_field("tokenizer.chat_template")
    text = entry.parts[entry.data[0]]
    at = bytes(text).index(b"assistant")
    text[at : at + 9] = np.frombuffer(b"assastant", np.uint8)


def export_tampered(adapter: Path, to: Target, out: Path, tamper: Callable[[], None], **options: Any) -> dict[str, Any]:
    """Changes an export before it is verified; returns the certificate."""

    def sink(event: Event) -> None:
        if isinstance(event, Saved) and event.kind == "export":
            tamper()

    with pytest.raises(ExportError, match="does not answer"):
        export(str(adapter), to, out, verify=True, sink=sink, **options)
    folder = out.parent if out.suffix == ".gguf" else out
    made: dict[str, Any] = json.loads(next(folder.glob("*certificate.json")).read_text())
    assert made["passed"] is False
    return made


@needs_llama
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (reverse_rows, "from the trained model"),
        (leave_order, "from the trained model"),
        (end_elsewhere, "answers end at token 9"),
        (misspell_template, "prompts are tokenized differently"),
    ],
)
def test_a_changed_gguf_gets_no_certificate(
    make_adapter: MakeAdapter, tmp_path: Path, fault: Callable[[GGUFReader], None], reason: str
) -> None:
    out = tmp_path / "served" / "m.gguf"

    def tamper() -> None:
        file = GGUFReader(out, "r+")
        fault(file)
        file.data.flush()

    made = export_tampered(make_adapter(0.05), "gguf", out, tamper, type="q8_0")
    assert any(reason in each for each in made["reasons"]), made["reasons"]


def test_a_changed_weight_of_safetensors_gets_no_certificate(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    out = tmp_path / "merged"

    def tamper() -> None:
        tensors = load_file(out / "model.safetensors")
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = torch.flip(tensors[key], (0,))
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    made = export_tampered(make_adapter(0.05), "safetensors", out, tamper, type="f32")
    assert made["mean_kl"] < 1e-6 < made["trained"]["limit"] < made["trained"]["mean_kl"]


@pytest.mark.parametrize(("to", "type_name", "missing"), [("peft", None, "peft"), ("safetensors", "hqq", "hqq")])
def test_a_missing_reader_is_known_before_anything_is_written(
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: Target,
    type_name: str | None,
    missing: str,
) -> None:
    there = find_spec
    monkeypatch.setattr(
        "ingle.models.interop.transformers_peft.find_spec", lambda name: None if name == missing else there(name)
    )
    with pytest.raises(DependencyError, match=f"pip install {missing}"):
        export(str(make_adapter()), to, tmp_path / "out", type=type_name, verify=True)
    assert not (tmp_path / "out").exists()
