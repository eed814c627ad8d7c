"""Modules that get the documents of a packed row as rows of batches, under their own names.

A dealt module is the architecture's own module with another class: a subclass of its own class. So the names of its
parameters, its attributes and ``isinstance`` checks stay as they are, and adapters, quantization and sharding work on
it as on any other module. FSDP changes classes in the same way, so deal modules before they are sharded.

Legend: as in :mod:`ingle.models.forward.documents`.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ingle.models.forward.continued import cache_argument, run_steps
from ingle.models.forward.documents import Boundaries, Documents, Group
from ingle.models.forward.mixers import CACHES, MASKS, Class, original_class
from ingle.models.forward.row_masks import MaskForm, row_mask

#: Boundaries of packed documents under transformers' names.
_BOUNDARIES = re.compile(r"^(cu_seq_?lens.*|max_length_[qk]|max_seqlen.*|seq_idx|seq_lens)$")


class Evaluating(nn.Module):
    """Goes before the class of a module: it always computes as in evaluation."""

    original: Class

    @property
    def training(self) -> bool:
        """False, whatever mode is set; the children have their own."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        """Ignored."""


class Dealt(Evaluating):
    """Goes before the class of a module: ``forward`` runs once for each group of documents.

    Fused kernels for training read weights of layers directly, without their adapters, so the module evaluates.

    Without documents, as in generation, the module computes as usual. What the architecture returns for each token is
    collected; other results, such as attention weights, are those of the first group.
    """

    _boundaries: Boundaries
    _mask_form: MaskForm
    _mask_config: PretrainedConfig
    _is_causal: bool
    _continues: bool

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled again for each set of lengths
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Computes each document alone; takes and returns what the original module does."""
        documents = self._boundaries.current
        if documents is None:
            return super().forward(*args, **kwargs)
        names = argument_names(self.original)
        dtype = next((each.dtype for each in (*args, *kwargs.values()) if _is_float(each)), torch.float32)
        steps = documents.steps if self._continues else None
        if steps is not None:
            cache = cache_argument(names)
            assert cache is not None
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            named = {name: value for name, value in named.items() if not _BOUNDARIES.match(name)}

            def deal_step(name: str, value: Any, group: Group) -> Any:
                return self._deal(name, value, steps.documents, group, dtype)

            return _collect(run_steps(steps, cache, named, deal_step, super().forward), steps.documents)
        results = []
        for group in documents.groups:
            deal = functools.partial(self._deal, documents=documents, group=group, dtype=dtype)
            positional = [deal(name, value) for name, value in zip(names, args, strict=False)]
            named = {name: deal(name, value) for name, value in kwargs.items() if not _BOUNDARIES.match(name)}
            results.append(super().forward(*positional, **named))
        return _collect(results, documents)

    def _deal(self, name: str | None, value: Any, documents: Documents, group: Group, dtype: torch.dtype) -> Any:
        if name in CACHES:
            return None
        if name in MASKS:
            if "conv" in name:  # hides padding on the left
                return None
            return self._mask(value, group, dtype)
        deal = functools.partial(self._deal, documents=documents, group=group, dtype=dtype)
        if isinstance(value, dict):
            return {key: deal(key, part) for key, part in value.items()}
        is_shape = isinstance(value, tuple) and all(isinstance(size, int) for size in value)
        if is_shape and value[:2] == (1, documents.num_tokens):
            return torch.Size((*group.real_DL.shape, *value[2:]))
        if isinstance(value, tuple | list):
            return type(value)(deal(None, part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if name in ("position_ids", "cache_position") and (value.dim() == 1 or isinstance(self, nn.Embedding)):
            length = group.real_DL.shape[1]  # the model counted the tokens of the packed row
            return torch.arange(length, device=value.device).view(*[1] * (value.dim() - 1), length)
        if name == "alibi":  # [Hq, 1, N]: the bias depends on the position of the key in its document
            return value[..., : group.real_DL.shape[1]].repeat(len(group.real_DL), 1, 1)
        return _deal_tensor(value, documents.num_tokens, group)

    def _mask(self, value: Any, group: Group, dtype: torch.dtype) -> Any:
        if isinstance(value, dict):
            return {key: None if "conv" in key else self._mask(part, group, dtype) for key, part in value.items()}
        if self._mask_form == "none":
            return None  # padding is on the right, which a state never sees
        layer_idx = getattr(self, "layer_idx", None)
        return row_mask(self._mask_config, layer_idx, self._mask_form, group, dtype, causal=self._is_causal)


def deal_module(
    module: nn.Module,
    boundaries: Boundaries,
    mask_form: MaskForm,
    config: PretrainedConfig,
    *,
    causal: bool = True,
    continues: bool = False,
) -> None:
    """Deals documents to a module from now on.

    Args:
        module: A module of an architecture; keeps its name, children and parameters.
        boundaries: Holds the documents of the batch.
        mask_form: The mask that the module gets.
        config: Describes the mask, if there is one.
        causal: Whether a token sees earlier tokens only.
        continues: Whether answers continue from the state that their prompt leaves.
    """
    put_before(Dealt, module)
    own = getattr(module, "config", None)
    described = (own if isinstance(own, PretrainedConfig) else config).get_text_config()
    settings = {"_boundaries": boundaries, "_mask_form": mask_form, "_mask_config": described, "_is_causal": causal}
    module.__dict__.update(settings, _continues=continues)


def put_before(base: Class, module: nn.Module) -> None:
    """Puts a class before that of a module."""
    module.__class__ = _derived(base, original_class(module))


@functools.cache
def _derived(base: Class, cls: Class) -> type[nn.Module]:
    # One class for each, because copies of a model are compared by class.
    return type(cls.__name__, (base, cls), {"original": cls, "__doc__": cls.__doc__})


@functools.cache
def argument_names(cls: Class) -> tuple[str, ...]:
    """Returns the names of the arguments of ``forward`` in order, without ``self``."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _deal_tensor(value: Tensor, num_tokens: int, group: Group) -> Tensor:
    """Returns a tensor with one value per token as rows; any other tensor as it is."""
    shape = value.shape
    if len(shape) >= 2 and shape[:2] == (1, num_tokens):
        return group.deal(value[0])
    if len(shape) >= 3 and shape[0] == 1 and shape[2] == num_tokens:  # [1, Hq, N, Dh]
        return group.deal(value[0].transpose(0, 1)).transpose(1, 2)
    if len(shape) == 3 and shape[:2] == (num_tokens, 1):  # tokens first
        return group.deal(value[:, 0]).transpose(0, 1)
    if len(shape) >= 2 and shape[0] == num_tokens > 1:
        return group.deal(value)
    return value


def _collect(results: list[Any], documents: Documents) -> Any:
    first = results[0]
    if isinstance(first, tuple | list):
        return type(first)(_collect(list(parts), documents) for parts in zip(*results, strict=True))
    if not isinstance(first, Tensor):
        return first
    shape = documents.groups[0].real_DL.shape
    by_row = all(part.shape[:2] == group.real_DL.shape for part, group in zip(results, documents.groups, strict=True))
    if by_row and first.dim() > 2:
        return documents.collect(results)[None]
    # Positions may be the same for all rows: [L, H] or [1, L, H].
    alike = (first.dim() == 2 and first.shape[0] == shape[1]) or (first.dim() == 3 and first.shape[:2] == (1, shape[1]))
    if alike:
        rows = [
            (part if part.dim() == 3 else part[None]).expand(len(group.real_DL), -1, -1)
            for part, group in zip(results, documents.groups, strict=True)
        ]
        collected = documents.collect(rows)
        return collected if first.dim() == 2 else collected[None]
    return first
