"""Prompt tuning and p-tuning: trained embeddings before every text, in PEFT's layout.

The functions are those of :class:`ingle.adapters.kinds.Kind`.

Legend: P virtual tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ingle.adapters.lora import generator_of
from ingle.adapters.targets import Selection, trained_in_full
from ingle.adapters.virtual_tokens import (
    TENSOR,
    TOKENS,
    VirtualTokens,
    extend,
    file_error,
    find_tokens,
    only_tensor,
    text_error,
)
from ingle.config.adapter_kinds import PromptAdapter
from ingle.errors import AdapterError
from ingle.parallel import Mesh, copy_rows, gathered
from ingle.quant.linear import QuantEmbedding
from ingle.quant.task_heads import task_heads


def select(model: nn.Module, adapter: PromptAdapter) -> Selection:
    """Returns the embedding that gets virtual tokens.

    Raises:
        AdapterError: The architecture reads texts a second time, without their embeddings.
    """
    config: Any = model.config
    if config.is_encoder_decoder and task_heads(model):
        raise AdapterError(
            f"{type(model).__name__} cannot have virtual tokens.",
            where="adapter.kind = prompt",
            why="its head reads the text in its decoder, too",
            fix="--adapter.kind=lora",
        )
    return Selection((_path(model),), trained_in_full(model, adapter.trainable_modules))


def insert(model: nn.Module, adapter: PromptAdapter, selection: Selection) -> None:
    """Adds the virtual tokens."""
    (path,) = selection.adapted
    embedding = model.get_submodule(path)
    weight: Any = embedding
    rows, width = (
        (embedding.out_features, embedding.in_features)
        if isinstance(embedding, QuantEmbedding)
        else tuple(weight.weight.shape)
    )
    device = next(embedding.parameters()).device
    tokens = VirtualTokens(
        adapter.num_virtual_tokens,
        width,
        rows,
        encoder=adapter.encoder,
        encoder_width=adapter.encoder_hidden_size,
        device=torch.device("cpu") if device.type == "meta" else device,
    )
    extend(model, embedding, tokens)


@torch.no_grad()
def start(model: nn.Module, adapter: PromptAdapter, seed: int, mesh: Mesh | None) -> None:
    """Draws the embeddings, or copies those of tokens."""
    tokens, path = _tokens(model), _path(model)
    generator = generator_of(seed, path)
    tokens.draw(generator)
    if adapter.path is not None or adapter.init == "random":
        return
    embedding = model.get_submodule(path)
    if adapter.init == "text":
        if not tokens.text:
            raise text_error()
        ids = [tokens.text[place % len(tokens.text)] for place in range(tokens.num_tokens)]
    else:
        assert tokens.first_id is not None
        ids = torch.randint(tokens.first_id, (tokens.num_tokens,), generator=generator).tolist()
    with gathered(embedding):
        rows: Tensor = embedding.forward(torch.tensor(ids, device=_device(embedding)))
    copy_rows(tokens.embeddings, rows.float())


def describe(model: nn.Module, adapter: PromptAdapter) -> dict[str, Any]:
    """Returns PEFT's options."""
    tokens = _tokens(model)
    config = {
        "num_virtual_tokens": tokens.num_tokens,
        "token_dim": tokens.embeddings.shape[1],
        "num_transformer_submodules": 1,
        **sizes_of(model),
    }
    if adapter.encoder == "none":
        # PEFT then needs no tokenizer; the embeddings are those of the file.
        return {"peft_type": "PROMPT_TUNING", **config, "prompt_tuning_init": "RANDOM", "tokenizer_name_or_path": None}
    width = adapter.encoder_hidden_size or tokens.embeddings.shape[1]
    kind = {"encoder_reparameterization_type": adapter.encoder.upper(), "encoder_hidden_size": width}
    return {"peft_type": "P_TUNING", **config, **kind}


def to_file(model: nn.Module, adapter: PromptAdapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the embeddings as the network computes them."""
    tokens, path = _tokens(model), f"{_path(model)}.{TOKENS}"
    own = {name: values[f"{path}.{name}"] for name, _ in tokens.named_parameters()}
    return {TENSOR: functional_call(tokens, own, ()).detach()}


def from_file(model: nn.Module, adapter: PromptAdapter, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the embeddings; a network is left out, since only its output was saved."""
    _tokens(model).forget_network()
    return {f"{_path(model)}.{TOKENS}.embeddings": only_tensor(tensors, where)}


def read(config: Mapping[str, Any], folder: Path) -> PromptAdapter:
    """Returns the section of a folder of PEFT."""
    number, modules = read_virtual(config, folder)
    return PromptAdapter(kind="prompt", num_virtual_tokens=number, init="random", trainable_modules=modules)


def give_text(model: nn.Module, ids: Sequence[int]) -> None:
    """Tells what the virtual tokens begin with; before :func:`start`."""
    _tokens(model).text = tuple(ids)


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Returns numbers that PEFT asks for, whether it needs them or not."""
    config: Any = model.config
    text = config.get_text_config(decoder=True) if not config.is_encoder_decoder else config
    sizes = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}
    return {key: int(getattr(text, name, 1)) for key, name in sizes.items()}


def read_virtual(config: Mapping[str, Any], folder: Path) -> tuple[int, tuple[str, ...]]:
    """Returns the number of virtual tokens, and the modules that are trained in full besides the head of a task.

    Raises:
        AdapterError: PEFT would put virtual tokens before the answers of an encoder-decoder, too; or a value is wrong.
    """
    number, modules = config.get("num_virtual_tokens"), config.get("modules_to_save") or []
    if type(number) is not int or number < 1 or not all(isinstance(name, str) and name for name in modules):
        raise file_error(folder, "num_virtual_tokens or modules_to_save is no value that PEFT writes")
    if config.get("num_transformer_submodules", 1) != 1:
        raise file_error(folder, "it has virtual tokens before answers, too, which PEFT leaves out of generation")
    # The head of a task is trained whatever it is called.
    return number, tuple(name for name in dict.fromkeys(modules) if name not in ("classifier", "score", "qa_outputs"))


def _path(model: nn.Module) -> str:
    """Returns the path of the embedding of the texts that a model reads."""
    whole: Any = model
    reader: Any = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    embedding = reader.get_input_embeddings()
    path: str = next(path for path, module in model.named_modules() if module is embedding)
    return path


def _tokens(model: nn.Module) -> VirtualTokens:
    tokens = find_tokens(model)
    assert tokens is not None, "insert it first"
    return tokens


def _device(embedding: nn.Module) -> torch.device:
    return next(embedding.parameters()).device
