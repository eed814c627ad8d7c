"""Trained tokens in front of every text: as embeddings (prompt tuning), or as keys and values in every layer (prefix).

The modules are added to a model; nothing of it is replaced. Embeddings extend the vocabulary: ``ingle.models`` puts the
ids after its last one before every text, and the embedding looks them up here. Keys and values are read by attention.

Legend: P virtual tokens, H hidden size, E width of an encoder, Hkv key/value heads, Dh head size, T = Hkv * Dh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ingle.adapters.peft_config import CONFIG_FILE
from ingle.adapters.states import Adapted
from ingle.errors import AdapterError
from ingle.parallel import copy_rows, full, local
from ingle.wording import some

#: Name of the embeddings in the model's embedding, and of keys and values in an attention layer.
TOKENS, KEYS = "virtual_tokens", "virtual_keys"
#: PEFT's name of the only tensor in the file of an adapter.
TENSOR = "prompt_embeddings"
_LSTM_LAYERS = 2

Encoder = Literal["none", "mlp", "lstm"]


class Virtual(Adapted):
    """What an adapter adds in front of texts.

    Attributes:
        num_tokens: P.
        first_id: The id of the first embedding; None for keys and values.
    """

    num_tokens: int
    first_id: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.base = None
        self.starts_at_base = False

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Draws embeddings, keys and values from a normal distribution, and networks as torch does."""
        for name, parameter in self.named_parameters():
            module: Any = self.get_submodule(name.rpartition(".")[0])
            value = torch.empty(parameter.shape)
            if isinstance(module, nn.Linear | nn.LSTM):
                fan_in = module.hidden_size if isinstance(module, nn.LSTM) else module.in_features
                value.uniform_(-1, 1, generator=generator).mul_(1 / math.sqrt(fan_in))
            else:
                value.normal_(generator=generator)
            copy_rows(parameter, value)


class VirtualTokens(Virtual):
    """Embeddings before every text, possibly as the output of a network (p-tuning).

    Args:
        num_tokens: P.
        width: H.
        first_id: The id of the first one.
        encoder: The network.
        encoder_width: E; H if None.
        device: Where it computes.

    Source: Lester et al. 2021 (arXiv 2104.08691); Liu et al. 2021, "P-tuning" (arXiv 2103.10385), and PEFT's
    ``PromptEncoder`` for the sizes of the networks.
    """

    def __init__(
        self,
        num_tokens: int,
        width: int,
        first_id: int,
        *,
        encoder: Encoder = "none",
        encoder_width: int | None = None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_tokens, self.first_id = num_tokens, first_id
        self.text: tuple[int, ...] = ()  # what the embeddings begin with, until they do
        self.embeddings = nn.Parameter(torch.zeros(num_tokens, width, dtype=torch.float32, device=device))
        inner = encoder_width or width
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.recurrent: nn.LSTM | None = None
        self.layers: nn.ModuleList | None = None
        if encoder == "lstm":
            self.recurrent = nn.LSTM(width, inner, _LSTM_LAYERS, bidirectional=True, batch_first=True, **options)
        if encoder != "none":
            wide = 2 * inner if encoder == "lstm" else inner
            sizes = (wide, wide, width) if encoder == "lstm" else (width, inner, inner, width)
            self.layers = nn.ModuleList(nn.Linear(into, out, **options) for into, out in pairwise(sizes))

    def forget_network(self) -> None:
        """Makes the embeddings those of texts, instead of the input of a network."""
        self.recurrent = self.layers = None

    def forward(self) -> Tensor:
        """Returns the embeddings, float32 ``[P, H]``."""
        hidden: Tensor = self.embeddings
        if self.recurrent is not None:
            hidden = _run_lstm(self.recurrent, hidden)
        for place, layer in enumerate(self.layers or ()):
            hidden = layer(hidden if place == 0 else hidden.relu())
        return hidden

    def look_up(self, ids: Tensor, rows: Tensor, virtual: Tensor) -> Tensor:
        """Puts embeddings among those of other tokens.

        Args:
            ids: ``[...]``.
            rows: Embeddings of the other tokens, ``[..., H]``.
            virtual: Which ids are virtual, ``[...]``.
        """
        assert self.first_id is not None
        own: Tensor = self()
        chosen = own[ids[virtual] - self.first_id].to(rows.dtype)
        return rows.index_put((virtual,), chosen)


class PrefixEncoder(nn.Module):
    """The part of a prefix's network that all layers share: ``tanh(embeddings W^T + b)``."""

    def __init__(self, num_tokens: int, width: int, inner: int, device: torch.device) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.zeros(num_tokens, width, dtype=torch.float32, device=device))
        self.linear = nn.Linear(width, inner, dtype=torch.float32, device=device)

    def forward(self) -> Tensor:
        """Returns ``[P, E]``."""
        hidden: Tensor = self.linear(self.embeddings)
        return hidden.tanh()


