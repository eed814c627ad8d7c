"""Where bottlenecks stand: in the last linear layers of attention and MLP, of every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ingle.adapters.sublayers import find_sublayers
from ingle.adapters.targets import linear_layers
from ingle.models.loading.layout_choice import enliven
from tests.contract.models.tiny_types import small_config, small_encoder_config, small_encoder_decoder_config

_CAUSAL = (transformers.AutoModelForCausalLM, small_config)
_MASKED = (transformers.AutoModelForMaskedLM, small_encoder_config)
_PAIRS = (transformers.AutoModelForSeq2SeqLM, small_encoder_decoder_config)
_LEAN = {"llama": _CAUSAL, "gpt2": _CAUSAL, "bert": _MASKED, "bart": _PAIRS}
_MORE: dict[str, Any] = {
    **dict.fromkeys(("phi3", "gpt_neox", "opt", "bloom", "gptj", "gemma2", "olmo2", "qwen3", "cohere", "mpt"), _CAUSAL),
    **dict.fromkeys(("phi", "stablelm", "starcoder2", "granite", "glm4", "gpt_bigcode", "bamba", "mamba2"), _CAUSAL),
    **dict.fromkeys(("modernbert", "deberta-v2", "distilbert", "electra", "xlm", "albert"), _MASKED),
    **dict.fromkeys(("t5", "led", "pegasus", "m2m_100"), _PAIRS),
}
_MODELS = [
    *(pytest.param(name, kind, id=name) for name, kind in _LEAN.items()),
    *(pytest.param(name, kind, id=name, marks=pytest.mark.sweep) for name, kind in _MORE.items()),
]


@pytest.mark.parametrize(("name", "kind"), _MODELS)
def test_without_the_outputs_of_sublayers_nothing_inside_of_them_matters(name: str, kind: Any) -> None:
    auto, config = kind
    torch.manual_seed(0)
    model = auto.from_config(config(name), dtype=torch.float32).eval()
    ids = torch.arange(2, 12).view(2, 5)
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    found = find_sublayers(model)
    outputs = {each.output for each in found}
    assert {each.kind for each in found} >= ({"attention", "mlp"} if name != "mamba2" else {"attention"})
    inner = [path for path in linear_layers(model) if path not in outputs and _is_inside_of_layers(path, outputs)]
    assert {each.input for each in found} <= {None, *inner}
    with torch.no_grad():
        enliven(model)
        for path in outputs:
            layer: nn.Module = model.get_submodule(path)
            for parameter in layer.parameters():
                parameter.zero_()
        before = model(input_ids=ids, **more).logits
        for path in inner:
            for parameter in model.get_submodule(path).parameters():
                parameter += torch.randn(parameter.shape)
        after = model(input_ids=ids, **more).logits
    assert torch.equal(before, after)


def _is_inside_of_layers(path: str, outputs: set[str]) -> bool:
    """Whether a path begins like that of a layer: up to its first number."""

    def start(each: str) -> str:
        parts = each.split(".")
        return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdigit()), 0)])

    return bool(start(path)) and start(path) in {start(each) for each in outputs}
