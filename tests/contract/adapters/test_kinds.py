"""What holds for every kind of adapter, over plain and quantized bases of several architectures.

PEFT is the oracle of what is saved: it reads the folder over the same weights and must compute the same.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from pydantic import TypeAdapter
from torch import Tensor, nn

from ingle import adapters
from ingle.adapters.kinds import kind_of
from ingle.adapters.lora import generator_of
from ingle.config.adapter import AdapterConfig
from ingle.config.base import base_section
from ingle.models.loading.layout_choice import enliven
from ingle.quant import convert
from ingle.quant.linear import QuantLinear
from tests.contract.models.tiny_types import small_config, small_encoder_config, small_encoder_decoder_config

# PEFT uses a deprecated name of transformers and warns of tied weights.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

_SECTION: TypeAdapter[Any] = TypeAdapter(AdapterConfig)
_AUTO = {
    "bert": (transformers.AutoModelForMaskedLM, small_encoder_config),
    "t5": (transformers.AutoModelForSeq2SeqLM, small_encoder_decoder_config),
    "bart": (transformers.AutoModelForSeq2SeqLM, small_encoder_decoder_config),
}
_CAUSAL = (transformers.AutoModelForCausalLM, small_config)


class Case(NamedTuple):
    """A kind of adapter over a base.

    Attributes:
        section: The section.
        model: Type of the model.
        format: Format of the base.
        read_by_peft: Whether PEFT has the kind.
    """

    section: dict[str, Any]
    model: str = "llama"
    format: str = "none"
    read_by_peft: bool = True


_BOTTLENECK = {"kind": "bottleneck", "size": 3}
CASES = {
    "ia3, llama": Case({"kind": "ia3", "trainable_modules": ["norm"]}),
    "ia3, gpt2": Case({"kind": "ia3"}, "gpt2"),
    "ia3, bert, nf4": Case({"kind": "ia3"}, "bert", "nf4"),
    "ia3, t5": Case({"kind": "ia3"}, "t5"),
    "ia3, named": Case({"kind": "ia3", "target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}),
    "biases, gpt2": Case({"kind": "bitfit"}, "gpt2"),
    "biases, bert, nf4": Case({"kind": "bitfit"}, "bert", "nf4"),
    "norms, llama, nf4": Case({"kind": "bitfit", "biases": False, "norms": True}, "llama", "nf4"),
    "norms, t5": Case({"kind": "bitfit", "biases": False, "norms": True}, "t5"),
    "biases and norms, bart": Case({"kind": "bitfit", "norms": True}, "bart"),
    "houlsby, llama, nf4": Case({**_BOTTLENECK, "scale": "learned"}, "llama", "nf4", False),
    "houlsby, bart": Case({**_BOTTLENECK, "trainable_modules": ["final_layer_norm"]}, "bart", "none", False),
    "pfeiffer, gpt2": Case({**_BOTTLENECK, "style": "pfeiffer"}, "gpt2", "none", False),
    "parallel, llama": Case({**_BOTTLENECK, "style": "parallel"}, "llama", "none", False),
    "parallel, bert, nf4": Case({**_BOTTLENECK, "style": "parallel"}, "bert", "nf4", False),
}


def section_of(case: Case, **options: Any) -> Any:
    return _SECTION.validate_json(json.dumps({**case.section, **options}))


def make(case: Case) -> nn.Module:
    """A small model with large random weights, in the format of the case."""
    auto, config = _AUTO.get(case.model, _CAUSAL)
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(config(case.model), dtype=torch.float32).eval()
    with torch.no_grad():
        enliven(model)  # type: ignore[arg-type]
    if case.format != "none":
        convert(model, base_section(case.format))
    return model


def plain(model: nn.Module) -> nn.Module:
    """The same base with decoded weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            with torch.no_grad():
                linear.weight.copy_(module.decode(torch.float32))
                if module.bias is not None:
                    linear.bias.copy_(module.bias)
            model.set_submodule(name, linear)
    return model


def logits(model: Any) -> Tensor:
    ids = torch.arange(2, 12).view(2, 5)
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=ids, **more).logits
    return result


def attached(case: Case, **options: Any) -> nn.Module:
    model, section = make(case), section_of(case)
    adapters.initialize(model, section, adapters.insert(model, section), seed=0, **options)
    return model.eval()


@torch.no_grad()
def move(model: nn.Module, seed: int = 1) -> None:
    for name, parameter in adapters.trainable_parameters(model):
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator_of(seed, name))


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_starts_from_the_base_and_returns_to_it(case: Case) -> None:
    base = make(case)
    before, identity = logits(base), adapters.identify(base).tensors
    model = attached(case)
    assert torch.equal(logits(model), before)
    trained = adapters.trainable_parameters(model)
    assert trained and all(not parameter.is_meta for _, parameter in trained)
    assert adapters.identify(model).tensors == identity
    move(model)
    assert (logits(model) - before).abs().max() > 1e-2
    assert adapters.identify(model).tensors == identity, "the identity is that of the base, whatever is trained"
    for state in ("off", "initial"):
        with adapters.use(model, state):
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_saved_computes_the_same(case: Case, tmp_path: Path) -> None:
    model, section = attached(case), section_of(case)
    move(model)
    wanted = logits(model)
    adapters.save_adapter(model, tmp_path, section, "tiny")
    loaded = make(case)
    adapters.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), wanted)
    assert adapters.adapter_config(tmp_path) == section
    continued, again = make(case), section_of(case, path=str(tmp_path))
    adapters.initialize(continued, again, adapters.insert(continued, again), seed=5, keeps_initial=True)
    assert torch.equal(logits(continued), wanted)
    move(continued, seed=2)
    with adapters.use(continued, "initial"):
        assert torch.equal(logits(continued), wanted)
    if case.read_by_peft:
        close(logits(peft.PeftModel.from_pretrained(plain(make(case)), tmp_path)), wanted)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    model: Any = attached(case).double()
    move(model)
    for module in model.modules():  # kinks have no derivative
        if getattr(module, "function", None) == "relu":
            module.function = "tanh"
        if isinstance(getattr(module, "act", None), nn.ReLU):
            module.act = nn.Tanh()
    ids = torch.arange(2, 12).view(2, 5)
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    trained = adapters.trainable_parameters(model)

    def loss() -> Tensor:
        scores: Tensor = model(input_ids=ids, **more).logits
        return scores.log_softmax(-1)[..., 7].sum()

    gradients = torch.autograd.grad(loss(), [parameter for _, parameter in trained])
    assert all(bool(gradient.any()) for gradient in gradients)
    direction = [torch.randn(p.shape, generator=generator_of(3, n), dtype=torch.float64) for n, p in trained]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    step, ends = 1e-3, list[float]()  # norms compute in float32
    with torch.no_grad():
        for sign in (1, -2):
            for (_, parameter), each in zip(trained, direction, strict=True):
                parameter += sign * step * each
            ends.append(float(loss()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=2e-3)


def test_functions_of_kinds_agree(tmp_path: Path) -> None:
    """A copy of a model with an adapter computes with its own tensors."""
    case = CASES["parallel, llama"]
    model = attached(case)
    other = copy.deepcopy(model)
    before = logits(model)
    move(other)
    assert torch.equal(logits(model), before) and not torch.equal(logits(other), before)
    assert (
        kind_of(section_of(case)).select(model, section_of(case)).adapted
        == adapters.select(make(case), section_of(case)).adapted
    )
