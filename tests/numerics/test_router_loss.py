"""The load-balancing loss of packed documents is that of transformers on the padded batch, with its gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from ingle.config.model import ModelConfig
from ingle.config.run import Run
from ingle.data.batch import collate, round_up
from ingle.data.shared_prompts import share
from ingle.data.types import Sample
from ingle.errors import ConfigError
from ingle.models import load_model
from ingle.objectives.lm import NextTokenLoss
from ingle.objectives.router_loss import balanced, choose_routers
from tests.pairs import REFERENCE, PairLoss

_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LENGTHS = (9, 4, 7)
_KINDS = {
    "mixtral": hf.MixtralConfig,
    "qwen3_moe": hf.Qwen3MoeConfig,
    "olmoe": hf.OlmoeConfig,
    "granitemoe": hf.GraniteMoeConfig,
}


def documents() -> list[torch.Tensor]:
    return [torch.randint(3, 290, (n,), generator=torch.Generator().manual_seed(n)) for n in _LENGTHS]


def write(kind: str, folder: Path) -> Path:
    config = _KINDS[kind]()
    known = {key: value for key, value in _SIZES.items() if hasattr(config, key)}
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(_KINDS[kind](**known), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def run_of(folder: Path, **options: Any) -> Run:
    data = {"sources": [{"path": "rows.jsonl"}]}
    return Run.model_validate({"model": {"id": str(folder)}, "data": data, "output": "out", **options})


@pytest.mark.parametrize("kind", list(_KINDS))
def test_loss_and_gradients_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path)
    model: Any = load_model(ModelConfig(id=str(folder), dtype="float32"))
    routers, weight = choose_routers(run_of(folder, adapter={"kind": "none"}), model)
    assert routers is not None and weight == _KINDS[kind]().router_aux_loss_coef
    texts = documents()
    labels = [torch.cat((torch.tensor([-100]), text[1:])) for text in texts]
    samples = [Sample(*(np.asarray(each, np.int32) for each in pair)) for pair in zip(texts, labels, strict=True)]
    batch = round_up(collate(samples))
    assert batch.input_ids.shape[1] > batch.num_tokens, "padding counts for nothing"
    sums = balanced(NextTokenLoss(model), routers, weight)(batch).losses
    ours = sums["loss"] / batch.num_supervised + weight * sums["router_loss"] / batch.num_tokens
    ours.backward()

    theirs: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = (torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS)[:, None]).long()
    output = theirs(
        input_ids=rows,
        attention_mask=mask,
        labels=rows.masked_fill(mask == 0, -100),
        output_router_logits=True,
    )
    output.loss.backward()
    torch.testing.assert_close(sums["router_loss"] / batch.num_tokens, output.aux_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, output.loss, rtol=1e-5, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)

    columns = {"group_ids": torch.zeros(len(batch.cu_seqlens) - 1), REFERENCE: torch.zeros(batch.input_ids.shape)}
    pairs = balanced(PairLoss(model), routers, weight)
    found = pairs(replace(batch, columns={**batch.columns, **columns})).losses
    assert found.keys() == {term.name for term in pairs.terms} == {"preference", "sft", "router_loss"}
    torch.testing.assert_close(found["router_loss"], sums["router_loss"], rtol=1e-6, atol=0)


def test_a_token_of_a_shared_prompt_counts_for_each_of_its_answers(tmp_path: Path) -> None:
    folder = write("mixtral", tmp_path)
    model: Any = load_model(ModelConfig(id=str(folder), dtype="float32"))
    routers, weight = choose_routers(run_of(folder, adapter={"kind": "none"}), model)
    rng = np.random.default_rng(0)
    samples = []
    for row, lengths in enumerate([(3, 5), (4, 2, 6)]):
        prompt = rng.integers(3, 290, 20, dtype=np.int32)
        for length in lengths:
            ids = np.concatenate([prompt, rng.integers(3, 290, length, dtype=np.int32)])
            labels = np.where(np.arange(len(ids)) < 20, -100, ids).astype(np.int32)
            samples.append(Sample(ids, labels, {"group_ids": np.array([row])}))
    found = []
    for each in (samples, share(samples)):
        batch = round_up(collate(each))
        module = balanced(NextTokenLoss(model), routers, weight)
        model.zero_grad()
        loss = module(batch).losses["router_loss"] / module.counts(batch)["routed_tokens"]
        loss.backward()
        found.append((loss.detach(), module.counts(batch)["routed_tokens"], model.get_input_embeddings().weight.grad))
    assert found[0][1] == found[1][1] == 120 and batch.num_tokens < 120
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-4, atol=1e-7)


def test_it_is_off_with_an_adapter_and_refused_without_routers(tmp_path: Path) -> None:
    folder = write("mixtral", tmp_path / "mixtral")
    model = load_model(ModelConfig(id=str(folder), dtype="float32"))
    assert choose_routers(run_of(folder), model) == (None, 0.0)
    assert choose_routers(run_of(folder, train={"router_loss": 0.5}), model)[1] == 0.5
    assert choose_routers(run_of(folder, adapter={"kind": "none"}, train={"router_loss": "off"}), model)[0] is None
    small = {key: _SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")}
    dense: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**small, num_hidden_layers=1, vocab_size=8))
    assert choose_routers(run_of(folder, adapter={"kind": "none"}), dense) == (None, 0.0)
    with pytest.raises(ConfigError, match="defines no load-balancing loss"):
        choose_routers(run_of(folder, train={"router_loss": 0.5}), dense)
