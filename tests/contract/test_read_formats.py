"""Tests formats that are read only; ``tests/numerics/test_quant_gguf`` compares their decoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ingle.adapters import attach
from ingle.config.adapter import LoraAdapter
from ingle.config.base import base_section, format_name
from ingle.config.ggml import GgmlBase
from ingle.errors import QuantizationError
from ingle.quant import QuantLinear, convert, make_format
from ingle.quant.ggml import GGUF_FORMATS, GgmlBlocks
from tests.tiny import take_steps

NAMES = [format_name(member.base) for member in GGUF_FORMATS if member.base.read_only]
ROWS, COLUMNS = 48, 512


@pytest.fixture(params=NAMES)
def format(request: pytest.FixtureRequest) -> GgmlBlocks:
    made = make_format(base_section(request.param))
    assert isinstance(made, GgmlBlocks)
    return made


def draw(format: GgmlBlocks, seed: int = 0) -> dict[str, Tensor]:
    """Random blocks of ordinary size."""
    size = format.base.block_bytes
    count = ROWS * COLUMNS // format.block_size
    rng = np.random.default_rng(seed)
    blocks = torch.from_numpy(rng.integers(0, 256, (100 * count, size), dtype=np.uint8))
    largest = format.dequantize_blocks(blocks.unsqueeze(0)).squeeze(0).abs().amax(-1)
    chosen = blocks[(largest > 1e-3) & (largest < 3)][:count]
    assert len(chosen) == count
    return {"data": chosen.reshape(ROWS, -1)}


def make_layer(format: GgmlBlocks) -> QuantLinear:
    layer = QuantLinear(format, COLUMNS, ROWS, weight_dtype=torch.float32)
    layer.assign(draw(format))
    return layer


def test_packing_is_refused_with_the_reason(format: GgmlBlocks) -> None:
    with pytest.raises(QuantizationError, match="only reads") as caught:
        format.encode(torch.randn(ROWS, COLUMNS), name="model.layers.3.mlp.up_proj.weight")
    assert "model.layers.3.mlp.up_proj.weight" in str(caught.value)
    assert caught.value.why == format.base.read_only
    assert ".gguf" in str(caught.value.fix)
    with pytest.raises(QuantizationError, match=r"only reads|no experts"):
        convert(nn.Sequential(nn.Linear(256, 256)), format.base(format=format.name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_fast_decode_is_the_reference_bit_for_bit(format: GgmlBlocks, dtype: torch.dtype) -> None:
    planes = draw(format)
    assert torch.equal(
        format.decode(planes, ROWS, COLUMNS, dtype), format.decode_reference(planes, ROWS, COLUMNS, dtype)
    )
    one = {"data": planes["data"][:1, : format.base.block_bytes]}
    shape = 1, format.block_size
    assert torch.equal(format.decode(one, *shape, dtype), format.decode_reference(one, *shape, dtype))


def test_layer_equals_a_linear_with_the_decoded_weight(format: GgmlBlocks) -> None:
    layer = make_layer(format)
    weight = layer.decode(torch.float32)
    ours = torch.randn(5, COLUMNS, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    y, expected = layer(ours), functional.linear(theirs, weight)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("format", ["iq3_s"], indirect=True)  # one operator decodes all of them in a compiled graph
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_compiled_layer_equals_eager_one(format: GgmlBlocks) -> None:
    torch.compiler.reset()
    layer = make_layer(format)
    x = torch.randn(4, COLUMNS)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_results_do_not_depend_on_threads(format: GgmlBlocks) -> None:
    planes = {"data": draw(format)["data"].repeat(8, 1)}
    before = torch.get_num_threads()
    decoded = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            decoded.append(format.decode(planes, 8 * ROWS, COLUMNS, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*decoded)


def test_config_and_format_count_the_same_bits(format: GgmlBlocks) -> None:
    base = base_section(format.name)
    assert isinstance(base, GgmlBase)
    assert base.bits_per_weight(COLUMNS) == format.bits_per_weight(ROWS, COLUMNS)
    assert format.additive_field is None
    assert format.row_group(ROWS, COLUMNS) == 1


def test_adapters_train_on_them(format: GgmlBlocks) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make_layer(format), nn.GELU(), nn.Linear(ROWS, 32))
    x, target = torch.randn(64, COLUMNS), torch.randn(64, 32)
    attach(model, LoraAdapter(kind="lora", rank=8), seed=0)
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    losses = take_steps(model, x, target, lr=0.003, num_steps=3)
    assert losses[2] < losses[1] < losses[0]
    assert all(map(torch.equal, frozen, (p for p in model.parameters() if not p.requires_grad)))
