"""A prompt that is computed once for its answers gives the losses and gradients of a prompt for each answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, PreTrainedModel

from ingle import adapters, models
from ingle.config import ModelConfig, NoBase
from ingle.data import IGNORE_INDEX, Batch, Sample, collate, round_up
from ingle.data.shared_prompts import share
from ingle.kernels.attention.packed import packed_attention
from ingle.kernels.attention.trees import Trees
from ingle.models import why_prompts_repeat
from ingle.models.forward import attention
from ingle.models.forward.layout import apply_layout, continuing_short_texts, layout_of
from ingle.models.forward.task_heads import forward_task
from ingle.models.loading.layout_choice import choose_layout, enliven
from ingle.training.compiling import compile_layers
from tests.contract.models.any_model import FolderOf, attach, load, writer
from tests.contract.models.test_lengths import CONFIGS, SWITCH
from tests.contract.models.test_task_heads import TASKS, build
from tests.contract.models.tiny_types import CAUSAL_TYPES, small_config, small_encoder_decoder_config

#: A type for every way to mix tokens, and the layout that it has: packed (with windows, sinks, chunks, latent
#: attention), with dealt modules, and padded rows.
CAUSAL = {
    "llama": "packed",
    "gemma2": "packed",
    "gpt_oss": "packed",
    "llama4_text": "packed",
    "deepseek_v3": "packed",
    "bloom": "documents",
    "deepseek_v32": "documents",
    "jamba": "documents",
    "lfm2": "documents",
    "mamba2": "documents",
    "qwen3_next": "documents",
    "rwkv": "documents",
    "roberta": "packed",
}
#: Types whose recurrent layers compute answers from the state that their prompt leaves.
CONTINUED = ("lfm2", "mamba2", "qwen3_next")
PAIRED = {"t5": "packed", "bart": "documents", "longt5": "rows", "led": "rows"}
#: Types of which some float32 gradients are known to be no better.
ROUNDING = {"qwen3_next": 3e-4, "qwen3_5_moe": 3e-4, "qwen3_5_moe_text": 3e-4}
#: Prompts with the lengths of their answers; one prompt is too short to be shared, and a document is alone.
ROWS = ((9, (4, 7)), (1, (4, 5)), (12, (1, 3, 6, 2)), (6, (5,)))


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    return writer(tmp_path_factory, AutoModelForCausalLM, small_config, {})


@pytest.fixture(scope="module")
def paired_folder(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    return writer(tmp_path_factory, AutoModelForSeq2SeqLM, small_encoder_decoder_config, {})


def make_samples(seed: int = 3, *, supervised: bool = False) -> list[Sample]:
    generator = np.random.default_rng(seed)
    samples = []
    for row, (prompt, answers) in enumerate(ROWS):
        start = generator.integers(3, 80, prompt, dtype=np.int32)
        for length in answers:
            ids = np.concatenate([start, generator.integers(3, 80, length, dtype=np.int32)])
            labels = ids.copy()
            labels[: 1 if supervised else prompt] = IGNORE_INDEX
            samples.append(Sample(ids, labels, {"group_ids": np.int64(row)}))
    return samples


def make_pairs() -> list[Sample]:
    pairs = []
    for sample in make_samples():
        prompt = ROWS[int(sample.columns["group_ids"])][0]
        target = {"decoder_input_ids": sample.input_ids[prompt - 1 : -1], "decoder_labels": sample.input_ids[prompt:]}
        source = sample.input_ids[:prompt]
        pairs.append(Sample(source, np.full_like(source, IGNORE_INDEX), {**sample.columns, **target}))
    return pairs


def losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Sums of the losses of the answers, ``[D]``, with those of their prompts."""
    paired = "decoder_labels" in batch.columns
    targets = batch.columns["decoder_labels"][0] if paired else batch.next_labels()
    lengths = batch.columns["decoder_cu_seqlens" if paired else "cu_seqlens"].diff().tolist()
    logits = models.head(model).logits(models.forward_hidden(model, batch))[0]
    losses_N = cross_entropy(logits, targets, reduction="none")
    sums_D = torch.stack([part.sum() for part in losses_N.split(lengths)])
    return batch.path_sums(sums_D)[batch.answers()]


def computed(model: PreTrainedModel, samples: Sequence[Sample]) -> tuple[Tensor, list[Tensor]]:
    """Losses, and the gradients of a loss in which each answer has its own weight, as in losses over pairs."""
    found = losses(model, round_up(collate(samples)))
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(1, -0.7, len(found), dtype=found.dtype)
    gradients = torch.autograd.grad((found * weights).sum(), trained, allow_unused=True)
    return found.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]


def require_same(
    model: PreTrainedModel, samples: Sequence[Sample], rounding: float = 3e-5, tolerance: float = 1e-5,
    *, supervised: bool = False,
) -> None:  # fmt: skip
    shared = share(samples, at_least=4, supervised=supervised)
    assert sum(len(s.input_ids) for s in shared) < sum(len(s.input_ids) for s in samples) - 20
    ours, theirs = computed(model, shared), computed(model, samples)
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    floor = 3e-3 * max(gradient.norm() for gradient in theirs[1])
    for actual, expected in zip(ours[1], theirs[1], strict=True):
        assert (actual - expected).norm() <= rounding * expected.norm().clamp_min(floor)


OTHERS = [pytest.param(kind, marks=pytest.mark.sweep) for kind in CAUSAL_TYPES if kind not in CAUSAL]


