"""GGUF's block formats to float tensors and back, by the CPU's kernels; elsewhere plain torch has to decode.

Under ``torch.compile`` decoding is one opaque operator, so a graph holds packed weights and nothing decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensor

from ingle.kernels.threads import match_threads

#: Integer types that hold the bits of a float type, which numba lacks or does not need.
BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}
#: Weights encoded at once: bounds the float32 copy of a weight that is held in another type.
COPIED = 1 << 22


def has_kernel(data: Tensor, dtype: torch.dtype) -> bool:
    """Whether blocks beside this tensor can be decoded to ``dtype`` by a kernel; else the reference must do."""
    if isinstance(data, FakeTensor) and not torch.compiler.is_compiling():
        return False
    return data.device.type == "cpu" and dtype in BITS


def decode_blocks(name: str, data: Tensor, out: Tensor) -> Tensor:
    """Decodes the blocks of the format ``name``.

    Args:
        name: As ``base.format`` calls it.
        data: uint8 ``[O, row bytes]``.
        out: Contiguous ``[O, I]``, bfloat16 or float32, written.

    Returns:
        ``out``.
    """
    if torch.compiler.is_compiling():
        torch.ops.ingle.decode_blocks(name, data, out)
    else:
        _decode_blocks(name, data, out)
    return out


def _decode_blocks(name: str, data: Tensor, out: Tensor) -> None:
    from ingle.kernels.ggml import decoders as ggml_decode  # two dozen kernels, which most runs do without

    packed, bits = data.detach().contiguous().view(-1).numpy(), out.detach().view(BITS[out.dtype]).view(-1).numpy()
    ggml_decode.KERNELS[name](packed, bits, match_threads(out.numel()))


# A fake decode has nothing to return.
library.custom_op("ingle::decode_blocks", _decode_blocks, mutates_args=("out",)).register_fake(lambda *_: None)


def encode_blocks(name: str, weight_OI: Tensor, importance_I: Tensor | None, data: Tensor) -> tuple[float, float]:
    """Packs a weight into the blocks of the format ``name``, part by part.

    Nothing is packed from the first part on that holds NaN or infinity.

    Args:
        name: As ``base.format`` calls it.
        weight_OI: Floating, of any strides, on any device; rows of whole blocks.
        importance_I: How much the error of every column counts, or None.
        data: uint8 ``[O, row bytes]`` on the CPU, written.

    Returns:
        The lowest and the highest weight; not finite where one of them is not.
    """
    from ingle.kernels.ggml import encoders as ggml_encode

    importance = torch.empty(0) if importance_I is None else importance_I.detach().cpu().float().contiguous()
    num_rows, num_columns = weight_OI.shape
    count = max(1, COPIED // max(1, num_columns))
    lowest, highest = 0.0, 0.0
    for start in range(0, num_rows, count):
        part = weight_OI[start : start + count].detach().to("cpu", torch.float32).contiguous()
        low, high = (float(bound) for bound in part.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            return low, high
        lowest, highest = min(lowest, low), max(highest, high)
        arrays = part.view(-1).numpy(), importance.numpy(), data[start : start + count].view(-1).numpy()
        ggml_encode.KERNELS[name](*arrays, match_threads(part.numel()))
    return lowest, highest
