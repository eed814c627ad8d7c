"""How packed documents go through an architecture.

Each layout is exact; the first that an architecture supports is the fastest:

- ``packed``: all documents in one row; attention gets their boundaries.
- ``documents``: the same, but some modules are dealt (:mod:`ingle.models.forward.dealt`).
- ``rows``: one document per row, padded, with the architecture's own masks.
- ``equal_rows``: the same without padding, in a call for each length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from ingle.errors import ModelError
from ingle.models.forward.attention import IMPLEMENTATION
from ingle.models.forward.dealt import deal_module
from ingle.models.forward.documents import Boundaries
from ingle.models.forward.isolation import isolate
from ingle.models.forward.mixers import find_mixers, original_class, source
from ingle.models.forward.relative_bias import use_distances
from ingle.models.forward.row_masks import MaskForm
from ingle.models.kinds import kind_of
from ingle.models.text_part import for_text_part, text_config
from ingle.parallel import is_unit
from ingle.planning.layouts import PADDING, describe_layout

#: A call of a layer that runs none of its hooks, as SqueezeBERT's.
_PASSED_HOOKS = re.compile(r"\b(layer|block)(_module)?\.forward\(")

LayoutKind = Literal["packed", "documents", "rows", "equal_rows"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How packed documents go through a model.

    Attributes:
        kind: See the module's description.
        deals_attention: Whether all attention is dealt, also that which could use boundaries.
        mask_form: The mask that dealt attention gets.
        takes_bounds: Whether the model gets boundaries as its attention mask; if not, it gets no mask.
        described: Whether the architecture's own mask function says which tokens of a document a token sees.
        equal: Whether only documents of equal length are dealt together.
        first_position: The position of a document's first token.
        passes_types: Whether the model gets token types; its own are only as many as its longest text has tokens.
        has_layers_before_head: Whether there are layers between the base model and the output layer, as in RoBERTa.
        added_bias: Name of a bias that the architecture adds after its output layer; empty if there is none.
        read: Linear layers whose owner reads their weight instead of calling them, with ``*`` for every index.
        dealt: Classes of the modules that are dealt.
        continued: Classes of dealt modules that compute answers from the state that their prompt leaves.
        chunk: Tokens that a recurrence computes at least; decides whether continuing pays.
        has_distances: Whether attention gets relative position biases by distance.
        caches: Whether texts grow with a cache as they do without one; if not, each token costs a pass over its text.
        pads_from: Tokens that a prompt needs to be padded to the length of others; None pads no prompt.
        tried: Whether a small copy of the model was exact with it.
        slower_because: Why no faster layout is used, or why none could be tried; empty for the fastest.
    """

    kind: LayoutKind = "packed"
    deals_attention: bool = False
    mask_form: MaskForm = "additive"
    takes_bounds: bool = True
    described: bool = False
    equal: bool = False
    first_position: int = 0
    passes_types: bool = False
    has_layers_before_head: bool = False
    added_bias: str = ""
    read: frozenset[str] = frozenset()
    dealt: tuple[str, ...] = ()
    continued: tuple[str, ...] = ()
    chunk: int = 64
    has_distances: bool = False
    caches: bool = True
    pads_from: int | None = 0
    tried: bool = True
    slower_because: str = ""

    @property
    def computes_trees(self) -> bool:
        """Whether a prompt may be computed once for several answers; else it is repeated for each of them."""
        if self.kind == "packed":
            return self.takes_bounds
        # Dealt modules repeat prompts or continue from their states; other attention needs boundaries.
        return self.kind == "documents" and (self.takes_bounds or self.deals_attention)


class ReadLinear(nn.Linear):
    """A linear layer whose owner reads its weight, so that it can be neither quantized nor adapted."""

    def forward(self, input: Tensor) -> Tensor:
        """Computes what ``nn.Linear`` does; layers with a ``forward`` of their own are not replaced."""
        return super().forward(input)


