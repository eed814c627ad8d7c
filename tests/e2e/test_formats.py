"""The commands ``ingle formats`` and ``ingle quantize``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ingle.gguf import read_gguf
from tests.e2e.conftest import Ingle


def test_a_format_is_chosen_and_written(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, ingle: Ingle, ingle_process: Ingle
) -> None:
    text, out = tiny_data / "held-out.jsonl", tmp_path / "formats"
    shown = ingle("formats", tiny_model, "--data", text, "--formats", "q8_0,q4_0,nf4", "--out", out)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"● q8_0 +[\d.]+ KiB +\d+\.\d+ +\d", shown.stdout) and "Recommended: " in shown.stdout
    assert "<svg" in (out / "formats.html").read_text()

    shown = ingle_process("formats", tiny_model, "--data", text, "--formats", "q8_0,q4_0,nf4", "--out", out, "--json")
    report = json.loads(shown.stdout)
    assert report == json.loads((out / "formats.json").read_text())
    assert {row["name"] for row in report["formats"]} == {"q8_0", "q4_0", "nf4"}
    assert report["subject"]["data"] == str(text) and report["num_tokens"] > 50

    file = tmp_path / "m.gguf"
    made = ingle("quantize", tiny_model, "--to", "q4_0", "--out", file, "--data", text)
    assert made.returncode == 0, made.stderr
    assert "attn_q" in made.stdout and "bits per weight" in made.stdout and f"Wrote {file}" in made.stdout
    assert read_gguf(file).tensors["blk.0.attn_q.weight"].type_name == "q4_0"
    again = ingle("quantize", tiny_model, "--to", "q4_0", "--out", file)
    assert again.returncode == 2 and "exists" in again.stderr
    plain = json.loads(ingle("quantize", tiny_model, "--to", "nf4", "--out", tmp_path / "nf4", "--json").stdout)
    assert plain["container"] == "safetensors" and plain["classes"]["q_proj"]["relative_error"] > 0.05


def test_mistakes_end_with_a_message(tiny_model: Path, tmp_path: Path, ingle: Ingle) -> None:
    for arguments, words in (
        (("formats", tiny_model), "--data"),
        (("formats", tiny_model, "--data", tmp_path / "none.jsonl"), "does not exist"),
        (("formats", tiny_model, "--data", "x", "--formats", "q4_km"), "did you mean q4_k_m"),
        (("quantize", tiny_model, "--to", "q4_km", "--out", tmp_path / "m"), "did you mean q4_k_m"),
        (("quantize", tiny_model, "--to", "q4_0"), "--out"),
    ):
        shown = ingle(*arguments)
        assert shown.returncode == 2 and words in shown.stderr, shown.stderr
        assert "Traceback" not in shown.stderr
