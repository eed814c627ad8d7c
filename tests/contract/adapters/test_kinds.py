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
from safetensors.torch import load_file
from torch import Tensor, nn

from ingle import adapters, models
from ingle.adapters.linear import AdaptedLinear
from ingle.adapters.lora import generator_of
from ingle.adapters.merging import merged_weight
from ingle.config.adapter import AdapterConfig
from ingle.config.base import base_section
from ingle.config.model import ModelConfig
from ingle.config.peft_methods import METHODS, REFUSED
from ingle.errors import AdapterError
from ingle.export.writers.merged_model import MergedModel
from ingle.inference import Source
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


def _peft(method: str, options: dict[str, Any], model: str = "llama", format: str = "none") -> Case:
    return Case({"kind": "peft", "method": method, "options": options}, model, format)


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
    "vera, gpt2": _peft("vera", {"r": 4}, "gpt2"),
    "oft, bert, nf4": _peft("oft", {"oft_block_size": 4, "target_modules": ["query", "output.dense"]}, "bert", "nf4"),
    "loha, llama, nf4": _peft("loha", {"r": 2}, "llama", "nf4"),
    "adalora, t5": _peft("adalora", {"init_r": 2, "total_step": 10, "target_modules": ["q", "wo"]}, "t5"),
    "hra, llama": _peft("hra", {"r": 2}),
}
#: Short tests take a case of each kind.
_LEAN = {
    "ia3, bert, nf4",
    "biases and norms, bart",
    "norms, llama, nf4",
    "parallel, llama",
    "oft, bert, nf4",
    "hra, llama",
}
#: Options with which the other methods of PEFT fit the small model.
SIZES = {
    "BOFT": {"boft_block_size": 4},
    "OFT": {"oft_block_size": 4},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "ROAD": {"group_size": 16},
    "C3A": {"block_size": 4},
    "ADALORA": {"init_r": 4, "total_step": 10},
    **{method: {"r": 4} for method in ("MISS", "PSOFT", "SHIRA")},
    **{method: {"n_frequency": 10} for method in ("FOURIERFT", "WAVEFT")},
}
#: What adds a bias to layers without one has no weight to merge into.
UNMERGED = {"BEFT"}


def _cases() -> list[object]:
    return [
        pytest.param(case, id=name, marks=() if name in _LEAN else pytest.mark.sweep) for name, case in CASES.items()
    ]


def section_of(case: Case, **options: Any) -> Any:
    return _SECTION.validate_json(json.dumps({**case.section, **options}))


def make(case: Case) -> nn.Module:
    """A small model with large random weights, in the format of the case."""
    auto, config = _AUTO.get(case.model, _CAUSAL)
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(config(case.model), dtype=torch.float32).eval()
    with torch.no_grad():
        enliven(model)
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


@pytest.mark.parametrize("case", _cases())
def test_training_starts_from_the_base_and_returns_to_it(case: Case) -> None:
    base = make(case)
    before, identity = logits(base), adapters.identify(base).tensors
    model = attached(case, keeps_initial=True)
    rounding = 0.0 if section_of(case).kind != "peft" else 1e-5
    close(logits(model), before, rounding)
    trained = adapters.trainable_parameters(model)
    assert trained and all(not parameter.is_meta for _, parameter in trained)
    assert adapters.identify(model).tensors == identity
    move(model)
    assert (logits(model) - before).abs().max() > 1e-2
    assert adapters.identify(model).tensors == identity, "the identity is that of the base, whatever is trained"
    with adapters.use(model, "off"):
        assert torch.equal(logits(model), before)
    with adapters.use(model, "initial"):
        close(logits(model), before, rounding)


@pytest.mark.parametrize("case", _cases())
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


@pytest.mark.parametrize("case", _cases())
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
    places, found, at = (-2, -1, 1, 2), list[float](), 0
    with torch.no_grad():
        for place in places:
            for (_, parameter), each in zip(trained, direction, strict=True):
                parameter += (place - at) * 1e-3 * each  # norms compute in float32
            at = place
            found.append(float(loss()))
    measured = (found[0] - 8 * found[1] + 8 * found[2] - found[3]) / 12e-3  # correct to the fourth order
    assert measured == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize("name", ["parallel, llama", "loha, llama, nf4"])
