"""GGUF's block formats on the CPU, decoded by numba: which kernel decodes which format."""

from __future__ import annotations

from collections.abc import Callable

from ingle.kernels.ggml import decode_grid as ggml_decode_grid
from ingle.kernels.ggml.decode_k import decode_q2_k, decode_q3_k, decode_q4_k, decode_q5_k, decode_q6_k
from ingle.kernels.ggml.decode_legacy import decode_q4_0, decode_q4_1, decode_q5_0, decode_q5_1, decode_q8_0
from ingle.kernels.ggml.decode_levels import decode_iq4_nl, decode_iq4_xs, decode_mxfp4, decode_nvfp4
from ingle.kernels.ggml.decode_ternary import decode_tq1_0, decode_tq2_0

#: The kernels under the names of their formats.
KERNELS: dict[str, Callable[..., None]] = {
    "q4_0": decode_q4_0,
    "q4_1": decode_q4_1,
    "q5_0": decode_q5_0,
    "q5_1": decode_q5_1,
    "q8_0": decode_q8_0,
    "q4_k": decode_q4_k,
    "q6_k": decode_q6_k,
    "q5_k": decode_q5_k,
    "q3_k": decode_q3_k,
    "q2_k": decode_q2_k,
    "iq4_nl": decode_iq4_nl,
    "iq4_xs": decode_iq4_xs,
    "tq1_0": decode_tq1_0,
    "tq2_0": decode_tq2_0,
    "mxfp4": decode_mxfp4,
    "nvfp4": decode_nvfp4,
    **ggml_decode_grid.KERNELS,
}
