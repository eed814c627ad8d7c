"""Runs a model with a task head over packed documents.

The architecture's own head runs, with all that it does before its output layer: pooling, dropout, activations. The base
below it computes all documents packed. A head that reads single tokens gets the packed row; one that reads documents
gets them as the rows of batches of similar lengths: a copy of the hidden states, and no other computation, is padded.
Architectures that cannot be packed see documents as rows from the start.

Legend: D documents, L length of the longest, N tokens of all, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.kernels.attention.trees import Trees
from ingle.models.forward.documents import Documents, Group
from ingle.models.forward.hidden_states import call_packed, shares_prompts
from ingle.models.forward.layout import layout_of, padding_of
from ingle.models.forward.mixers import base_of, original_class, parameters
from ingle.models.forward.to_head import taken
from ingle.models.forward.virtual_tokens import extend_batch
from ingle.models.kinds import kind_of, task_of
from ingle.models.text_part import padding_id, text_config
from ingle.parallel import is_unit

if TYPE_CHECKING:
    from ingle.data.batch import Batch

#: Padded places per token in the rows of a head, which cost memory and hardly any time.
_PADDING = 1.0


def find_heads(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns the paths of the modules of a task model that a pretrained model has no weights for.

    These are all modules with weights outside of the base, and the base's pooler, which masked language models lack.
    """
    heads = {id(child) for child in model.children() if not isinstance(child, PreTrainedModel | nn.Embedding)}
    base = base_of(model)
    if base is not model:
        heads.add(id(getattr(base, "pooler", None)))
    return tuple(
        name for name, module in model.named_modules() if id(module) in heads and any(True for _ in module.parameters())
    )


