"""A small model of any type trains from a config to a scored adapter, with which PEFT computes what Ingle computes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ingle import finetune, models
from ingle.config import load_run
from ingle.inference import load, locate
from ingle.models.loading.layout_choice import enliven
from tests.contract.models import test_any_causal_model, test_any_encoder, test_any_encoder_decoder
from tests.contract.models.tiny_types import (
    CAUSAL_TYPES,
    ENCODER_DECODER_TYPES,
    ENCODER_TYPES,
    small_config,
    small_encoder_config,
    small_encoder_decoder_config,
)
from tests.tiny_tokenizers import words

pytestmark = pytest.mark.filterwarnings("ignore")

#: Types whose published end token has no place in a vocabulary of 128.
ENDS_BEYOND = ("cwm", "glm", "glm4", "phi4_multimodal")
#: Types that PEFT cannot adapt, or whose class for the task it cannot read.
NOT_IN_PEFT = {
    "ibert": "its linear layers are no nn.Linear",
    "modernvbert": "PEFT takes a layer of its tower for the head",
}
SKIPPED = {
    "sft": test_any_causal_model.NOT_BUILT
    | test_any_causal_model.REASONS
    | dict.fromkeys(ENDS_BEYOND, "its end token is beyond the small vocabulary")
    | dict.fromkeys(("emu3", "mllama"), "its causal class cannot be built without the tower"),
    "mlm": test_any_encoder.REFUSED | NOT_IN_PEFT,
    "classify": test_any_encoder.REFUSED
    | NOT_IN_PEFT
    | {"neomme": "transformers cannot classify with it", "squeezebert": "it has no linear layer to adapt"},
    "seq2seq": test_any_encoder_decoder.REFUSED
    | dict.fromkeys(test_any_encoder_decoder.WITH_SOUND, "it is a causal model")
    | {"encoder-decoder": "its default config names no first token"},
}
BUILT = {
    "sft": (AutoModelForCausalLM, small_config, CAUSAL_TYPES),
    "mlm": (AutoModelForMaskedLM, small_encoder_config, ENCODER_TYPES),
    "classify": (AutoModelForMaskedLM, small_encoder_config, ENCODER_TYPES),
    "seq2seq": (AutoModelForSeq2SeqLM, small_encoder_decoder_config, ENCODER_DECODER_TYPES),
}
CASES = [(objective, kind) for objective, (_, _, kinds) in BUILT.items() for kind in kinds]
QUICK = (("mlm", "albert"), ("classify", "distilbert"))
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "is", "good", "or", "bad")


def rows(objective: str) -> list[dict[str, str]]:
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(length))

    make = {
        "sft": lambda i: {"prompt": f"{text(4)} : ", "completion": text(3 + i % 4)},
        "mlm": lambda i: {"text": text(6 + i % 9)},
        "classify": lambda i: {"text": text(4 + i % 6), "label": ("neg", "pos")[i % 2]},
        "seq2seq": lambda i: {"source": text(4 + i % 5), "target": text(3 + i % 4)},
    }
    return [make[objective](i) for i in range(24)]


@pytest.mark.parametrize(
    ("objective", "kind"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.sweep, id="-".join(case)) for case in CASES],
)
def test_a_type_trains_from_a_config_and_peft_reads_its_adapter(objective: str, kind: str, tmp_path: Path) -> None:
    if kind in SKIPPED[objective]:
        pytest.skip(SKIPPED[objective][kind])
    auto, small, _ = BUILT[objective]
    torch.manual_seed(0)
    model = auto.from_config(small(kind), dtype=torch.float32)
    enliven(model)
    model.save_pretrained(tmp_path / "model")
    words(ends=objective != "sft").save_pretrained(tmp_path / "model")
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, rows(objective))))
    options = {
        "model.id": tmp_path / "model",
        "model.dtype": "float32",
        "objective.kind": objective,
        "data.sources": f"[{data}]",
        "data.max_seq_len": 32,
        "adapter.rank": 4,
        "optim.lr": 0.01,
        "train.num_steps": 2,
        "train.global_batch_size": 2,
        "evaluate.sources": f"[{data}]",
        "evaluate.num_samples": 3,
        "output": out,
    }
    if objective in ("sft", "seq2seq"):
        options["evaluate.max_new_tokens"] = 6
    report = finetune(load_run(None, [f"--{key}={value}" for key, value in options.items()]).run)
    assert report.metrics
    tuned = load(locate(str(out))).model.eval()
    reader = getattr(transformers, models.class_that_reads(tuned))
    base = reader.from_pretrained(
        tmp_path / "model", dtype=torch.float32, **({"num_labels": 2} if objective == "classify" else {})
    )
    expected = logits(PeftModel.from_pretrained(base, out / "adapter").eval(), objective)
    torch.testing.assert_close(logits(tuned, objective), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel, objective: str) -> torch.Tensor:
    """The outputs for one text."""
    target = {"decoder_input_ids": torch.tensor([[3, 9, 8, 7]])} if objective == "seq2seq" else {}
    found: torch.Tensor = model(input_ids=torch.tensor([[3, 6, 7, 8, 9, 1]]), use_cache=False, **target).logits
    return found
