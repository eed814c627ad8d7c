"""Runs a model with a task head over packed documents.

The architecture's own head runs, with all that it does before its output layer: pooling, dropout, activations. It sees
documents as the rows of a batch, those of equal length together, so that nothing is padded.

Legend: D documents, T tokens of one, N tokens of all, C outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.parallel import is_sharded

if TYPE_CHECKING:
    from ingle.data.batch import Batch


def forward_task(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the outputs of a task head.

    Args:
        model: A model with a head for classification, token classification or question answering.
        batch: Documents packed in a single row.

    Returns:
        Classification: ``[D, C]``. Token classification: ``[1, N, C]``. Question answering: ``[1, N, 2]``, the scores
        of the first and of the last token.

    Raises:
        ModelError: The model is sharded; ranks would make different numbers of calls.
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} calls its head for each length of a document, so it cannot be sharded.",
            where="parallel.kind",
            fix="--parallel.kind=ddp",
        )
    lengths_D = batch.cu_seqlens.diff().long()
    outputs: list[Tensor] = []
    places: list[Tensor] = []
    by_document = True
    for length in lengths_D.unique().tolist():
        documents_R = torch.nonzero(lengths_D == length)[:, 0]
        places_RT = batch.cu_seqlens[:-1].long()[documents_R, None] + torch.arange(length, device=lengths_D.device)
        rows = _outputs(model, _arguments(batch, places_RT))
        by_document = rows.dim() == 2
        outputs.append(rows if by_document else rows.flatten(0, 1))
        places.append(documents_R if by_document else places_RT.flatten())
    packed = torch.cat(outputs)[torch.cat(places).argsort()]
    return packed if by_document else packed[None]


def _arguments(batch: Batch, places_RT: Tensor) -> dict[str, Any]:
    columns = {name: batch.columns[name][0] for name in ("input_ids", "token_type_ids") if name in batch.columns}
    return {name: column_N[places_RT] for name, column_N in columns.items()}


def _outputs(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor:
    output = model(**arguments)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    logits: Tensor = output.logits
    return logits