def forward_task(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the outputs of a task head.

    Args:
        model: A model from :func:`ingle.models.meta_model` for the task, with weights.
        batch: Documents packed in a single row.

    Returns:
        Classification: ``[D, C]`` for the documents that :func:`~ingle.data.round_up` did not add, or for the first
        one if there is no other. Token classification: ``[1, N, C]``. Question answering: ``[1, N, 2]``, the scores of
        the first and of the last token. In trees, the outputs of documents that others continue mean nothing. Virtual
        tokens come before every document; a head that reads the first token of a text reads the first of them.
    """
    extended, place_N = extend_batch(model, batch)
    outputs = compute_task(model, extended)
    return outputs if place_N is None or task_of(model).kind == "classify" else outputs.index_select(1, place_N)


def compute_task(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Computes :func:`forward_task` for a batch that has the virtual tokens of an adapter."""
    trees = _trees(batch, _own_bounds(batch))
    if trees is not None and not shares_prompts(model, trees):
        return _forward_paths(model, batch, trees)
    layout = layout_of(model)
    if layout.kind in ("rows", "equal_rows"):
        return _forward_rows(model, batch)
    if task_of(model).kind == "classify":
        return _classify_packed(model, batch)
    with _computing(base_of(model), lambda compute: _run_packed(model, batch, compute)):
        return _outputs(model, {"input_ids": batch.input_ids})


def _classify_packed(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Computes the base packed and once, and the head on rows of similar lengths."""
    base = base_of(model)
    # Ranks gather weights together, so all must make as many calls.
    padding = float("inf") if any(map(is_unit, model.modules())) else _PADDING
    bounds = _own_bounds(batch)
    trees = _trees(batch, bounds)
    # A head may read any token of a text, so in trees it gets the paths.
    documents = (
        Documents.of(bounds, padding=padding)
        if trees is None
        else Documents.of_trees(trees, bounds.device, padding=padding)
    )
    computed: list[tuple[Any, Tensor]] = []

    def outputs(group: Group) -> Tensor:
        def compute_rows(compute: Callable[..., Any]) -> Any:
            if not computed:
                output = _run_packed(model, batch, compute)
                computed.append((output, output.last_hidden_state[0]))
            ((output, hidden_NH),) = computed
            output.last_hidden_state = group.deal(hidden_NH)
            if getattr(output, "pooler_output", None) is not None:
                output.pooler_output = _pool(base, output.last_hidden_state)
            return output

        with _computing(base, compute_rows):
            return _outputs(model, _row_arguments(model, batch, group))

    outputs_DC = _in_order([outputs(group) for group in documents.groups], documents)
    return outputs_DC if trees is None else _of_leaves(outputs_DC, trees)


def _of_leaves(outputs_PC: Tensor, trees: Trees) -> Tensor:
    """Returns the outputs of paths as those of their last documents; zero for the others, ``[D, C]``."""
    leaves_P = trees.paths.leaves_P.to(outputs_PC.device)
    return outputs_PC.new_zeros(len(trees.parents), outputs_PC.shape[1]).index_copy(0, leaves_P, outputs_PC)


def _forward_paths(model: PreTrainedModel, batch: Batch, trees: Trees) -> Tensor:
    """Computes each path of trees as a document of its own."""
    paths = trees.paths.to(batch.input_ids.device)
    names = ("input_ids", "labels", "position_ids", "token_type_ids")
    columns = {name: batch.columns[name][:, paths.index_M] for name in names if name in batch.columns}
    columns["cu_seqlens"] = paths.cu_seqlens
    counts = {"num_tokens": len(paths.index_M), "num_documents": len(paths.leaves_P), "num_supervised": 0}
    outputs = compute_task(model, replace(batch, columns=columns, **counts))
    if task_of(model).kind == "classify":
        return _of_leaves(outputs, trees)
    collected = outputs.index_select(1, paths.place_N)
    return nn.functional.pad(collected, (0, 0, 0, batch.input_ids.shape[1] - collected.shape[1]))


def _trees(batch: Batch, bounds: Tensor) -> Trees | None:
    parents = batch.parents()
    return None if parents is None else Trees.of(bounds.tolist(), parents[: len(bounds) - 1])


def _own_bounds(batch: Batch) -> Tensor:
    """Returns the bounds of the documents that have labels, or of the first one if there is no other."""
    return batch.cu_seqlens[: max(1, batch.num_documents) + 1]


def _in_order(parts: list[Tensor], documents: Documents) -> Tensor:
    """Returns the outputs ``[D, C]`` of the groups in the order of the documents."""
    last_D = torch.cat([group.index_DL[:, -1] for group in documents.groups])  # padding repeats the last token
    return torch.cat(parts)[last_D.argsort()]


def _run_packed(model: PreTrainedModel, batch: Batch, compute: Callable[..., Any]) -> Any:
    """Returns what the base returns for the packed row."""

    def run(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
        return compute(**taken(base_of(model), arguments))

    types = batch.columns.get("token_type_ids")
    trees = _trees(batch, batch.cu_seqlens)
    return call_packed(model, batch.input_ids, batch.position_ids, batch.cu_seqlens, run, types, trees)


def _pool(base: nn.Module, rows_DLH: Tensor) -> Tensor:
    """Returns what the pooler of the base makes of each document."""
    pooler: Any = base.pooler
    pooled: Tensor
    if isinstance(pooler, nn.Linear):  # ALBERT and BigBird store its activation in the base model
        activation: Any = base.pooler_activation if hasattr(base, "pooler_activation") else base.activation
        pooled = activation(pooler(rows_DLH[:, 0]))
    else:
        pooled = pooler(rows_DLH)
    return pooled


@contextmanager
def _computing(module: nn.Module, function: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """Lets a function compute what a module returns inside the block; it gets the module's own ``forward``."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(own)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _forward_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Computes each document in a row of its own, with the architecture's own mask and positions."""
    by_document = task_of(model).kind == "classify"
    # Not the document that fills the row, which may be too short for a model.
    documents = Documents.of(_own_bounds(batch), padding=padding_of(model))
    parts = [_outputs(model, _row_arguments(model, batch, group)) for group in documents.groups]
    if by_document:
        return _in_order(parts, documents)
    logits_MC = documents.collect(parts)
    return nn.functional.pad(logits_MC, (0, 0, 0, batch.input_ids.shape[1] - len(logits_MC)))[None]


def _row_arguments(model: PreTrainedModel, batch: Batch, group: Group) -> dict[str, Any]:
    """Returns the arguments of a model that sees documents as rows."""
    config = text_config(model.config)
    fill = padding_id(config)
    ids_DL = group.deal(batch.input_ids[0])
    if kind_of(model.config) == "encoder_decoder" and batch.num_documents == 0:
        # They are read at the token that ends the text, which the start of a text lacks.
        ids_DL = torch.full_like(ids_DL, config.eos_token_id)
    arguments = {"input_ids": ids_DL.masked_fill(~group.real_DL, fill), "attention_mask": group.real_DL.long()}
    if "token_type_ids" in batch.columns:
        arguments["token_type_ids"] = group.deal(batch.columns["token_type_ids"][0]) * group.real_DL
    return arguments


def forward_alone(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Returns the outputs for a batch of documents of one length, ``[B, T]``, as the architecture computes them."""
    return _outputs(model, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})


def _outputs(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor:
    if "use_cache" in parameters(original_class(model)):  # a decoder would keep its keys and values
        arguments = {**arguments, "use_cache": False}
    output = model(**taken(model, arguments))
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    logits: Tensor = output.logits
    return logits
