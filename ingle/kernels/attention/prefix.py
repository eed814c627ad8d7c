"""Keys and values that all tokens see besides those of their documents, as prefix tuning trains them.

The softmax over two sets of keys is the sum of the softmax over each, weighed by the sums of their exponentials. So the
added keys are shared by all documents, and attention itself stays as it is.

Legend: N packed tokens, P added keys, Hq query heads, Hkv key/value heads, Dh head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_keys(
    out: Tensor,
    lse_NH: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Returns attention over more keys, exactly, given its result over the others.

    Args:
        out: [1, N, Hq, Dv]; the result of :func:`ingle.kernels.attention.packed.packed_attention`.
        lse_NH: Its log-sum-exp, [N, Hq].
        q: [1, Hq, N, Dh]; the queries.
        keys: [Hkv, P, Dh]; the added keys.
        values: [Hkv, P, Dv].
        scale: Factor on the scores; this and the next argument are those of ``packed_attention``.
        softcap: Bound on the scores.
        hidden: [N, P]; true where a token does not see a key; None if it sees all.

    Returns:
        [1, N, Hq, Dv].
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_KGND = q[0].unflatten(0, (len(keys), -1)).to(dtype)
    scores = q_KGND @ keys.to(dtype).transpose(-1, -2)[:, None]
    scores = scores * scale if softcap is None else torch.tanh(scores * (scale / softcap)) * softcap
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
    lse_KGN = lse_NH.to(dtype).t().unflatten(0, (len(keys), -1))
    whole_KGN = torch.logaddexp(lse_KGN, scores.logsumexp(-1))
    added_KGND = (scores - whole_KGN[..., None]).exp() @ values.to(dtype)[:, None]
    share_NH1 = (lse_KGN - whole_KGN).exp().flatten(0, 1).t()[..., None]
    total: Tensor = out * share_NH1 + added_KGND.flatten(0, 1).transpose(0, 1)
    return total.to(out.dtype)
