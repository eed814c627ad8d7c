"""Kernels of formats with levels: look-up in all its implementations, rounding, and the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite import binding, ir
from numba import njit

from ingle.kernels.levels.dispatch import encode_levels, has_kernel, search_bounds
from ingle.kernels.numba import nibble_lookup as look_up
from ingle.kernels.numba.vector import Vector
from ingle.kernels.threads import match_threads, set_threads
from ingle.quant.levels import Fp4, Levels, Nf4, dynamic_map

CPU = torch.device("cpu")
LEVELS = Nf4().levels(CPU).numpy()
#: Scales at both ends of float32 and around what bfloat16 can hold.
SCALES = np.array([0, 1, 0.0317, 1e-45, 1e-38, 1.2e-38, 3.39e38, 3.4e38, -0.5, 2**-126], dtype=np.float32)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("bits", "dtype"), [(np.uint16, torch.bfloat16), (np.uint32, torch.float32)])
def test_every_look_up_rounds_as_torch(wide: bool, bits: Any, dtype: torch.dtype) -> None:
    count = look_up.WIDE if wide else look_up.UNIT
    ways = [look_up.look_up_portable_wide, look_up.look_up_wide] if wide else [look_up.look_up_portable]
    if (shuffle := look_up.find_shuffle()) is not None:
        ways.append(look_up.make_look_up(shuffle, count))
    codes = np.arange(256, dtype=np.uint8)
    numbers = torch.from_numpy(codes)
    code = torch.stack((numbers >> 4, numbers & 15), dim=1).flatten().int()
    for way in ways:

        @njit
        def decode(codes: Any, levels: Any, scale: Any, out: Any, way: Any = way, count: int = count) -> None:
            for to in range(0, out.size, count):
                way(codes, to // 2, levels, scale, out, to)

        for scale in SCALES:
            out = np.zeros(512, dtype=bits)
            decode(codes, LEVELS, scale, out)
            expected = (torch.from_numpy(LEVELS)[code] * torch.tensor(scale)).to(dtype)
            signed = {np.uint16: torch.int16, np.uint32: torch.int32}[bits]
            decoded = torch.from_numpy(out).view(signed)
            assert torch.equal(decoded, expected.view(signed)), scale  # bit for bit, including the sign of zero


def test_the_shuffle_follows_the_processor_that_numba_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    assert look_up.find_shuffle() in {"llvm.x86.ssse3.pshuf.b.128", "llvm.aarch64.neon.tbl1.v16i8", None}
    monkeypatch.setattr(numba.config, "CPU_NAME", "generic")
    monkeypatch.setattr(numba.config, "CPU_FEATURES", None)
    assert look_up.find_shuffle() is None
    assert not look_up.has_permute()
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "+avx2,+ssse3,+neon")
    assert look_up.find_shuffle() is not None
    assert not look_up.has_permute()


def test_look_up_compiles_for_arm() -> None:
    module = ir.Module()
    floats, raw = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(8), 8)
    place = ir.PointerType(ir.VectorType(ir.IntType(8), 32))
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [floats, raw, place]), "look_up")
    builder = ir.IRBuilder(function.append_basic_block())
    products, codes = (Vector(builder, argument) for argument in function.args[:2])
    shuffle = "llvm.aarch64.neon.tbl1.v16i8"
    builder.store(look_up.pick(products, codes, shuffle, narrow=True).value, function.args[2])
    builder.ret_void()
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(opt=3)
    assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
    assert assembly.count("tbl") == 2


def test_every_finite_float_rounds_to_bfloat16_as_in_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2**31, (1 << 16,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0x3F80_8000, 0x3F80_8000 + (1 << 24), 1 << 16, dtype=torch.int32)  # halfway, both ways
    values = torch.cat([bits, ties]).view(torch.float32)
    values = values[values.isfinite()].contiguous()

    @njit
    def round_all(values: Any, out: Any) -> None:
        for k in range(values.size):
            look_up.store_weight(values[k], out, k)

    out = np.zeros(values.numel(), dtype=np.uint16)
    round_all(values.numpy(), out)
    assert torch.equal(torch.from_numpy(out).view(torch.int16), values.bfloat16().view(torch.int16))


@pytest.mark.parametrize("format", [Nf4(), Fp4()], ids=str)
def test_ties_between_levels_stay_low(format: Levels) -> None:
    middles, order = format.midpoints(CPU), format.codes(CPU)
    weight = torch.cat([middles, torch.ones(1)]).repeat(4, 1)  # absmax 1: the scaled weight is the midpoint itself
    encoded = encode_levels(weight, middles, order, 32)
    assert encoded is not None
    codes = torch.stack((encoded[0] >> 4, encoded[0] & 15), dim=-1).flatten(1)
    assert torch.equal(codes, order.repeat(4, 1))
    levels = format.levels(CPU)[order.int()]
    assert torch.equal(levels, levels.sort().values)


def test_search_counts_bounds_strictly_below() -> None:
    table = dynamic_map(CPU)
    bounds = (table[:-1] + table[1:]) / 2
    values = torch.cat([bounds, table, torch.linspace(-1, 1, 1001), torch.tensor([-2.0, 2.0])])
    codes = search_bounds(values, bounds)
    assert codes is not None
    assert torch.equal(codes.int(), torch.bucketize(values, bounds, out_int32=True))
    assert torch.equal(codes.int(), (bounds < values.unsqueeze(1)).sum(1).int())


def test_kernels_decline_what_they_do_not_support() -> None:
    assert not has_kernel(torch.empty(1), torch.float16)
    tables = Nf4().midpoints(CPU), Nf4().codes(CPU)
    assert encode_levels(torch.empty(2, 32, dtype=torch.int32), *tables, 32) is None
    assert encode_levels(torch.empty(2, 32, device="meta"), *tables, 32) is None


def test_threads_follow_torch() -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            set_threads(count)
            assert match_threads(1 << 20) <= count
            assert match_threads(10) == 1
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


def test_starting_numba_keeps_the_threads_of_torch() -> None:
    code = """
import torch
from ingle.quant.levels import Nf4
torch.set_num_threads(1)
format = Nf4()
format.decode(format.encode(torch.ones(2, 64)), 2, 64, torch.bfloat16)
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
