"""The Triton kernels against the torch reference, in Triton's interpreter; and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")

DECODE = """
import torch
from ingle.kernels.triton import decode as kernels
from ingle.quant.hqq import Hqq
from ingle.quant.plane import as_float16
from ingle.quant.int8 import Int8
from ingle.quant.levels import Fp4, Nf4, dynamic_map
from ingle.quant.plane import as_float32

cpu = torch.device("cpu")
for shape in ((1, 64), (3, 7), (5, 200), (4, 2816)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] *= 1e3
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        groups = [Hqq(bits, size) for bits, size in ((8, 64), (4, 128), (3, 8), (3, 64), (2, 32), (1, 16))]
        blocks = [Nf4(size, double) for size in (32, 64, 4096) for double in (False, True)]
        for format in (*blocks, Fp4(), Int8(), *groups):
            planes = format.encode(weight)
            out = torch.full(shape, torch.nan, dtype=dtype)
            if isinstance(format, Hqq):
                halves = as_float16(planes["scale"]), as_float16(planes["zero"])
                kernels.decode_groups(planes["codes"], *halves, format.bits, format.group_size, out)
            elif isinstance(format, Int8):
                kernels.decode_int8(planes["codes"], as_float32(planes["scale"]).flatten(), out)
            elif format.double_quant:
                nested = [as_float32(planes[name]).flatten() for name in ("nested_absmax", "absmax_offset")]
                tables = format.levels(cpu), planes["absmax"], dynamic_map(cpu)
                kernels.decode_nested_levels(planes["codes"], *tables, *nested, format.block_size, out)
            else:
                absmax = as_float32(planes["absmax"])
                kernels.decode_levels(planes["codes"], format.levels(cpu), absmax, format.block_size, out)
            assert torch.equal(out, format.decode_reference(planes, *shape, dtype)), (shape, dtype, format)
print("exact")
"""

LOGITS = """
import torch
from ingle.kernels.layers import logits as reference
from ingle.kernels.layers.logits import LogitTransform
from ingle.kernels.triton import logits as kernels

reference.supported = lambda *tensors: False  # torch, not numba
kernels.BLOCK = 64
generator = torch.Generator().manual_seed(0)
for rows, vocabulary in ((1, 5), (4, 64), (7, 301)):
    exact = torch.randn(rows, vocabulary, generator=generator) * 5
    exact[0, 0], exact[-1, -1] = -torch.inf, 80.0
    targets = torch.randint(1, vocabulary, (rows,), generator=generator)
    grads = torch.randn(rows, generator=generator)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        for transform in (LogitTransform(), LogitTransform(0.25, 5.0)):
            raw = exact.to(dtype)
            wanted = reference.score(raw.double(), targets, transform)
            logps = kernels.score_rows(raw, targets, *transform.numbers())
            assert (logps - wanted).abs().max() <= 1e-5, (logps, wanted)
            gradient, expected = raw.clone(), raw.double()
            kernels.differentiate_rows(gradient, targets, logps, grads, *transform.numbers())
            reference.differentiate_(expected, targets, wanted, grads.double(), transform)
            error = (gradient.double() - expected).norm() / expected.norm()
            assert error <= tolerance, (dtype, transform, error)
raw[0, 3] = torch.nan
assert kernels.score_rows(raw, targets, 1.0, 0.0)[0].isnan()
print("close")
"""

COMPILE = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ingle.kernels.triton import decode as kernels

sizes = {"num_blocks": "i32", "num_bytes": "i32", "num_columns": "i32", "HALF": "constexpr", "BLOCKS": "constexpr"}
blocks = {"HALF": 32, "BLOCKS": 32}
groups = {"num_groups": "i32", "num_bytes": "i32", "num_columns": "i32",
          "BITS": "constexpr", "SIZE": "constexpr", "COLUMNS": "constexpr"}
nested = {"scale_codes": "*u8", "scale_levels": "*fp32", "nested": "*fp32", "offset": "*fp32"}
for out in ("*bf16", "*fp16", "*fp32"):
    for function, signature, constants in (
        (kernels._decode_levels, {"codes": "*u8", "levels": "*fp32", "scales": "*fp32", "out": out} | sizes, blocks),
        (kernels._decode_nested_levels, {"codes": "*u8", "levels": "*fp32"} | nested | {"out": out} | sizes, blocks),
        (
            kernels._decode_int8,
            {"codes": "*i8", "scales": "*fp32", "out": out, "num_columns": "i32", "reciprocal": "fp32",
             "COLUMNS": "constexpr"},
            {"COLUMNS": 1024},
        ),
        *((kernels._decode_groups, {"codes": "*u8", "scales": "*fp16", "zeros": "*fp16", "out": out} | groups,
           {"BITS": bits, "SIZE": 64, "COLUMNS": 1024}) for bits in (8, 4, 3, 2, 1)),
    ):
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
        assert not re.search(r"\\bfma\\.", compiled.asm["ptx"]), function

from ingle.kernels.triton import logits

for target in (80, 90):
    for dtype in ("*bf16", "*fp16", "*fp32"):
        for softcap in (0.0, 30.0):
            pointers = {"logits": dtype, "targets": "*i64", "logps": "*fp32"}
            rest = {"vocabulary": "i32", "scale": "fp32", "softcap": "constexpr", "BLOCK": "constexpr"}
            for function, signature in (
                (logits._score_rows, pointers | rest),
                (logits._differentiate_rows, pointers | {"grads": "*fp32"} | rest),
            ):
                constants = {"softcap": softcap, "BLOCK": logits.BLOCK}
                source = ASTSource(fn=function, signature=signature, constexprs=constants)
                assert ".entry" in compile(source, target=GPUTarget("cuda", target, 32)).asm["ptx"]
print("compiled")
"""


def run(code: str, **environment: str) -> str:
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=given | environment, check=True, capture_output=True, text=True
    ).stdout


def test_decoding_is_exact() -> None:
    assert "exact" in run(DECODE, TRITON_INTERPRET="1")


def test_logits_are_scored_and_differentiated_as_by_torch() -> None:
    assert "close" in run(LOGITS, TRITON_INTERPRET="1")


def test_every_kernel_compiles_and_decoding_fuses_no_sums() -> None:
    assert "compiled" in run(COMPILE)
