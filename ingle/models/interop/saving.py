"""Writes models in the layout of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from ingle.atomic import atomic_folder, disk_full_explained, scratch_folder
from ingle.config.model import ModelConfig
from ingle.models.generation.stop_criteria import end_token_ids
from ingle.models.interop.towers import add_towers
from ingle.models.text_part import is_wrapper, wrapper_class
from ingle.parallel import Mesh, complete_parameters
from ingle.quant.linear import QuantModule

#: Small enough for file systems and uploads, large enough that most models need few shards.
_SHARD_SIZE = "4GB"


def save_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, source: ModelConfig | None = None
) -> None:
    """Writes weights, config, generation config, tokenizer and chat template, atomically.

    The names in the files are the hub's (transformers' conversions are reverted); tied weights are written once. The
    towers of a multimodal model are copied from the checkpoint that it was loaded from.

    Args:
        model: A model without quantized weights and adapters.
        tokenizer: Its tokenizer.
        folder: Replaced if it exists.
        source: The config section of the model; required for a multimodal one.

    Raises:
        CheckpointError: The disk is full.
    """
    has_towers = is_wrapper(model.config)
    assert source is not None or not has_towers, "the towers of a multimodal model come from its checkpoint"
    assert not any(isinstance(module, QuantModule) for module in model.modules()), "quantized weights cannot be saved"
    with atomic_folder(folder) as partial, quiet():
        if has_towers and source is not None and source.init == "random":
            model = _with_random_towers(model)
        model.save_pretrained(partial, max_shard_size=_SHARD_SIZE)
        tokenizer.save_pretrained(partial)
        if has_towers and source is not None and source.init != "random":
            add_towers(source, model.config, partial)


def save_sharded(
    model: PreTrainedModel,
    whole: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    mesh: Mesh,
    *,
    source: ModelConfig | None = None,
    finish: Callable[[PreTrainedModel], None] = lambda model: None,
) -> None:
    """Writes a model whose weights are sharded over ranks; the files are those of :func:`save_pretrained`.

    The ranks gather one unit at a time. Rank 0 puts its weights into files next to ``folder`` and maps these into
    memory, so that no rank ever holds the complete model. Needs twice the disk space of the model.

    Args:
        model: The sharded model. All ranks call this together.
        whole: The same model on the meta device, not sharded; rank 0 gives it the weights.
        tokenizer: Its tokenizer.
        folder: Replaced if it exists.
        mesh: The ranks.
        source: As in :func:`save_pretrained`.
        finish: Called on rank 0 with the complete model before it is written.

    Raises:
        CheckpointError: The disk is full.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    aliases = {first: tied for first, *tied in names.values()}
    with mesh.together(), ExitStack() as stack:
        scratch = None
        if mesh.is_main:
            stack.enter_context(disk_full_explained(folder))
            scratch = stack.enter_context(scratch_folder(folder.parent, "weights.partial-"))
        failure: OSError | None = None
        for number, (name, value) in enumerate(complete_parameters(model)):
            if scratch is None or name not in aliases or failure is not None:
                continue  # but keep gathering
            try:
                mapped = nn.Parameter(_map(value, scratch / str(number)), requires_grad=False)
            except OSError as error:
                failure = error
                continue
            for alias in (name, *aliases[name]):
                path, _, leaf = alias.rpartition(".")
                whole.get_submodule(path)._parameters[leaf] = mapped
        if failure is not None:
            raise failure
        if mesh.is_main:
            for name, buffer in model.named_buffers():
                path, _, leaf = name.rpartition(".")
                whole.get_submodule(path)._buffers[leaf] = buffer
            finish(whole)
            save_pretrained(whole, tokenizer, folder, source)


def _with_random_towers(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the multimodal model with the weights of a text part that was trained from random weights."""
    kind: Any = wrapper_class(model.config)
    whole: PreTrainedModel = kind._from_config(deepcopy(model.config), dtype=model.dtype)
    whole.load_state_dict(model.state_dict(), strict=False)
    whole.generation_config = model.generation_config
    return whole


def _map(value: Tensor, path: Path) -> Tensor:
    """Writes a tensor to a file and returns it as memory that is mapped to the file."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, value.nbytes))  # a full disk is an error here, and a crash later
    mapped = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
    return mapped.view(value.shape).copy_(value)


def save_setup(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    untied: bool = False,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes everything except the weights: config, generation config, tokenizer and chat template.

    Args:
        model: May be on the meta device.
        tokenizer: Its tokenizer.
        folder: An existing folder.
        dtype: Dtype of the weights in the files.
        untied: Whether the output head has its own weight in the files.
        quantization: The ``quantization_config`` of quantized weights.
    """
    config = deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if untied:
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if quantization is not None:
        path = folder / "config.json"
        written = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": dict(quantization)}
        path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if model.can_generate():
        settings = deepcopy(model.generation_config)
        ends = sorted(end_token_ids(model, cast(PreTrainedTokenizerFast, tokenizer)))
        settings.eos_token_id = ends if len(ends) != 1 else ends[0]
        settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' progress bars; Ingle reports progress as events."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