@pytest.mark.parametrize("kind", [*CAUSAL, *OTHERS])
def test_answers_of_one_prompt(kind: str, causal_folder: FolderOf) -> None:
    try:
        model = load(causal_folder(kind), NoBase())
    except (models.ModelError, ValueError) as error:
        assert kind not in CAUSAL
        pytest.skip(f"{type(error).__name__}: not loaded")
    assert layout_of(model).kind == CAUSAL.get(kind, layout_of(model).kind)
    assert (why_prompts_repeat(model) is None) == layout_of(model).computes_trees
    if kind in CAUSAL:
        assert bool(layout_of(model).continued) == (kind in CONTINUED)
    attach(model)
    with continuing_short_texts(model):
        require_same(model, make_samples(), ROUNDING.get(kind, 3e-5))


def attached(model: PreTrainedModel) -> PreTrainedModel:
    attach(model)
    return model


@pytest.mark.parametrize("kind", PAIRED)
def test_targets_of_one_source(kind: str, paired_folder: FolderOf) -> None:
    model = load(paired_folder(kind), NoBase())
    assert layout_of(model).kind == PAIRED[kind]
    attach(model)
    require_same(model, make_pairs())


@pytest.mark.parametrize("layout", ["packed", "rows", "equal_rows"])
@pytest.mark.parametrize("supervised", [False, True])
def test_float64(layout: str, supervised: bool) -> None:
    """Up to rounding in float64, also if prompts have labels; in all layouts."""
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    enliven(model)
    chosen = choose_layout(config).layout
    assert chosen is not None and chosen.kind == "packed"
    apply_layout(model, models.forward.layout.replace(chosen, kind=layout))
    require_same(model, make_samples(supervised=supervised), 1e-12, 1e-12, supervised=supervised)


def test_trees_are_independent(causal_folder: FolderOf) -> None:
    """A change in one tree changes no bit of the losses of another, nor one answer those of another answer."""
    model = load(causal_folder("llama"), NoBase())
    samples = make_samples()
    with torch.no_grad():
        before = losses(model, round_up(collate(share(samples, at_least=4))))
        for changed in ([4, 5, 6, 7], [5]):
            others = [
                Sample(np.where(s.labels == IGNORE_INDEX, s.input_ids, s.input_ids % 70 + 7), s.labels, s.columns)
                if place in changed
                else s
                for place, s in enumerate(samples)
            ]
            after = losses(model, round_up(collate(share(others, at_least=4))))
            kept = [place for place in range(len(samples)) if place not in changed]
            assert torch.equal(before[kept], after[kept])
            assert not torch.equal(before[changed], after[changed])


@pytest.mark.sweep
def test_compiled_layers(causal_folder: FolderOf) -> None:
    model = attached(load(causal_folder("gemma2"), NoBase()))
    compile_layers(model)
    require_same(model, make_samples())


def test_fused_layers(causal_folder: FolderOf) -> None:
    model = load(causal_folder("llama"), NoBase())
    attach(model)
    theirs = computed(model, make_samples())
    assert adapters.fuse(model).fused == 4
    ours = computed(model, share(make_samples(), at_least=4))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    for actual, expected in zip(ours[1], theirs[1], strict=True):
        assert (actual - expected).norm() <= 3e-5 * expected.norm()


def test_attention_that_takes_a_tree_for_one_text_is_found(
    causal_folder: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend_row(q: Tensor, k: Tensor, v: Tensor, trees: Trees, *, chunk: int | None, **options: Any) -> Tensor:
        return packed_attention(q, k, v, torch.tensor([0, trees.bounds[-1]], dtype=torch.int32), **options)

    model = load(causal_folder("llama"), NoBase())
    assert why_prompts_repeat(model) is None
    monkeypatch.setattr(attention, "tree_attention", attend_row)
    assert "differ by" in str(why_prompts_repeat(model))
    with pytest.raises(AssertionError):
        require_same(attached(model), make_samples())


@pytest.mark.parametrize("name", ["phi3", "llama-dynamic", "gemma3-by-layer"])
def test_texts_beyond_a_switch_of_rotary_factors_repeat_their_prompts(name: str, tmp_path: Path) -> None:
    """Some answers of a prompt are short and others long, so that it has other keys for each."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    enliven(model)
    model.save_pretrained(tmp_path)
    assert {prompt + answer > SWITCH for prompt, answers in ROWS[:3] for answer in answers} == {False, True}
    require_same(attached(load(tmp_path, NoBase())), make_samples())


@pytest.mark.parametrize(("kind", "name"), [("llama", "single"), ("llama", "tag"), ("bert", "single")])
def test_task_heads(kind: str, name: str, tmp_path: Path) -> None:
    """Outputs of answers, as for rewards; the head of BERT reads the first token of a text."""
    task = TASKS[name]
    build(kind, task).save_pretrained(tmp_path)
    model = models.load_model(ModelConfig(id=str(tmp_path), dtype="float32"), task=task)
    shared, repeated = (round_up(collate(each)) for each in (share(make_samples(), at_least=4), make_samples()))
    ours, theirs = (forward_task(model, batch) for batch in (shared, repeated))
    if name == "tag":  # at the last token of each answer
        ours = ours[0, shared.cu_seqlens[shared.answers() + 1].long() - 1]
        theirs = theirs[0, repeated.cu_seqlens[repeated.answers() + 1].long() - 1]
    else:
        ours = ours[shared.answers()]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
