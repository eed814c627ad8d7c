"""``ingle.export``: complete exports of a tiny model, read by PEFT, transformers and llama.cpp."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BertConfig, BertForTokenClassification

from ingle import inference, models
from ingle.atomic import sha256
from ingle.config.adapter import MergeAware
from ingle.config.model import ModelConfig
from ingle.errors import AdapterError, ConfigError, DependencyError, ExportError, IngleError
from ingle.events import Event, Warned
from ingle.export import export
from ingle.export.verify import certificate
from ingle.export.verify.certificate import certify
from ingle.inference import Engine
from tests import tiny_tokenizers
from tests.tiny import SIZES

MakeAdapter = Callable[..., Path]
needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama.cpp's Python binding: make judge")
IDS = [5, 17, 250, 33, 8, 299, 41]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("the quick brown fox?", "jumps over the lazy dog"), ("what is two plus two?", "it is four."))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _ours(adapter: Path) -> torch.Tensor:
    source = inference.locate(str(adapter))
    source = inference.Source(source.model.model_copy(update={"dtype": "float32"}), source.base, source.adapter)
    with torch.no_grad():
        logits: torch.Tensor = inference.open_source(source).model(input_ids=torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_reads_the_adapter(llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter()
    out = tmp_path / "out"
    result = export(str(adapter), "peft", out, verify=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32), out)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(_ours(adapter), theirs, rtol=1e-4, atol=1e-4)
    made = json.loads((out / "certificate.json").read_text())
    assert made["passed"] and result.certificate.passed and made["mean_kl"] < 1e-6
    assert made["files"]["adapter_model.safetensors"] == sha256(out / "adapter_model.safetensors")
    printed = result.to_dict()
    assert list(printed) == ["path", "to", "type", "num_bytes", "fidelity", "certificate", "files"]
    assert made == printed["certificate"] | {"files": made["files"]}
    assert list(made) == [
        "passed", "reasons", "mean_kl", "top1_agreement", "greedy_equal", "num_prompts", "num_tokens", "tolerance",
        "tokenizer_probes", "notes", "end_tokens", "prompts", "versions", "files",
    ]  # fmt: skip
    assert "library_name: peft" in (out / "README.md").read_text()


def test_merged_safetensors_are_certified_by_transformers(
    make_adapter: MakeAdapter, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "out"
    result = export(str(make_adapter()), "safetensors", out, type="f32", verify=True, data=text)
    assert result.certificate.passed and result.certificate.agreement.greedy_equal == 2
    fidelity = json.loads((out / "fidelity.json").read_text())
    assert fidelity["divergence"]["kl"] < 1e-3 and fidelity["adapter_effect"] > 1e-3
    assert fidelity["mean_correlation"] > 0.9999 and len(fidelity["tensors"]) == 14
    assert "| model.layers.0.self_attn.q_proj.weight | float32 |" in (out / "fidelity.md").read_text()


@pytest.mark.parametrize("type_name", ["hqq", "hqq-8", "hqq-3-g32"])
def test_hqq_is_measured_as_every_other_layout(
    make_adapter: MakeAdapter, tmp_path: Path, text: Path, type_name: str
) -> None:
    out = tmp_path / "out"
    result = export(str(make_adapter(0.2)), "safetensors", out, type=type_name, data=text, allow_loss=True)
    bits, group_size = {"hqq": (4, 64), "hqq-8": (8, 64), "hqq-3-g32": (3, 32)}[type_name]
    assert result.type == {"hqq": "hqq-4"}.get(type_name, type_name)
    stored = json.loads((out / "config.json").read_text())["quantization_config"]["quant_config"]
    assert stored["weight_quant_params"] == {"nbits": bits, "group_size": group_size, "axis": 1}
    kl = result.fidelity.divergence.kl
    assert kl < 1e-3 if bits == 8 else 1e-3 < kl < 1


@needs_llama
@pytest.mark.parametrize("type_name", ["f16", "q8_0", "q4_k_m", "q5_1", "iq4_xs"])
def test_llama_cpp_answers_with_gguf_as_ingle_does(
    make_adapter: MakeAdapter, tmp_path: Path, text: Path, type_name: str
) -> None:
    out = tmp_path / "served" / "m.gguf"
    result = export(str(make_adapter()), "gguf", out, type=type_name, verify=True, data=text, allow_loss=True)
    made = json.loads((out.parent / "m.certificate.json").read_text())
    assert made["passed"] is True and result.certificate.passed
    assert all(prompt["tokens_equal"] for prompt in made["prompts"])
    assert made["files"] == {"m.gguf": sha256(out)}
    assert "TEMPLATE" in (out.parent / "m.Modelfile").read_text()


@needs_llama
@pytest.mark.parametrize("base", ["none", "q8_0"])
def test_llama_cpp_puts_the_adapter_on_its_base(make_adapter: MakeAdapter, tmp_path: Path, base: str) -> None:
    result = export(str(make_adapter(base=base)), "gguf-adapter", tmp_path / "lora" / "lora.gguf", verify=True)
    made = result.certificate
    assert made.passed and made.agreement.mean_kl < (1e-5 if base == "none" else 1e-2)
    assert sorted(os.listdir(tmp_path / "lora")) == [
        "lora.Modelfile", "lora.certificate.json", "lora.gguf", "lora.md"
    ]  # fmt: skip


@pytest.mark.parametrize(("aware", "number"), [(None, 0), (MergeAware(), 1)])
def test_an_unmerged_export_of_an_adapter_trained_to_be_merged_warns(
    make_adapter: MakeAdapter, tmp_path: Path, aware: MergeAware | None, number: int
) -> None:
    events: list[Event] = []
    export(str(make_adapter(base="q4_0", merge_aware=aware)), "peft", tmp_path / "out", sink=events.append)
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert len(warnings) == number and all("unmerged" in warning for warning in warnings)


@needs_llama
def test_another_model_gets_no_certificate(llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    from ingle.data.types import Example
    from ingle.export.verify.llama_cpp import LlamaCpp

    export(str(make_adapter(0.1)), "gguf", tmp_path / "m.gguf", type="f32", allow_loss=True)
    config = ModelConfig(id=str(llama_folder), dtype="float32")
    engine = Engine(models.load_model(config), models.load_tokenizer(config), adapted=False)
    prompt = Example("here", prompt="the quick brown fox?", completion="")
    with LlamaCpp(tmp_path / "m.gguf", context=256) as server:
        made = certify(server, engine, [prompt], system=None, tolerance=certificate.PLAIN)
    assert not made.passed and any("KL" in reason for reason in made.reasons)
    with pytest.raises(ExportError, match="does not answer"):
        made.require_passed(tmp_path)


class _Echo:
    """Ingle in the role of the other program, with one fault."""

    version = "echo"
    declared_end = None

    def __init__(self, engine: Engine, **faults: Any) -> None:
        self._engine, self._faults = engine, faults

    def prompt_ids(self, messages: Any) -> list[int]:
        from ingle.data.types import Message

        ids = self._engine._prompt_ids([Message(m["role"], m["content"]) for m in messages], None)
        return [7, *ids] if self._faults.get("tokens") else ids

    def text_ids(self, text: str) -> list[int]:
        ids = [int(i) for i in self._engine.tokenizer(text)["input_ids"]]
        return ids[:-1] if self._faults.get("texts") else ids

    def is_end(self, token: int) -> bool:
        return not self._faults.get("ends")

    def logits(self, ids: Any) -> np.ndarray:
        with torch.no_grad():
            logits = self._engine.model(input_ids=torch.tensor([list(ids)])).logits[0].float().numpy()
        return -logits if self._faults.get("logits") else logits

    def continue_greedily(self, ids: Any, num_tokens: int, ends: Any) -> list[int]:
        answer = list(
            models.generate(self._engine.model, self._engine.tokenizer, [ids], max_new_tokens=num_tokens)[0].token_ids
        )
        if self._faults.get("answers"):
            answer[0] = int(self.logits(ids)[-1].argmin())
        return answer


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (None, None),
        ("tokens", "prompts are tokenized differently"),
        ("texts", "texts are tokenized differently"),
        ("ends", "do not end at"),
        ("logits", "KL divergence"),
        ("answers", "not tied"),
    ],
)
def test_every_fault_is_found(llama_folder: Path, fault: str | None, reason: str | None) -> None:
    from ingle.data.types import Example

    config = ModelConfig(id=str(llama_folder), dtype="float32")
    engine = Engine(models.load_model(config), models.load_tokenizer(config), adapted=False)
    prompt = Example("here", prompt="the quick brown fox?", completion="")
    server = _Echo(engine, **({} if fault is None else {fault: True}))
    made = certify(server, engine, [prompt], system=None, tolerance=certificate.PLAIN, max_new_tokens=4)
    assert made.passed == (fault is None)
    assert fault is None or any(str(reason) in each for each in made.reasons)


def test_a_merge_that_loses_too_much_is_refused_and_leaves_nothing(
    make_adapter: MakeAdapter, tmp_path: Path, text: Path
) -> None:
    adapter = str(make_adapter(0.002, base="q4_0"))
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="lose too much") as caught:
        export(adapter, "gguf", out, type="q2_k", data=text, max_kl=1e-9)
    assert "--promote" in str(caught.value) and "correlation" in str(caught.value)
    with pytest.raises(ExportError, match="has a correlation"):
        export(adapter, "gguf", out, type="q2_k")
    assert not list(tmp_path.glob("out*"))
    assert export(adapter, "gguf", out, type="q2_k", allow_loss=True).fidelity.mean_correlation < 0.5


def test_promotion_widens_within_its_budget(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = str(make_adapter(0.01))
    plain = export(adapter, "gguf", tmp_path / "a", type="q3_k_m", allow_loss=True)
    wider = export(adapter, "gguf", tmp_path / "b", type="q3_k_m", allow_loss=True, promote=True, size_budget=0.3)
    assert wider.fidelity.mean_correlation > plain.fidelity.mean_correlation + 0.02
    assert plain.num_bytes < wider.num_bytes <= 1.3 * plain.num_bytes
    promotion = wider.fidelity.promotion
    assert promotion.types and wider.num_bytes - plain.num_bytes == promotion.extra_bytes


def test_another_base_is_refused_or_reported(llama_folder: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(base="nf4")
    other = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    models.load_tokenizer(ModelConfig(id=str(llama_folder))).save_pretrained(tmp_path / "other")
    settings = adapter / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(llama_folder), str(tmp_path / "other")))
    with pytest.raises(AdapterError, match="another base"):
        export(str(adapter), "gguf", tmp_path / "a", type="f16")
    assert not list(tmp_path.glob("a*"))
    messages: list[str] = []
    export(
        str(adapter),
        "gguf",
        tmp_path / "a",
        type="f16",
        allow_mismatch=True,
        sink=lambda event: messages.append(getattr(event, "message", "")),
    )
    assert any("another base" in message and "%" in message for message in messages)


def test_contradicting_options_are_refused(make_adapter: MakeAdapter, llama_folder: Path, tmp_path: Path) -> None:
    adapter = str(make_adapter())
    for options in ({"type": "bf16"}, {"promote": True}):
        with pytest.raises(ConfigError):
            export(adapter, "peft", tmp_path / "x", **options)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="no adapter"):
        export(str(llama_folder), "peft", tmp_path / "x")
    with pytest.raises(ConfigError, match="There is no such file"):
        export(adapter, "gguf", tmp_path / "x", data=tmp_path / "missing.jsonl")


@pytest.mark.parametrize("to", ["peft", "gguf", "gguf-adapter"])
def test_a_tagger_without_adapter_is_led_to_the_only_export_there_is(to: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = tiny_tokenizers.bert()
    config = BertConfig(vocab_size=len(tokenizer), **sizes, id2label={0: "O", 1: "B-PER"})
    for part in (BertForTokenClassification(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(IngleError) as error:
        export(str(tmp_path / "model"), to, tmp_path / "x")
    assert error.value.fix is not None and error.value.fix.split(" exports")[0] == "--to safetensors"


def test_a_missing_binding_is_reported_before_anything_is_written(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(DependencyError, match="--verify") as caught:
        export(str(make_adapter()), "gguf", tmp_path / "x", type="f16", verify=True)
    assert "judge" in str(caught.value)  # the tests run in a source checkout
    assert not list(tmp_path.glob("x*"))


@needs_llama
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma", "mistral", "mixtral"])
def test_other_families_answer_in_llama_cpp(llama_folder: Path, tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    tokenizer = models.load_tokenizer(ModelConfig(id=str(llama_folder)))
    options = SIZES | {
        "head_dim": 16,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }
    if family == "mixtral":
        options |= {"num_experts_per_tok": 2, "num_local_experts": 4, "sliding_window": None}
    torch.manual_seed(0)
    folder = tmp_path / family
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = export(str(folder), "gguf", tmp_path / "out", type="f32", verify=True).certificate
    assert made.passed and made.agreement.mean_kl < 1e-5
    assert bool(made.notes) == (family == "qwen2")  # its tokenizer composes accents, llama.cpp does not
