"""Arithmetic on a ``config.json``: the shape of a model without building it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ingle.config.adapter import AdapterConfig, LowRankAdapter, NoAdapter
from ingle.errors import AdapterError, ModelError
from ingle.planning.families import FAMILIES, FUSED, Block, Settings, decoder_block
from ingle.planning.selection import is_inside, matches, unread_by_peft
from ingle.planning.shape import LayerShape, LinearShape, ModelShape
from ingle.planning.stacks import STACKS
from ingle.wording import nearest

#: A function from a module's path, out_features and in_features to the bits of a weight; None for ``base.format``'s.
Bits = Callable[[str, int, int], float | None]
#: More layers than any model has; a damaged file must not fill the memory.
_MOST_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class Architecture:
    """The modules of a model, by path.

    Attributes:
        settings: The settings that describe it.
        blocks: Its layers, in order.
        embedding: Path of the embedding.
        head: Path of the output head; None if it is part of another module.
        ends: Parameters of the modules outside of the layers, without linear layers; tied ones once.
        outer_linears: Linear layers outside of the layers, without the head; named by their paths.
    """

    settings: Settings
    blocks: tuple[Block, ...]
    embedding: str
    head: str | None
    ends: Mapping[str, int]
    outer_linears: tuple[LinearShape, ...] = ()

    def shape(self, adapter: AdapterConfig, bits: Bits | None = None) -> ModelShape:
        """Returns the shape with the modules counted that an adapter section names.

        Args:
            adapter: The section.
            bits: Bits of a weight by module, if they differ.

        Raises:
            AdapterError: A pattern of the section matches nothing.
        """
        modules = {f"{block.path}.{lin.name}": lin for block in self.blocks for lin in block.shape.linears}
        modules |= {lin.name: lin for lin in self.outer_linears}
        adapted, saved = self._select(adapter, modules)

        def counted(path: str, lin: LinearShape) -> LinearShape:
            own = None if bits is None else bits(path, lin.out_features, lin.in_features)
            return replace(lin, adapted=int(path in adapted), bits_per_weight=own)

        layers = [
            replace(
                block.shape,
                linears=tuple(counted(f"{block.path}.{lin.name}", lin) for lin in block.shape.linears),
            )
            for block in self.blocks
        ]
        settings = self.settings
        size = self.ends[self.embedding]
        tied = bool(settings.get("tie_word_embeddings", default=False))
        head = 0 if tied or self.head is None else self.ends[self.head]
        positions = sum(number for path, number in self.ends.items() if "position" in path or path.endswith("wpe"))
        shape = ModelShape(
            layers=group_layers(layers),
            hidden_size=settings.hidden,
            vocab_size=settings.size("vocab_size"),
            embedding_parameters=size + positions,
            head_parameters=head,
            final_parameters=sum(self.ends.values())
            - size
            - positions
            - head
            + sum(lin.out_features for lin in self.outer_linears if lin.bias),
            outer_linears=tuple(counted(lin.name, lin) for lin in self.outer_linears),
            tied=tied,
            model_type=settings.model_type,
            kind=_kind(layers),
            positions="learned" if positions else "relative" if settings.model_type == "t5" else "rotary",
            max_positions=settings.size("max_position_embeddings", "n_positions", default=0),
            fused=settings.model_type in FUSED,
        )
        return replace(shape, saved_parameters=self._saved(saved, shape))

    def _select(self, adapter: AdapterConfig, modules: Mapping[str, LinearShape]) -> tuple[set[str], list[str]]:
        """Returns the linear layers with an adapter, and the modules trained in full."""
        if isinstance(adapter, NoAdapter):
            return set(), [""]
        assert isinstance(adapter, LowRankAdapter), "other adapters are counted by building them"
        paths = [*modules, *self.ends, *(f"{block.path}.{name}" for block in self.blocks for name in block.others)]
        prefixes = {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)}
        if self.head is not None:
            prefixes.add(self.head)
        saved = (
            _match_all(adapter.trainable_modules, prefixes, "adapter.trainable_modules")
            if (adapter.trainable_modules)
            else []
        )
        linears = {path for path, lin in modules.items() if ".experts." not in path}
        if adapter.target_modules == "all-linear":
            unread = partial(
                unread_by_peft,
                model_type=self.settings.model_type,
                has_fused_experts=any(block.shape.num_experts for block in self.blocks),
            )
            adapted = {path for path in linears if unread(path) is None}
        else:
            with_head = linears | ({self.head} if self.head is not None else set())
            adapted = set(_match_all(adapter.target_modules, with_head, "adapter.target_modules"))
        return {path for path in adapted if not is_inside(path, saved)}, saved

    def _saved(self, saved: list[str], shape: ModelShape) -> int:
        """Counts the parameters of modules that are trained in full."""
        if saved == [""]:
            return shape.num_parameters
        total = sum(number for path, number in self.ends.items() if is_inside(path, saved))
        if shape.tied and self.head in saved and not is_inside(self.embedding, saved):
            total += self.ends[self.embedding]
        for block in self.blocks:
            for lin in block.shape.linears:
                if is_inside(f"{block.path}.{lin.name}", saved):
                    total += lin.num_weights * lin.count + (lin.out_features if lin.bias else 0)
            total += sum(number for name, number in block.others.items() if is_inside(f"{block.path}.{name}", saved))
        for lin in self.outer_linears:
            if is_inside(lin.name, saved):
                total += lin.num_weights + (lin.out_features if lin.bias else 0)
        return total


def read_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Returns the modules that a ``config.json`` describes.

    Returns:
        None for an architecture that is not in the tables; it has to be counted by building it.

    Raises:
        ModelError: A size is missing or absurd.
    """
    settings = Settings(config)
    family = FAMILIES.get(settings.model_type)
    stack = STACKS.get(settings.model_type)
    if family is None and stack is None:
        return None
    if settings.num_layers > _MOST_LAYERS:
        raise ModelError(f"config.json describes {settings.num_layers:,} layers.", where="num_hidden_layers")
    hidden, vocab = settings.hidden, settings.size("vocab_size")
    tied = bool(settings.get("tie_word_embeddings", default=False))
    if family is not None:
        if any(settings.get(name) == value for name, value in family.refused.items()):
            return None
        blocks = [decoder_block(settings, family, config, index) for index in range(settings.num_layers)]
        norm = "model.final_layernorm" if settings.model_type == "phi" else "model.norm"
        ends = {"model.embed_tokens": vocab * hidden, norm: 2 * hidden if family.norm == "layer" else hidden}
        embedding = "model.embed_tokens"
    else:
        assert stack is not None
        describe, embedding = stack
        blocks, ends = describe(settings)
        ends[embedding] = vocab * hidden
    head = "lm_head"
    is_encoder = settings.model_type in ("bert", "roberta")
    if not tied and not is_encoder:
        ends[head] = vocab * hidden + (vocab if settings.model_type == "phi" else 0)
    outer: tuple[LinearShape, ...] = ()
    if is_encoder:
        path = "cls.predictions.transform.dense" if settings.model_type == "bert" else "lm_head.dense"
        outer = (LinearShape(hidden, hidden, name=path, bias=True),)
    return Architecture(settings, tuple(blocks), embedding, None if is_encoder else head, ends, outer)


