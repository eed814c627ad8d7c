"""Tests the interface that every quantization format implements; a new format is one more line in ``FORMATS``.

Decoders are compared with the format's plain torch (``decode_reference``), encoders in ``test_encoders``. One test
takes all shapes and dtypes of a format, because encoding a weight is slower than the checks.
"""

from __future__ import annotations

import copy
import io
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from ingle.adapters import attach
from ingle.config.adapter import LoraAdapter
from ingle.config.base import BaseConfig, NoBase, base_section
from ingle.config.ggml import GgmlBase
from ingle.errors import QuantizationError
from ingle.quant import Format, QuantLinear, convert, make_format
from ingle.quant.ggml import GgmlBlocks
from ingle.quant.hqq import Hqq
from ingle.quant.int8 import Int8
from ingle.quant.ternary import Ternary
from tests.tiny import take_steps

#: Options of ``base`` by a key that starts with the name of the format.
OPTIONS: dict[str, dict[str, object]] = {
    "nf4": {},
    "nf4-single": {"double_quant": False},
    "nf4-32": {"block_size": 32},
    "nf4-256": {"block_size": 256, "double_quant": False},
    "nf4-4096": {"block_size": 4096},
    **{name: {} for name in ("int8", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k", "q5_k", "q3_k", "q2_k")},
    **{name: {} for name in ("iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "hqq")},
    "hqq-8": {"bits": 8, "group_size": 128},
    "hqq-3": {"bits": 3, "group_size": 32},
    "hqq-2": {"bits": 2, "group_size": 16},
    "hqq-1": {"bits": 1, "group_size": 8},
    "hqq-published": {"solver": "hqq"},
    "hqq-published-3": {"bits": 3, "group_size": 8, "solver": "hqq"},
    "fp4": {},
    "fp4-single": {"double_quant": False},
    "ternary": {},
    "ternary-row": {"group_size": "row"},
    "ternary-256": {"group_size": 256},
}
FORMATS: dict[str, BaseConfig] = {
    key: base_section({"format": key.split("-")[0], **options}) for key, options in OPTIONS.items()
}
#: Upper bounds of the relative root mean square error of a Gaussian weight.
ERROR = {
    **{"nf4": 0.1, "nf4-single": 0.1, "nf4-32": 0.09, "nf4-256": 0.12, "nf4-4096": 0.15, "int8": 0.01},
    **{"q4_0": 0.087, "q4_1": 0.079, "q5_0": 0.043, "q5_1": 0.038, "q8_0": 0.0055},
    **{"q4_k": 0.072, "q6_k": 0.018, "q5_k": 0.037, "q3_k": 0.152, "q2_k": 0.31},
    **{"iq4_nl": 0.077, "iq4_xs": 0.078, "tq1_0": 0.82, "tq2_0": 0.82},
    **{"hqq": 0.082, "hqq-8": 0.0057, "hqq-3": 0.15, "hqq-2": 0.26, "hqq-1": 0.48},
    **{"hqq-published": 0.088, "hqq-published-3": 0.097},
    **{"fp4": 0.125, "fp4-single": 0.125, "ternary": 0.52, "ternary-row": 0.52, "ternary-256": 0.52},
}
#: The last is large enough for several threads, with rows that two threads cannot share equally.
SHAPES = [(1, 64), (5, 256), (7, 37), (3, 1), (33, 96), (9, 200), (16, 1024), (67, 2816)]
#: Kernels exist for the first two; the others are converted, for which two shapes are enough.
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CONVERTED = [(7, 37), (9, 200)]
#: One format for each kernel that is an operator in a compiled graph, with and without padding.
COMPILED = ["nf4", "nf4-single", "int8", "q4_k", "hqq-3", "ternary"]


@pytest.fixture(params=list(FORMATS))
def key(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def format(key: str) -> Format:
    made = make_format(FORMATS[key])
    assert made is not None
    return made


def draw(out_features: int, in_features: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(out_features, in_features, generator=generator)).to(dtype)


def fit(format: Format, *shape: int) -> tuple[int, int]:
    """A shape that the format supports: rows of GGUF formats are multiples of the block size."""
    rows, columns = shape
    size = format.block_size if isinstance(format, GgmlBlocks) else 1
    return rows, -(-columns // size) * size


def width(format: Format) -> int:
    return fit(format, 1, 200)[1]


def test_none_has_no_format() -> None:
    assert make_format(NoBase()) is None


def dtypes_for(shape: tuple[int, int]) -> list[torch.dtype]:
    return DTYPES if shape in CONVERTED else DTYPES[:2]


def test_planes_match_their_specs_and_fast_decode_is_the_reference_bit_for_bit(format: Format) -> None:
    for drawn in SHAPES:
        shape = fit(format, *drawn)
        weight = draw(*shape)
        weight[0] *= 1e4  # rows of very different size
        planes = format.encode(weight)
        specs = format.plane_specs(*shape)
        assert {name: (tuple(p.shape), p.dtype) for name, p in planes.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in specs.items()
        }
        assert not any(plane.is_floating_point() for plane in planes.values())
        num_bytes = sum(plane.numel() * plane.element_size() for plane in planes.values())
        assert format.bits_per_weight(*shape) == pytest.approx(8 * num_bytes / (shape[0] * shape[1]))
        for dtype in dtypes_for(drawn):
            expected = format.decode_reference(planes, *shape, dtype)
            out = torch.full(shape, torch.nan, dtype=dtype)
            decoded = format.decode(planes, *shape, dtype, out)
            assert decoded.data_ptr() == out.data_ptr()
            assert decoded.dtype == dtype
            assert torch.equal(out, expected), (shape, dtype)
            assert torch.equal(format.decode(planes, *shape, dtype), expected), (shape, dtype)


def test_there_is_a_fast_kernel_here(format: Format) -> None:
    plane = next(iter(format.encode(draw(*fit(format, 1, 64))).values()))
    assert format.has_kernel(plane, torch.bfloat16)
    assert format.has_kernel(plane, torch.float32)
    assert not format.has_kernel(plane.to("meta"), torch.float32)


def test_error_is_small(format: Format, key: str) -> None:
    weight = draw(16, 4096)
    decoded = format.decode_reference(format.encode(weight), 16, 4096, torch.float32)
    relative = (decoded - weight).norm() / weight.norm()
    assert relative < ERROR[key]


def test_encoding_depends_on_values_not_on_dtype_or_strides(format: Format) -> None:
    weight = draw(*fit(format, 12, 192)).clamp(min=-0.06).half().bfloat16().half()
    weight[weight.abs() < 1e-3] = 0  # what bfloat16, float16 and float32 all hold
    expected = format.encode(weight)
    for same in (weight.float(), weight.bfloat16(), weight.double(), weight.t().contiguous().t(), weight.float()[::1]):
        assert torch.equal(same.double(), weight.double())
        again = format.encode(same)
        assert all(torch.equal(again[name], plane) for name, plane in expected.items())


def test_an_encoder_copies_little(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(40, width(format)).half()
    expected = format.encode(weight)
    monkeypatch.setattr("ingle.kernels.ggml.dispatch.COPIED", 1000)
    monkeypatch.setattr("ingle.kernels.levels.dispatch.COPIED", 1000)  # eight times five rows
    monkeypatch.setattr("ingle.kernels.hqq.dispatch.COPIED", 1000)
    monkeypatch.setattr("ingle.quant.hqq.CHUNK", 1000)
    again = format.encode(weight)
    assert all(torch.equal(again[name], plane) for name, plane in expected.items())


def test_results_do_not_depend_on_threads(format: Format) -> None:
    shape = (131, 1024)  # large enough that threads are woken
    weight = draw(*shape)
    before = torch.get_num_threads()
    encoded, decoded = [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            encoded.append(format.encode(weight))
            decoded.append(format.decode(encoded[0], *shape, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(encoded[0][name], encoded[1][name]) for name in encoded[0])
    expected = format.decode_reference(encoded[0], *shape, torch.bfloat16)
    assert torch.equal(decoded[0], expected)
    assert torch.equal(decoded[1], expected)


def test_row_groups_can_be_sliced_out_of_all_planes(format: Format) -> None:
    shape = fit(format, 1024, 64)
    planes = format.encode(draw(*shape))
    rows = format.row_group(*shape)
    assert shape[0] % rows == 0
    whole = format.decode_reference(planes, *shape, torch.float32)
    for start in range(0, shape[0], rows):
        cut = {}
        for name, plane in planes.items():
            share = plane.shape[0] * rows / shape[0]
            if plane.shape[0] == 1:  # one for the whole tensor
                cut[name] = plane
            else:
                assert share == int(share)
                first = start // rows * int(share)
                cut[name] = plane[first : first + int(share)]
        part = format.decode(cut, rows, shape[1], torch.float32)
        assert torch.equal(part, whole[start : start + rows])
        if start > 3 * rows:
            break


def test_codes_go_under_other_scales(format: Format) -> None:
    """A doubled weight has the same codes and doubled scales."""
    weight = torch.randn(fit(format, 48, 64), generator=torch.Generator().manual_seed(0))
    once, twice = format.encode(weight), format.encode(2 * weight)
    mixed = format.recode(once, twice)
    if isinstance(format, Hqq) and format.solver == "hqq":
        return  # its shrinkage is not invariant to the scale of weights
    assert all(torch.equal(mixed[name], twice[name]) for name in twice)
    assert not all(torch.equal(mixed[name], once[name]) for name in twice)
    if isinstance(format, GgmlBlocks):
        num_codes = format.base.block_bytes - sum(end - first for first, end in format.scale_bytes)
        bits = 8 * 52 / 256 if format.name == "tq1_0" else int(re.sub(r"\D*(\d).*", r"\1", format.name))
        assert num_codes == format.block_size * bits / 8


def test_codes_of_a_row_do_not_depend_on_other_rows(format: Format) -> None:
    weight = draw(8, width(format))
    changed = weight.clone()
    changed[[0, 1, 3, 7]] *= 50
    if format == Ternary():
        changed = weight.flip(1)  # the whole tensor has one scale, which this leaves alone
        changed[[2, 4, 5, 6]] = weight[[2, 4, 5, 6]]
    before, after = format.encode(weight), format.encode(changed)
    plane = next(iter(before))
    assert torch.equal(before[plane][[2, 4, 5, 6]], after[plane][[2, 4, 5, 6]])


def test_zero_stays_zero(format: Format) -> None:
    for shape in (fit(format, 4, 128), fit(format, 1, 3)):
        weight = torch.zeros(shape)
        assert torch.equal(format.decode(format.encode(weight), *shape, torch.bfloat16), weight.bfloat16())


def test_zero_rows_among_others_stay_zero(format: Format) -> None:
    weight = draw(6, 4096)
    weight[2] = 0
    decoded = format.decode(format.encode(weight), 6, 4096, torch.float32)
    # With double quantization the row's absmax comes out near zero only; its codes mean zero whatever it is.
    assert (decoded[2] == 0).all()


def test_constant_blocks_keep_their_value(format: Format) -> None:
    weight = torch.tensor([[0.5], [-0.25], [0.125], [1.0]]).expand(4, 256).contiguous()
    if format == Ternary():
        weight = weight.sign() / 8  # the whole tensor has one scale
    decoded = format.decode(format.encode(weight), 4, 256, torch.float32)
    coarse = isinstance(format, GgmlBlocks) or "absmax_offset" in format.plane_specs(4, 256)
    assert torch.allclose(decoded, weight, rtol=0.03 if coarse else 1e-6)


def test_tiny_weights_give_finite_results(format: Format) -> None:
    shape = fit(format, 2, 64)
    for tiny in (1e-30, 1e-40):
        decoded = format.decode(format.encode(torch.full(shape, tiny)), *shape, torch.float32)
        assert decoded.isfinite().all()
        assert (decoded.abs() <= 2 * tiny).all()


def test_huge_weights_give_finite_results_or_are_refused(format: Format) -> None:
    for huge in (2e36, 3e38):
        weight = torch.full(fit(format, 2, 64), huge)
        # In int8 code * scale would overflow in bitsandbytes' order of products; other scales are float16.
        if (format.name == "int8" and huge > 3e36) or isinstance(format, GgmlBlocks | Hqq | Ternary):
            with pytest.raises(QuantizationError, match="too large"):
                format.encode(weight)
        else:
            decoded = format.decode(format.encode(weight), 2, 64, torch.float32)
            assert torch.allclose(decoded, weight, rtol=0.01)


def test_nan_and_infinity_are_refused_by_name(format: Format) -> None:
    """Each value at each position and in each dtype at least once: a Latin square."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        for j, where in enumerate(((0, 0), (2, 199), (1, 100))):
            weight = draw(3, width(format), dtypes[(i + j) % 3])
            weight[where] = bad
            with pytest.raises(QuantizationError, match="contains NaN or infinity") as caught:
                format.encode(weight, name="model.layers.3.mlp.up_proj.weight")
            assert "model.layers.3.mlp.up_proj.weight" in str(caught.value)
            assert f"1 of {weight.numel()}" in str(caught.value)


def make_layer(format: Format, *, bias: bool = True) -> QuantLinear:
    layer = QuantLinear(format, width(format), 48, bias=bias, weight_dtype=torch.float32)
    layer.quantize(draw(48, width(format)))
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def test_layer_equals_a_linear_with_the_decoded_weight(format: Format) -> None:
    for dtype, lead in ((torch.float32, (5,)), (torch.bfloat16, (2, 5)), (torch.float32, ()), (torch.bfloat16, ())):
        layer = make_layer(format).to(dtype)
        plain = nn.Linear(width(format), 48, dtype=dtype)
        with torch.no_grad():
            plain.weight.copy_(format.decode_reference(layer.planes(), 48, width(format), dtype))
            plain.bias.copy_(layer.bias)
        x = torch.randn(*lead, width(format), dtype=dtype)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(ours), plain(theirs)
        assert torch.equal(y, expected), (dtype, lead)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad)
        assert torch.equal(ours.grad, theirs.grad), (dtype, lead)
        rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(layer.bias.grad, plain.bias.grad, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("key", ["nf4", "q4_0", "hqq"])  # the layer is one for all formats
def test_gradients_by_finite_differences(format: Format) -> None:
    columns = fit(format, 3, 20)[1]
    layer = QuantLinear(format, columns, 3, bias=True, weight_dtype=torch.float64)
    layer.quantize(draw(3, columns))
    layer.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
    x = torch.randn(2, columns, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.bias))


def test_backward_keeps_planes_and_nothing_decoded(format: Format) -> None:
    layer = make_layer(format)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, width(format), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    planes = {plane.data_ptr() for plane in layer.planes().values()}
    assert {tensor.data_ptr() for tensor in saved} == planes
    y.sum().backward()
    assert x.grad is not None


def test_each_thread_has_its_own_scratch() -> None:
    """What one thread decoded stays while another one decodes with the same format."""
    first, second = make_layer(Int8()), make_layer(Int8())
    second.format, (mine, theirs) = first.format, (first.decode(torch.float32), second.decode(torch.float32) + 1)
    held = first.decode(torch.float32, first.scratch(torch.float32))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: second.decode(torch.float32, second.scratch(torch.float32)).add_(1)).result()
    assert torch.equal(held, mine) and torch.equal(other, theirs) and held.data_ptr() != other.data_ptr()


def test_two_layers_share_one_scratch_safely(format: Format) -> None:
    first, second = make_layer(format), make_layer(format)
    second.quantize(draw(48, width(format), seed=1))
    x = torch.randn(4, width(format), requires_grad=True)
    y = first(x) + second(x)
    y.sum().backward()
    weights = first.decode(torch.float32) + second.decode(torch.float32)
    assert torch.allclose(x.grad, weights.sum(0).expand(4, width(format)), atol=1e-5)
    assert format.scratch.num_bytes() >= 4 * 48 * width(format)
    held = format.scratch.num_bytes()
    first(x)
    assert format.scratch.num_bytes() == held


def test_training_after_generation(format: Format) -> None:
    layer = make_layer(format).half()
    with torch.inference_mode():
        layer(torch.randn(1, width(format), dtype=torch.float16))
    x = torch.randn(1, width(format), dtype=torch.float16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    decoded = layer.decode(torch.float16, layer.scratch(torch.float16))
    assert torch.equal(decoded, layer.decode(torch.float16))


def test_casts_and_moves_leave_planes_alone(format: Format) -> None:
    layer = make_layer(format)
    before = {name: plane.clone() for name, plane in layer.planes().items()}
    for cast in (layer.bfloat16, layer.half, layer.double, layer.float, lambda: layer.to(torch.bfloat16)):
        cast()
        for name, plane in layer.planes().items():
            assert plane.dtype == before[name].dtype
            assert torch.equal(plane, before[name])
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


def test_state_survives_training_evaluation_and_safetensors(format: Format) -> None:
    model = nn.Sequential(nn.Linear(64, width(format)), make_layer(format), nn.Linear(48, 1))
    before = {name: tensor.clone() for name, tensor in model[1].state_dict().items() if name != "bias"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        model(torch.randn(1, 64))
    after = model[1].state_dict()
    assert set(before) | {"bias"} == set(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    restored = load(save({name: tensor.contiguous() for name, tensor in after.items()}))
    fresh = QuantLinear(format, width(format), 48, bias=True, device="meta", weight_dtype=torch.float32)
    fresh.load_state_dict(restored, assign=True)
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in after.items())
    x = torch.randn(2, width(format))
    assert torch.equal(fresh(x), model[1](x))


def test_planes_are_frozen_parameters(format: Format) -> None:
    layer = make_layer(format)
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {*format.plane_specs(48, width(format)), "bias"}
    assert [name for name, parameter in parameters.items() if parameter.requires_grad] == ["bias"]


def test_copies_and_pickles_are_independent(format: Format) -> None:
    layer = make_layer(format)
    x = torch.randn(2, width(format))
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for duplicate in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(duplicate(x), expected)
        assert duplicate.format == layer.format
        assert duplicate.format.scratch is not layer.format.scratch


def test_meta_layers_have_shapes_and_no_bytes(format: Format) -> None:
    layer = QuantLinear(format, width(format), 48, bias=True, device="meta")
    real = make_layer(format)
    assert {name: plane.shape for name, plane in layer.planes().items()} == {
        name: plane.shape for name, plane in real.planes().items()
    }
    assert all(plane.is_meta for plane in layer.planes().values())
    assert layer(torch.empty(3, width(format), device="meta", dtype=torch.bfloat16)).shape == (3, 48)
    layer.assign(real.planes())
    layer.bias = real.bias
    x = torch.randn(2, width(format))
    assert torch.equal(layer(x), real(x))


def test_planes_at_odd_addresses_are_taken(format: Format) -> None:
    real = make_layer(format)
    shifted = {}
    for name, plane in real.planes().items():
        memory = np.empty(plane.numel() * plane.element_size() + 1, dtype=np.uint8)
        memory[1:] = plane.contiguous().view(torch.uint8).numpy().reshape(-1)
        shifted[name] = torch.from_numpy(memory[1:]).view(plane.dtype).view(plane.shape)
        assert shifted[name].data_ptr() % 2
    layer = QuantLinear(format, width(format), 48)
    layer.assign(shifted)
    assert torch.equal(layer.decode(torch.bfloat16), real.decode(torch.bfloat16))


def test_wrong_planes_are_refused(format: Format) -> None:
    layer = make_layer(format)
    planes = layer.planes()
    name = next(iter(planes))
    with pytest.raises(QuantizationError, match="planes do not match"):
        layer.assign({other: plane for other, plane in planes.items() if other != name})
    with pytest.raises(QuantizationError, match="does not match the format"):
        layer.assign(planes | {name: planes[name][1:]})
    with pytest.raises(QuantizationError, match="does not match its layer"):
        layer.quantize(draw(width(format), 48), name="w")


@pytest.mark.parametrize("key", COMPILED)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_compiled_layer_equals_eager_one(format: Format) -> None:
    torch.compiler.reset()  # what other formats left behind counts against the limit of compilations
    layer = make_layer(format)
    x = torch.randn(4, width(format), requires_grad=True)
    expected = layer(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(y, expected)
    assert torch.equal(grad, expected_grad)


def test_convert_before_and_after_loading_gives_the_same_bytes(key: str, format: Format) -> None:
    torch.manual_seed(0)
    wide, inner = fit(format, 1, 96)[1], fit(format, 1, 64)[1]
    model = nn.Sequential(nn.Linear(wide, inner), nn.ReLU(), nn.Linear(inner, 32, bias=False))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(wide, inner), nn.ReLU(), nn.Linear(inner, 32, bias=False))
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    convert(model, FORMATS[key])
    convert(empty, FORMATS[key])
    for index, weight in zip((0, 2), weights, strict=True):
        assert isinstance(empty[index], QuantLinear)
        empty[index].quantize(weight)
        for name, plane in model[index].planes().items():
            assert torch.equal(plane, empty[index].planes()[name])
    assert empty[2].bias is None
    x = torch.randn(3, wide)
    hidden = functional.linear(x, model[0].decode(torch.float32), model[0].bias).relu()
    assert torch.equal(model(x), functional.linear(hidden, model[2].decode(torch.float32)))


def test_config_and_format_count_the_same_bits(key: str, format: Format) -> None:
    columns = fit(format, 1, 4096)[1]
    assert FORMATS[key].bits_per_weight(columns) == pytest.approx(format.bits_per_weight(4096, columns), rel=1e-4)


def test_additive_fields_are_those_of_offsets(key: str, format: Format) -> None:
    expected = format.group_size if isinstance(format, Hqq) else {"q4_1": 32, "q5_1": 32}.get(key)
    assert format.additive_field == expected


@pytest.mark.parametrize("key", [key for key, base in FORMATS.items() if isinstance(base, GgmlBase)])
def test_rows_that_are_not_multiples_of_the_block_size_are_refused(key: str, format: Format) -> None:
    base = FORMATS[key]
    assert isinstance(base, GgmlBase)
    fallback = base.fallback or "float16"
    for columns, substitute in ((base.block_size + 32, fallback), (base.block_size + 20, "float16")):
        if columns % base.block_size:
            with pytest.raises(QuantizationError, match=f"stores such a matrix as (?i:{substitute})") as caught:
                format.encode(draw(2, columns), name="model.layers.3.mlp.up_proj.weight")
            assert "model.layers.3.mlp.up_proj.weight" in str(caught.value)


def test_every_format_trains_under_lora(key: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 32))
    x, target = torch.randn(64, 256), torch.randn(64, 32)
    convert(model, FORMATS[key])
    attach(model, LoraAdapter(kind="lora", rank=8), seed=0)
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    losses = take_steps(model, x, target, lr=0.01, num_steps=3)
    assert losses[2] < losses[1] < losses[0]
    assert all(map(torch.equal, frozen, (p for p in model.parameters() if not p.requires_grad)))