def pattern_of(name: str) -> str:
    """Returns the name of a module with ``*`` for every index."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def layout_of(model: PreTrainedModel) -> Layout:
    """Returns the layout of a model."""
    found: Layout = getattr(model, "packed_layout", Layout())
    return found


@contextmanager
def continuing_short_texts(model: PreTrainedModel) -> Iterator[None]:
    """Lets recurrent modules continue from the states of prompts inside the block, however short the texts are."""
    stored: Any = model
    layout = layout_of(model)
    stored.packed_layout = replace(layout, chunk=1)
    try:
        yield
    finally:
        stored.packed_layout = layout


def layout_note(model: PreTrainedModel) -> str | None:
    """Returns a sentence on what the layout of a model computes in vain, and why; None if nothing is padded."""
    layout = layout_of(model)
    return describe_layout(
        model.config.model_type, layout.kind, layout.dealt, because=layout.slower_because, tried=layout.tried
    )


def require_shardable(model: PreTrainedModel) -> None:
    """Makes sure that ranks can gather the weights of a model together, before it is sharded.

    Raises:
        ModelError: Ranks would call the model different numbers of times, or no hook sees its layers.
    """
    why = None
    if layout_of(model).kind == "equal_rows":
        why = "it needs a call for each length of a document"
    elif any(_PASSED_HOOKS.search(source(original_class(module))) for module in model.modules()):
        why = "it calls the forward method of its layers directly, without their hooks"
    if why is not None:
        raise ModelError(
            f"{type(model).__name__} cannot be sharded.", where="parallel.kind", why=why, fix="--parallel.kind=ddp"
        )


def padding_of(model: PreTrainedModel) -> float:
    """Returns how many padded places per token the rows of a layout of rows may have."""
    if layout_of(model).kind == "equal_rows":
        return 0.0
    # Ranks gather weights together, so all must make as many calls, also while the weights are gathered.
    return float("inf") if any(map(is_unit, model.modules())) else PADDING


def boundaries_of(model: PreTrainedModel) -> Boundaries | None:
    """Returns what holds the documents for the dealt modules of a model; None if it has none."""
    found: Boundaries | None = getattr(model, "packed_boundaries", None)
    return found


def apply_layout(model: PreTrainedModel, layout: Layout, boundaries: Boundaries | None = None) -> None:
    """Prepares a model for a layout, before adapters, quantization and sharding.

    A layout whose kind is ``packed`` becomes ``documents`` if the model has modules that must be dealt.

    Args:
        model: A new model of any device.
        layout: See :class:`Layout`.
        boundaries: A holder to share with another model.
    """
    for name, module in model.named_modules():
        if pattern_of(name) in layout.read:
            module.__class__ = ReadLinear
    isolate(model)
    stored: Any = model
    stored.packed_boundaries = boundaries or Boundaries()
    dealt = _deal(model, layout, stored.packed_boundaries) if layout.kind in ("packed", "documents") else frozenset()
    kind: LayoutKind = "documents" if dealt else layout.kind
    stored.takes_keys = _takes_keys(model, kind)
    stored.packed_layout = replace(
        layout,
        kind=kind,
        first_position=_first_position(model),
        passes_types=any(name.endswith("token_type_ids") for name, _ in model.named_buffers()),
        dealt=tuple(sorted(dealt)),
        has_distances=layout.kind in ("packed", "documents") and use_distances(model, stored.packed_boundaries),
    )


def _deal(model: PreTrainedModel, layout: Layout, boundaries: Boundaries) -> frozenset[str]:
    mixers = find_mixers(model)
    attention = {name for name, mixing in mixers.items() if mixing in ("interface", "sparse", "attention")}
    by_interface = {name for name in attention if mixers[name] == "interface"}
    if layout.deals_attention or attention > by_interface:
        by_interface = set()
    if attention and model._can_set_attn_implementation():
        # Dealt attention computes the architecture's own biases, sinks and selections of keys.
        model.set_attn_implementation(for_text_part(model.config, IMPLEMENTATION if by_interface else "eager"))
    causal = kind_of(model.config) == "causal"
    for name in mixers.keys() - by_interface:
        form: MaskForm = layout.mask_form if name in attention else "none"
        module = model.get_submodule(name)
        continues = original_class(module).__name__ in layout.continued
        deal_module(module, boundaries, form, model.config, causal=causal, continues=continues)
    return frozenset(original_class(model.get_submodule(name)).__name__ for name in mixers.keys() - by_interface)


def _takes_keys(model: PreTrainedModel, kind: LayoutKind) -> tuple[str, ...] | str:
    """Returns the paths of the attention layers, if an adapter can add keys to all of them; else why it cannot."""
    if kind_of(model.config) != "causal":
        return "it is no causal language model"
    if kind not in ("packed", "documents"):
        return "it takes documents in padded rows"
    mixers = find_mixers(model)
    other = next((name for name, mixing in mixers.items() if mixing != "interface"), None)
    if other is not None:
        return f"its {other} mixes tokens without attention, or with attention of its own"
    if text_config(model.config)._attn_implementation != IMPLEMENTATION:
        return "its attention is the architecture's own"
    if len(mixers) != getattr(text_config(model.config), "num_hidden_layers", len(mixers)):
        return "not every layer has one attention"
    return tuple(mixers)


def _first_position(model: PreTrainedModel) -> int:
    """Returns the position of a first token: RoBERTa and its kin count from the padding's index."""
    for module in model.modules():
        padding: Any = getattr(module, "padding_idx", None)
        if hasattr(type(module), "create_position_ids_from_input_ids") and isinstance(padding, int):
            return padding + 1
    return 0
