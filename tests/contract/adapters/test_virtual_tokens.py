"""Virtual tokens before every text: PEFT computes the same from the saved folder, and Ingle the same from PEFT's.

Documents are packed here; PEFT gets each of them alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
import transformers
from pydantic import TypeAdapter
from torch import Tensor

from ingle import adapters, models
from ingle.adapters.lora import generator_of
from ingle.config.adapter import AdapterConfig
from ingle.config.base import NoBase, base_section
from ingle.config.model import ModelConfig
from ingle.data.batch import collate, round_up
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.errors import AdapterError
from ingle.models import ModelTask
from ingle.models.forward.encoder_decoder import Row, forward_pairs
from ingle.models.forward.hidden_states import Head, forward_packed, through_head
from ingle.models.forward.prompt_sharing import why_prompts_repeat
from ingle.models.forward.task_heads import forward_task
from ingle.models.forward.verification import verify_virtual_tokens
from ingle.quant.linear import QuantLinear
from tests.contract.models.test_task_heads import LABELS, SINGLE, build
from tests.contract.models.tiny_types import small_config, small_encoder_decoder_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

_SECTION: TypeAdapter[Any] = TypeAdapter(AdapterConfig)
_PROMPT, _PREFIX = {"kind": "prompt", "num_virtual_tokens": 4}, {"kind": "prefix", "num_virtual_tokens": 4}
_RANDOM = {"init": "random", "encoder_hidden_size": 6}
LENGTHS = (9, 3, 6)


class Case(NamedTuple):
    """Virtual tokens of a model; ``config`` are changes of its small config."""

    section: dict[str, Any]
    model: str = "llama"
    format: str = "none"
    config: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "prompt": Case(_PROMPT, "llama", "nf4"),
    "prompt, learned positions": Case(_PROMPT, "gpt2"),
    "prompt, dealt attention": Case(_PROMPT, "bloom"),
    "prompt, encoder-decoder": Case(_PROMPT, "t5"),
    "mlp": Case({**_PROMPT, **_RANDOM, "encoder": "mlp"}),
    "lstm": Case({**_PROMPT, **_RANDOM, "encoder": "lstm"}),
    "prefix": Case(_PREFIX, "llama", "nf4"),
    "prefix, learned positions": Case(_PREFIX, "gpt2"),
    "prefix, window": Case(_PREFIX, "mistral", "none", {"sliding_window": 5}),
    "prefix, mlp": Case({**_PREFIX, **_RANDOM, "encoder": "mlp"}),
}
_AUTO: dict[str, Any] = {
    "t5": (transformers.AutoModelForSeq2SeqLM, small_encoder_decoder_config),
}
_CAUSAL = (transformers.AutoModelForCausalLM, small_config)


def section_of(case: Case, **options: Any) -> Any:
    return _SECTION.validate_json(json.dumps({**case.section, **options}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("virtual")


def folder_of(root: Path, case: Case) -> str:
    folder = root / f"{case.model} {dict(case.config)}"
    if not folder.exists():
        auto, config = _AUTO.get(case.model, _CAUSAL)
        torch.manual_seed(0)
        settings = config(case.model)
        settings.update({"tie_word_embeddings": False, **case.config})
        model = auto.from_config(settings, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters() if case.model != "t5" else ():
                parameter.mul_(3.0)  # so that tokens matter to each other
        model.save_pretrained(folder)
    return str(folder)


def load(root: Path, case: Case) -> Any:
    base = base_section(case.format)
    return models.load_model(ModelConfig(id=folder_of(root, case), dtype="float32"), base, device=torch.device("cpu"))


def attached(root: Path, case: Case, **options: Any) -> Any:
    model, section = load(root, case), section_of(case)
    adapters.initialize(model, section, adapters.insert(model, section), seed=0, **options)
    return model.eval()


@torch.no_grad()
def move(model: Any, seed: int = 1) -> None:
    for name, parameter in adapters.trainable_parameters(model):
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator_of(seed, name))


def documents(model: Any) -> list[Tensor]:
    num_ids = min(40, models.num_tokens(model))
    return [(torch.arange(length) * 7 + 3 * length) % (num_ids - 3) + 3 for length in LENGTHS]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """The logits of packed documents."""
    row = Row.of(documents(model))
    if model.config.is_encoder_decoder:
        hidden = forward_pairs(model, row, Row.of([each.flip(0) for each in documents(model)]))
    else:
        hidden = forward_packed(model, row.ids, row.position_ids, row.cu_seqlens)
    return through_head(model, Head.logits, hidden)[0]


@torch.no_grad()
def alone(model: Any, ours: Any) -> Tensor:
    """The logits of PEFT for each document alone, without those of virtual tokens."""
    parts = []
    for document in documents(ours):
        more = {"decoder_input_ids": document.flip(0)[None]} if ours.config.is_encoder_decoder else {}
        given = {"input_ids": document[None], "attention_mask": torch.ones(1, len(document)), **more}
        parts.append(model.eval()(**given).logits[0, -len(document) :])
    return torch.cat(parts)


def their_base(root: Path, case: Case, ours: Any) -> Any:
    auto, _ = _AUTO.get(case.model, _CAUSAL)
    theirs = auto.from_pretrained(folder_of(root, case), dtype=torch.float32)
    with torch.no_grad():
        for name, module in ours.named_modules():
            if isinstance(module, QuantLinear):
                theirs.get_submodule(name).weight.copy_(module.decode(torch.float32))
    return theirs


def close(actual: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_folders_of_both_compute_the_same(case: Case, root: Path, tmp_path: Path) -> None:
    model, section = attached(root, case, keeps_initial=True), section_of(case)
    base = load(root, case)
    first, identity = logits(model), adapters.identify(base)
    move(model)
    wanted = logits(model)
    assert (wanted - first).abs().max() > 1e-2 * wanted.abs().max()
    assert adapters.identify(model).sha256 == identity.sha256
    with adapters.use(model, "off"):
        assert torch.equal(logits(model), logits(base))
    with adapters.use(model, "initial"):
        assert torch.equal(logits(model), first)
    verify_virtual_tokens(model)
    adapters.save_adapter(model, tmp_path / "ours", section, "tiny", identity=identity)
    theirs = peft.PeftModel.from_pretrained(their_base(root, case, base), tmp_path / "ours")
    close(alone(theirs, base), wanted)
    loaded = load(root, case)
    adapters.load_adapter(loaded, tmp_path / "ours")
    close(logits(loaded), wanted, 1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    plain = section_of(case, init="random", encoder="none", encoder_hidden_size=None)
    assert adapters.adapter_config(tmp_path / "theirs") == plain
    continued = load(root, case)
    again = plain.model_copy(update={"path": str(tmp_path / "theirs")})
    adapters.initialize(continued, again, adapters.insert(continued, again), seed=5)
    close(logits(continued), wanted, 1e-6)


@pytest.mark.parametrize("name", ["prompt", "prefix", "prefix, window", "prompt, encoder-decoder"])
def test_answers_are_those_of_whole_texts(name: str, root: Path) -> None:
    """Greedy answers with a cache; prompts of several lengths are padded, and answers pass the window."""
    from ingle.models.generation.batches import PromptBatch, TargetBatch
    from ingle.models.generation.token_sampler import TokenSampler

    case = CASES[name]
    model = attached(root, case)
    move(model)
    prompts, number = [each.tolist() for each in documents(model)], 8
    kind = TargetBatch if model.config.is_encoder_decoder else PromptBatch
    head = models.head(model)
    with torch.no_grad():
        batch = kind(model, head.logits, prompts, TokenSampler(0.0, 1.0, 0, [0, 1, 2]), number)
        steps = [batch.step()[1] for _ in range(number)]
        for place, prompt in enumerate(prompts):
            answer = [step[place] for step in steps]
            if model.config.is_encoder_decoder:
                target = [models.first_token(model), *answer]
                hidden = forward_pairs(model, Row.of([torch.tensor(prompt)]), Row.of([torch.tensor(target)]))[0, :-1]
            else:
                row = Row.of([torch.tensor(prompt + answer)])
                hidden = forward_packed(model, row.ids, row.position_ids, row.cu_seqlens)[0, len(prompt) - 1 : -1]
            assert head.logits(hidden).argmax(-1).tolist() == answer


@pytest.mark.parametrize("name", ["prompt", "prefix", "prefix, window"])
def test_answers_share_a_prompt_with_virtual_tokens(name: str, root: Path) -> None:
    model = attached(root, CASES[name])
    move(model)
    assert why_prompts_repeat(model) is None


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_begin_as_a_text(kind: str, root: Path, tmp_path: Path) -> None:
    """Training begins with the function that the base has with this text before every document."""
    model, text = load(root, Case(_PROMPT)), [7, 11, 5, 9]
    section = _SECTION.validate_python(
        {"kind": kind, "num_virtual_tokens": 4, "init": "tokens" if kind == "prefix" else "text", "init_text": "a"}
    )
    selection = adapters.insert(model, section)
    with pytest.raises(AdapterError, match="its tokens were not given"):
        adapters.initialize(model, section, selection, seed=0)
    if kind == "prefix":
        with adapters.use(model, "off"):
            adapters.give_keys(model, models.keys_of(model, text))
    else:
        adapters.give_text(model, text)
    adapters.initialize(model, section, selection, seed=0)
    base = load(root, Case(_PROMPT))
    row = Row.of([torch.cat((torch.tensor(text), each)) for each in documents(base)])
    with torch.no_grad():
        hidden = forward_packed(base, row.ids, row.position_ids, row.cu_seqlens)
        whole = through_head(base, Head.logits, hidden)[0]
    wanted = torch.cat([part[len(text) :] for part in whole.split([len(text) + length for length in LENGTHS])])
    close(logits(model), wanted)
    adapters.save_adapter(model, tmp_path, section, "tiny", identity=adapters.identify(base))
    adapters.load_adapter(base, tmp_path)  # without the text
    close(logits(base), wanted)


@pytest.mark.parametrize("kind", ["classify", "tag"])
def test_heads_read_texts_with_virtual_tokens(kind: Any, tmp_path: Path) -> None:
    """BERT's pooler reads the first virtual token, as in PEFT; a head of tokens has results for real ones alone."""
    task = ModelTask(kind, LABELS, SINGLE if kind == "classify" else None)
    build("bert", task).save_pretrained(tmp_path / "base")
    model = models.load_model(
        ModelConfig(id=str(tmp_path / "base"), dtype="float32"), NoBase(), device=torch.device("cpu"), task=task
    )
    section = section_of(Case(_PROMPT))
    adapters.initialize(model, section, adapters.insert(model, section), seed=0)
    move(model)
    adapters.save_adapter(model, tmp_path / "ours", section, "tiny")
    auto: Any = {
        "classify": transformers.AutoModelForSequenceClassification,
        "tag": transformers.AutoModelForTokenClassification,
    }[kind]
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    given = documents(model)
    samples = [Sample(each.numpy(), np.full(len(each), IGNORE_INDEX), {}) for each in given]
    with torch.no_grad():
        outputs = [theirs(input_ids=each[None], attention_mask=torch.ones(1, len(each))).logits[0] for each in given]
        ours = forward_task(model.eval(), round_up(collate(samples)))
    if kind == "classify":
        close(ours, torch.stack(outputs))
    else:
        wanted = torch.cat([each[-length:] for each, length in zip(outputs, LENGTHS, strict=True)])
        close(ours[0, : len(wanted)], wanted)


def test_refusals(root: Path, tmp_path: Path) -> None:
    case = CASES["prompt, dealt attention"]
    with pytest.raises(AdapterError, match="trained keys in every layer"):
        adapters.insert(load(root, case), section_of(CASES["prefix"]))
    theirs = peft.get_peft_model(
        their_base(root, CASES["prompt, encoder-decoder"], load(root, CASES["prompt, encoder-decoder"])),
        peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3),
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="leaves out of generation"):
        adapters.adapter_config(tmp_path)