def test_a_copy_computes_with_its_own_tensors(name: str) -> None:
    case = CASES[name]
    model = attached(case)
    other = copy.deepcopy(model)
    before = logits(model)
    move(other)
    assert torch.equal(logits(model), before) and not torch.equal(logits(other), before)


def test_every_method_of_peft_is_known() -> None:
    """A new method needs an entry: what it reads of the weights, or why it is refused; see the sweep below."""
    theirs = {str(kind.value) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert theirs <= METHODS.keys() | REFUSED.keys(), "add the new methods of PEFT to config/peft_methods.py"
    assert not METHODS.keys() & REFUSED.keys()


@pytest.mark.sweep
@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_of_peft_compute_over_formats_what_peft_computes(method: str, tmp_path: Path) -> None:
    format = "none" if METHODS[method].reads == "values" else "nf4"
    case = _peft(method, SIZES.get(method, {}), "llama", format)
    before, model = logits(make(case)), attached(case)
    if not METHODS[method].starts_elsewhere:
        close(logits(model), before, 1e-6)
    move(model)
    wanted = logits(model)
    assert (wanted - before).abs().max() > 1e-2
    adapters.save_adapter(model, tmp_path, section_of(case), "tiny")
    close(logits(peft.PeftModel.from_pretrained(plain(make(case)), tmp_path)), wanted)
    loaded = make(case)
    adapters.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), wanted)
    for layer in adapters.adapted_modules(model).values():  # packed texts must not see each other
        assert isinstance(layer, AdaptedLinear)
        x = torch.randn(1, 5, layer.in_features, generator=generator_of(0, method))
        with torch.no_grad():
            close(layer(x)[:, :1], layer(x[:, :1]), 1e-3)
    if method in UNMERGED:
        with pytest.raises(AdapterError, match="cannot be merged"):
            merge(model)
    else:
        close(logits(merge(model)), wanted, 1e-4)


def merge(model: nn.Module) -> nn.Module:
    """The model with the merged weights in plain layers."""
    for path, layer in list(adapters.adapted_modules(model).items()):
        assert isinstance(layer, AdaptedLinear)
        weight = merged_weight(layer, torch.float32)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if layer.bias is not None:
                linear.bias.copy_(layer.merge_bias(layer.bias))
        model.set_submodule(path, linear)
    return model


@pytest.mark.parametrize("name", ["ia3, gpt2", "oft, bert, nf4", "adalora, t5"])
def test_merged_layers_compute_the_same(name: str) -> None:
    model = attached(CASES[name])
    move(model)
    wanted = logits(model)
    close(logits(merge(model)), wanted, 1e-4)


def test_bottlenecks_are_not_merged() -> None:
    with pytest.raises(AdapterError, match="not linear"):
        merge(attached(CASES["parallel, llama"]))


def allocator_of(model: nn.Module, section: Any) -> adapters.RankAllocator:
    found = adapters.make_allocator(model, section)
    assert found is not None
    return found


