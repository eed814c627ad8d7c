"""Packing weights into GGUF's block formats on the CPU: which kernel packs which format."""

from __future__ import annotations

from collections.abc import Callable

from ingle.kernels.ggml.encode_k import encode_q2_k, encode_q4_k, encode_q5_k
from ingle.kernels.ggml.encode_k_symmetric import encode_q3_k, encode_q6_k
from ingle.kernels.ggml.encode_legacy import encode_q4_0, encode_q4_1, encode_q5_0, encode_q5_1, encode_q8_0
from ingle.kernels.ggml.encode_levels import encode_iq4_nl, encode_iq4_xs
from ingle.kernels.ggml.encode_ternary import encode_tq1_0, encode_tq2_0

#: The kernels under the names of their formats.
KERNELS: dict[str, Callable[..., None]] = {
    "q4_0": encode_q4_0,
    "q4_1": encode_q4_1,
    "q5_0": encode_q5_0,
    "q5_1": encode_q5_1,
    "q8_0": encode_q8_0,
    "q4_k": encode_q4_k,
    "q6_k": encode_q6_k,
    "q5_k": encode_q5_k,
    "q3_k": encode_q3_k,
    "q2_k": encode_q2_k,
    "iq4_nl": encode_iq4_nl,
    "iq4_xs": encode_iq4_xs,
    "tq1_0": encode_tq1_0,
    "tq2_0": encode_tq2_0,
}