class VirtualKeys(Virtual):
    """Keys and values that every token sees, of one attention layer.

    Args:
        num_tokens: P.
        num_heads: Hkv.
        head_size: Dh.
        encoder: The shared part of a network; this layer then has its own rows of the last matrix.
        device: Where it computes.

    Source: Li and Liang 2021, "Prefix-Tuning" (arXiv 2101.00190), section 4.3.
    """

    keys: nn.Parameter | None
    values: nn.Parameter | None

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        head_size: int,
        *,
        encoder: PrefixEncoder | None = None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_tokens, self.num_heads, self.head_size = num_tokens, num_heads, head_size
        self.text: tuple[Tensor, Tensor] | None = None  # what they begin with, until they do
        width = num_heads * head_size
        self.encoder = encoder
        self.last: nn.Linear | None = None
        self.keys = self.values = None
        if encoder is None:
            self._make_matrices(device)
        else:
            self.last = nn.Linear(encoder.linear.out_features, 2 * width, dtype=torch.float32, device=device)

    def _make_matrices(self, device: torch.device) -> None:
        shape = (self.num_tokens, self.num_heads * self.head_size)
        self.keys, self.values = (
            nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)) for _ in range(2)
        )

    def forget_network(self) -> None:
        """Makes keys and values parameters, instead of the output of a network."""
        if self.last is not None:
            self._make_matrices(self.last.weight.device)
            self.encoder = self.last = None

    @torch.no_grad()
    def clear_values(self) -> None:
        """Sets all values to zero."""
        if self.values is not None:
            local(self.values).zero_()
        if self.last is None:
            return
        for parameter in (self.last.weight, self.last.bias):  # the second half of the rows are values
            whole = full(parameter).clone()
            whole[len(whole) // 2 :] = 0
            copy_rows(parameter, whole)

    @property
    def obstacle(self) -> str | None:
        """Why the layer cannot be part of a fused one."""
        return "its attention has trained keys and values, which the fused functions do not read"

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns keys and values, float32 ``[P, T]``."""
        if self.last is None or self.encoder is None:
            assert self.keys is not None and self.values is not None
            return self.keys, self.values
        keys, values = self.last(self.encoder()).chunk(2, dim=1)
        return keys, values

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns keys and values, float32 ``[Hkv, P, Dh]``."""
        keys, values = (each.unflatten(1, (self.num_heads, -1)).transpose(0, 1) for each in self.matrices())
        return keys, values


class _Extended(nn.Module):
    """Goes before the class of an embedding: ids after its last one are those of its virtual tokens."""

    original: type[nn.Module]

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` to ``[..., H]``."""
        tokens: VirtualTokens = self.virtual_tokens  # type: ignore[assignment]
        assert tokens.first_id is not None
        virtual = ids >= tokens.first_id
        if not tokens.is_on or not bool(virtual.any()):
            rows: Tensor = super().forward(ids)
            return rows
        return tokens.look_up(ids, super().forward(ids.masked_fill(virtual, 0)), virtual)


@functools.cache
def _extended(cls: type[nn.Module]) -> type[nn.Module]:
    # One class for each, with the same name, as for modules that documents are dealt to.
    return type(cls.__name__, (_Extended, cls), {"original": cls, "__doc__": cls.__doc__})


def extend(model: nn.Module, embedding: nn.Module, tokens: VirtualTokens) -> None:
    """Adds virtual tokens to an embedding of a model."""
    cls: Any = type(embedding)
    embedding.__class__ = _extended(getattr(cls, "original", cls))
    embedding.add_module(TOKENS, tokens)
    _name(model, tokens)


def add_keys(model: nn.Module, path: str, keys: VirtualKeys) -> None:
    """Adds keys and values to an attention layer of a model."""
    model.get_submodule(path).add_module(KEYS, keys)
    _name(model, keys)


def _name(model: nn.Module, virtual: Virtual) -> None:
    # Where ``ingle.models`` finds what comes before a text; not as a module, which it is already.
    model.__dict__.setdefault("virtual", virtual)


def find_tokens(model: nn.Module) -> VirtualTokens | None:
    """Returns the virtual tokens of a model; None if it has none."""
    return next((module for module in model.modules() if isinstance(module, VirtualTokens)), None)


def find_keys(model: nn.Module) -> dict[str, VirtualKeys]:
    """Returns the added keys and values by the path of their attention layer, in the order of the layers."""
    return dict(_find_keys(model))


def _find_keys(model: nn.Module) -> Iterator[tuple[str, VirtualKeys]]:
    for path, module in model.named_modules():
        if isinstance(module, VirtualKeys):
            yield path.removesuffix(f".{KEYS}"), module


def only_tensor(tensors: Mapping[str, Tensor], where: str) -> Tensor:
    """Returns the only tensor of a file.

    Raises:
        AdapterError: The file has others, or none.
    """
    if set(tensors) != {TENSOR}:
        raise AdapterError(
            f"The file has to have the tensor {TENSOR}, and weights of the modules in modules_to_save.",
            where=where,
            why=f"it has {some(tensors)}",
            fix="copy the complete adapter folder again",
        )
    return tensors[TENSOR]


def text_error() -> AdapterError:
    """Returns the error about a text that was not given."""
    return AdapterError(
        "The virtual tokens are to begin with a text, but its tokens were not given.",
        where="adapter.init_text",
        fix="choose another adapter.init",
    )


def file_error(folder: Path, why: str) -> AdapterError:
    """Returns the error about virtual tokens of PEFT that are not computed."""
    return AdapterError(
        "These virtual tokens cannot be used.",
        where=str(folder / CONFIG_FILE),
        why=why,
        fix="train them with num_transformer_submodules = 1, or with Ingle",
    )


def _run_lstm(module: nn.LSTM, inputs: Tensor) -> Tensor:
    """Computes ``module(inputs)`` from the parameters that it has now; a module keeps a list of them apart."""
    weights = [getattr(module, name) for names in module._all_weights for name in names]
    state = inputs.new_zeros(2 * module.num_layers, 1, module.hidden_size)
    run: Any = torch.lstm
    hidden: Tensor = run(
        inputs[None], (state, state), weights, True, module.num_layers, 0.0, module.training, True, True
    )[0]
    return hidden[0]