def group_layers(layers: Iterable[LayerShape]) -> tuple[LayerShape, ...]:
    """Returns each kind of layer once, with its count, in the order in which they first occur."""
    counts: dict[LayerShape, int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + layer.count
    return tuple(replace(layer, count=count) for layer, count in counts.items())


def _kind(layers: Iterable[LayerShape]) -> Literal["causal", "encoder", "encoder_decoder"]:
    parts = {layer.part for layer in layers}
    return "causal" if parts == {"decoder"} else "encoder" if parts == {"encoder"} else "encoder_decoder"


def _match_all(patterns: Iterable[str], candidates: Iterable[str], option: str) -> list[str]:
    """Returns the paths that any pattern matches.

    Raises:
        AdapterError: A pattern matches nothing.
    """
    candidates = list(candidates)
    found: list[str] = []
    for pattern in patterns:
        hits = [path for path in candidates if matches(path, pattern)]
        if not hits:
            names = sorted({path.rpartition(".")[2] for path in candidates if not path.rpartition(".")[2].isdigit()})
            close = nearest(pattern.rpartition(".")[2], names)
            raise AdapterError(
                f"{pattern!r} matches no module of this model.",
                where=option,
                why=f"its names end in {', '.join(names)}",
                fix=f"did you mean {close}?" if close else None,
            )
        found += hits
    return list(dict.fromkeys(found))
