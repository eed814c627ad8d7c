"""Runs tests as on a processor with AVX2 and nothing beyond: ``python -m tests.avx2 [words for pytest]``.

Each library that chooses its code by the processor gets a setting that limits the choice: torch, oneDNN, MKL, numpy,
OpenBLAS and numba.  ``NUMBA_CPU_NAME`` alone would leave AVX-512 in the kernels, because numba adds the features that
it finds.
Kernels for both processors are kept in one cache, so a second run compiles nothing.
"""

from __future__ import annotations

import os
import platform
import sys

import pytest

#: What an Intel Haswell has (LLVM's names), and AMD's processors from Zen on.
FEATURES = ("sse4.2", "ssse3", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in FEATURES),
}
#: Beginnings of torch's names of what such a processor lacks.
LACKS = ("avx512", "avx10", "avx_vnni", "avx_ne", "amx")


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin, in every worker: what Ingle asks torch about the processor gets the same answer."""
    import torch

    found = torch.cpu.get_capabilities()
    reduced = {name: False if name.startswith(LACKS) else value for name, value in found.items()}
    torch.cpu.get_capabilities = lambda: dict(reduced)
    assert torch.backends.cpu.get_cpu_capability() == "AVX2", "torch was loaded before it was told"


def _dispatched_by_numpy() -> str:
    """The groups of instructions beyond AVX2 for which numpy has code, and this processor too."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    groups = (name for name in __cpu_dispatch__ if name == "X86_V4" or name.startswith("AVX512"))
    return " ".join(name for name in groups if __cpu_features__[name])


def main() -> None:
    """Replaces this process by pytest."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        sys.exit("Only a processor of the x86-64 family can pretend to have AVX2 and nothing beyond.")
    environment = os.environ | ENVIRONMENT | {"NPY_DISABLE_CPU_FEATURES": _dispatched_by_numpy()}
    os.execve(sys.executable, [sys.executable, "-m", "pytest", "-p", "tests.avx2", *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
