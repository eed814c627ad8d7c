"""Compares NF4, FP4 and int8 with bitsandbytes, bytes and decoded weights."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant import from_bitsandbytes, to_bitsandbytes
from ingle.quant.int8 import Int8
from ingle.quant.levels import Fp4, Levels, Nf4, dynamic_map
from ingle.quant.plane import as_float32

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own deprecations and missing CUDA
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the oracle here")
    oracle = bnb.functional

CPU = torch.device("cpu")
SHAPES = [(4, 64), (48, 256), (352, 1024), (7, 4096)]
#: Where their blocks, which run across rows, end with a row; and not so large that they compile C++ first.
BLOCKS = [(shape, size) for shape in SHAPES for size in (32, 64, 256, 1024) if shape[1] % size == 0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: The formats under test by bitsandbytes' names.
KINDS: dict[str, type[Levels]] = {"nf4": Nf4, "fp4": Fp4}
by_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def draw(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(shape, generator=generator)
    weight[::3] *= torch.rand(len(weight[::3]), 1, generator=generator) * 10
    weight[-1, :64] = 0
    return weight.to(dtype)


@by_kind
def test_tables_are_theirs(kind: str) -> None:
    assert torch.equal(KINDS[kind]().levels(CPU), oracle.get_4bit_type(kind, device="cpu"))
    assert torch.equal(dynamic_map(CPU), oracle.create_dynamic_map())


@by_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block_size"), BLOCKS)
def test_codes_and_absmax_are_theirs(shape: tuple[int, int], dtype: torch.dtype, block_size: int, kind: str) -> None:
    weight = draw(shape, dtype)
    quantized, state = oracle.quantize_4bit(weight, blocksize=block_size, quant_type=kind, compress_statistics=False)
    ours = KINDS[kind](block_size, double_quant=False).encode(weight)
    assert torch.equal(ours["codes"].flatten(), quantized.flatten())
    assert torch.equal(as_float32(ours["absmax"]).flatten(), state.absmax)


@by_kind
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block_size"), BLOCKS)
def test_their_bytes_decode_to_their_weights(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, block_size: int, kind: str
) -> None:
    weight = draw(shape, dtype)
    quantized, state = oracle.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=double_quant
    )
    expected = oracle.dequantize_4bit(quantized, state)
    tensors = {"weight": quantized} | {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    format, planes = from_bitsandbytes(tensors)
    assert format == KINDS[kind](block_size, double_quant)
    assert torch.equal(format.decode(planes, *shape, dtype), expected)
    assert torch.equal(format.decode_reference(planes, *shape, dtype), expected)


@pytest.mark.parametrize("shape", [(352, 1024), (1024, 2816)])
def test_double_quantized_absmax_is_theirs_within_a_code(shape: tuple[int, int]) -> None:
    weight = draw(shape, torch.float32, seed=1)
    _, state = oracle.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = Nf4().encode(weight)
    difference = (ours["absmax"].flatten().int() - state.absmax.flatten().int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert as_float32(ours["absmax_offset"]).item() == pytest.approx(state.offset.item(), rel=1e-6)
    assert torch.allclose(as_float32(ours["nested_absmax"]).flatten(), state.state2.absmax, rtol=1e-5)


@by_kind
@pytest.mark.parametrize("double_quant", [True, False])
def test_our_bytes_are_read_by_them(double_quant: bool, kind: str) -> None:
    shape, dtype = (48, 256), torch.bfloat16
    format = KINDS[kind](double_quant=double_quant)
    planes = format.encode(draw(shape, dtype))
    tensors = to_bitsandbytes(planes, format, *shape, dtype=dtype)
    state = oracle.QuantState.from_dict({key: tensor for key, tensor in tensors.items() if key != "weight"}, device=CPU)
    decoded = oracle.dequantize_4bit(tensors["weight"], state)
    assert torch.equal(decoded, format.decode(planes, *shape, dtype))
    loaded = bnb.nn.Params4bit.from_prequantized(
        tensors["weight"], {k: t for k, t in tensors.items() if k != "weight"}, device="cpu"
    )
    assert loaded.quant_state.shape == torch.Size(shape)


@by_kind
@pytest.mark.parametrize("double_quant", [True, False])
def test_interchange_has_their_keys_and_types(double_quant: bool, kind: str) -> None:
    weight = draw((48, 256), torch.bfloat16)
    quantized, state = oracle.quantize_4bit(weight, quant_type=kind, compress_statistics=double_quant)
    theirs = {"weight": quantized} | {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    format = KINDS[kind](double_quant=double_quant)
    ours = to_bitsandbytes(format.encode(weight), format, 48, 256, dtype=torch.bfloat16)
    assert {key: (t.dtype, t.shape) for key, t in ours.items() if "state" not in key} == {
        key: (t.dtype, t.shape) for key, t in theirs.items() if "state" not in key
    }
    (key,) = (key for key in ours if "state" in key)
    mine, yours = (json.loads(bytes(t[key].tolist())) for t in (ours, theirs))
    assert mine.keys() == yours.keys()
    for name, value in yours.items():
        assert mine[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


@by_kind
@pytest.mark.parametrize("double_quant", [True, False])
def test_interchange_is_lossless(double_quant: bool, kind: str) -> None:
    format = KINDS[kind](double_quant=double_quant)
    planes = format.encode(draw((48, 256), torch.bfloat16))
    again, back = from_bitsandbytes(to_bitsandbytes(planes, format, 48, 256))
    assert again == format
    assert back.keys() == planes.keys()
    assert all(torch.equal(back[name], plane) for name, plane in planes.items())


def test_quantized_storage_of_another_dtype_is_read() -> None:
    weight = draw((48, 256), torch.bfloat16)
    quantized, state = oracle.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    tensors = {"weight": quantized} | {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    format, planes = from_bitsandbytes(tensors)
    assert torch.equal(format.decode(planes, 48, 256, torch.bfloat16), oracle.dequantize_4bit(quantized, state))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_theirs(shape: tuple[int, int]) -> None:
    weight = draw(shape, torch.float16)
    codes, scale, _ = oracle.int8_vectorwise_quant(weight)
    codes[scale == 0] = 0  # theirs are casts of 0 * (127 / 0), a NaN: what comes out differs between processors
    ours = Int8().encode(weight)
    assert torch.equal(ours["codes"], codes)
    assert torch.equal(as_float32(ours["scale"]).flatten(), scale)
    format, planes = from_bitsandbytes({"weight": codes, "SCB": scale})
    expected = oracle.int8_vectorwise_dequant(codes, scale)
    for dtype in DTYPES:
        assert torch.equal(format.decode(planes, *shape, dtype), expected.to(dtype))
    tensors = to_bitsandbytes(ours, Int8(), *shape)
    assert tensors.keys() == {"weight", "SCB", "weight_format"}
    assert torch.equal(tensors["SCB"], scale)


def test_what_cannot_be_exchanged_is_refused() -> None:
    format = Nf4()
    planes = format.encode(draw((4, 64), torch.float32)[:, :40])
    with pytest.raises(QuantizationError, match="not a multiple of block_size"):
        to_bitsandbytes(planes, format, 4, 40)
    quantized, state = oracle.quantize_4bit(draw((4, 64), torch.float32), quant_type="nf4")
    tensors = {"weight": quantized} | {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    (key,) = (key for key in tensors if "quant_state" in key)
    other = tensors[key].numpy().tobytes().replace(b'"nf4"', b'"af4"')
    with pytest.raises(QuantizationError, match="af4"):
        from_bitsandbytes(tensors | {key: torch.tensor(list(other), dtype=torch.uint8)}, name="layer")
    with pytest.raises(QuantizationError, match="not a bitsandbytes layer"):
        from_bitsandbytes({"weight": quantized})
    with pytest.raises(QuantizationError, match="tiled"):
        from_bitsandbytes({"weight": quantized, "SCB": quantized, "weight_format": torch.tensor(2)})


def test_inconsistent_checkpoints_are_refused() -> None:
    format = Nf4()
    good = to_bitsandbytes(format.encode(draw((48, 256), torch.float32)), format, 48, 256)
    with pytest.raises(QuantizationError, match="another table"):
        from_bitsandbytes(good | {"weight.quant_map": good["weight.quant_map"] + 0.01})
    with pytest.raises(QuantizationError, match="size of nested_absmax"):
        from_bitsandbytes(good | {"weight.nested_absmax": good["weight.nested_absmax"].repeat(2)})
    for key in ("weight.nested_absmax", "weight.absmax"):
        single = Nf4(double_quant=False)
        base = (
            good if "nested" in key else to_bitsandbytes(single.encode(draw((48, 256), torch.float32)), single, 48, 256)
        )
        with pytest.raises(QuantizationError, match="not finite"):
            from_bitsandbytes(base | {key: base[key] * torch.nan}, name="layer")