def test_allocation_is_that_of_peft() -> None:
    """Masks, thresholds and averages of 20 steps, interrupted after each."""
    options = {"init_r": 4, "target_r": 2, "total_step": 20, "tinit": 3, "tfinal": 4, "deltaT": 2}
    targets = ["q_proj", "down_proj"]
    case = _peft("adalora", {**options, "target_modules": targets})
    model, section = attached(case), section_of(case)
    theirs = peft.get_peft_model(make(case), peft.AdaLoraConfig(**options, target_modules=targets))
    own = dict(adapters.trainable_parameters(model))
    others = {
        name.removeprefix("base_model.model.").replace(".lora_", ".tuner.lora_"): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert own.keys() == others.keys()
    allocator = allocator_of(model, section)
    for step in range(1, 21):
        for name in own:
            generator = generator_of(step, name)
            with torch.no_grad():
                own[name].copy_(torch.randn(own[name].shape, generator=generator))
                others[name].copy_(own[name])
            others[name].grad = torch.randn(own[name].shape, generator=generator)
        state = copy.deepcopy(allocator.state_dict())
        allocator = allocator_of(model, section)
        allocator.load_state_dict(state)
        allocator.observe([(name, others[name].grad) for name in own])
        allocator.update(step)
        theirs.base_model.update_and_allocate(step)
        for name in own:
            assert torch.equal(own[name], others[name]), (step, name)
    assert sum(allocator.ranks().values()) == 2 * len(allocator.ranks())


def test_the_penalty_is_that_of_the_paper() -> None:
    case = _peft("adalora", {"init_r": 4, "total_step": 20})
    model = attached(case)
    move(model)
    own = dict(adapters.trainable_parameters(model))
    squares = [p @ p.t() if "lora_A" in name else p.t() @ p for name, p in own.items() if "lora_E" not in name]
    wanted = 0.5 * torch.stack([(square - torch.eye(4)).norm() for square in squares]).mean()
    gradients = torch.autograd.grad(wanted, list(own.values()), allow_unused=True)
    found = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
    allocator = allocator_of(model, section_of(case))
    assert allocator.penalize(found.items()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, gradient in zip(own, gradients, strict=True):
        torch.testing.assert_close(found[name], torch.zeros_like(own[name]) if gradient is None else gradient)


@pytest.mark.parametrize("name", ["ia3, gpt2", "norms, llama, nf4", "oft, bert, nf4"])
def test_an_export_merges_weight_by_weight(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    make(case._replace(format="none")).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    config = ModelConfig(id=str(tmp_path / "model"), dtype="float32")
    base, section = base_section(case.format), section_of(case)
    model = models.load_model(config, base)
    identity = adapters.identify(model)
    adapters.initialize(model, section, adapters.insert(model, section), seed=0)
    move(model)
    adapters.save_adapter(model, tmp_path / "adapter", section, config.id, base=base, identity=identity)
    merged = MergedModel(Source(config, base, tmp_path / "adapter"), checks_base=True)
    state = {}
    for entry in merged.stream.entries:
        with merged.loaded(entry) as weight:
            state[entry.name] = weight.merged(torch.float32).clone()
    assert merged.explain_mismatch() is None
    written = make(case._replace(format="none"))
    assert not written.load_state_dict(state, strict=False).unexpected_keys
    close(logits(written), logits(model))


def test_an_export_refuses_what_is_no_change_of_weights(tmp_path: Path) -> None:
    case = CASES["parallel, llama"]
    make(case).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    adapters.save_adapter(attached(case), tmp_path / "adapter", section_of(case), "model")
    source = Source(ModelConfig(id=str(tmp_path / "model")), base_section("none"), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="not linear in their inputs"):
        MergedModel(source)


def test_adalora_of_peft_is_read_without_the_directions_that_it_removed(tmp_path: Path) -> None:
    case = _peft("adalora", {})
    options = {"init_r": 4, "target_r": 1, "total_step": 4, "tfinal": 1, "target_modules": ["q_proj", "down_proj"]}
    theirs = peft.get_peft_model(make(case), peft.AdaLoraConfig(**options))
    for step in range(1, 4):
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator_of(step, name))
                parameter.data, parameter.grad = drawn * 0.3, drawn.flip(0)
        theirs.base_model.update_and_allocate(step)
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any(tensor.shape[0] < 4 for key, tensor in saved.items() if "lora_A" in key)
    loaded = make(case)
    adapters.load_adapter(loaded, tmp_path)
    close(logits(loaded), wanted)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ia3", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
        ("norms", peft.LNTuningConfig(target_modules=["input_layernorm"])),
        ("oft", peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"])),
        ("loha", peft.LoHaConfig(r=2, target_modules="all-linear", alpha=4)),
    ],
)
def test_adapters_of_peft_are_read(name: str, config: Any, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make(Case({})), config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator_of(0, key))
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path)
    loaded = make(Case({}))
    adapters.load_adapter(loaded, tmp_path)
    close(logits(loaded), wanted)
