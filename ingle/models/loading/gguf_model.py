"""A ``.gguf`` file as a model: config, tokenizer, chat template and weights are all in it.

Layers keep the file's own bytes, whatever types they are in; embedding and head too, where the architecture has plain
ones.  Nothing else is asked for: no ``config.json``, no 16-bit weights.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ingle import quant
from ingle.config.base import BaseConfig
from ingle.config.model import ModelConfig
from ingle.errors import GgufError, ModelError
from ingle.gguf import GgufFile
from ingle.gguf.architecture import require_sizes, to_config
from ingle.gguf.names import ROPE_FREQS, names_of
from ingle.gguf.vocabulary import special_token_id, to_vocabulary
from ingle.models.loading.gguf_weights import GgufWeight, unread_type
from ingle.models.loading.hub import locate_file
from ingle.models.loading.reading_plan import Group, ReadingPlan
from ingle.quant import Format, Formats, GgufFormats, make_formats
from ingle.quant.format import PLAIN


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def open_gguf(name: str, *, revision: str | None = None, option: str = "model.id") -> GgufFile:
    """The header of a GGUF file: a local path, or ``owner/name/file.gguf`` on the hub.

    Raises:
        GgufError: When it is damaged.
        ModelError: When there is none.
        HubUnavailable: When the hub is needed and cannot be reached.
    """
    from ingle.gguf import read_gguf

    return read_gguf(locate_file(name, revision=revision, option=option))


def read_gguf_config(file: GgufFile) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The architecture's config, and what would be in its ``config.json``.

    Raises:
        GgufError: When the architecture is not supported, or metadata and tensors describe different models.
    """
    raw = to_config(file)
    require_sizes(file, raw)
    config: PretrainedConfig = AutoConfig.for_model(**raw)
    return config, raw


def read_gguf_generation_config(file: GgufFile) -> GenerationConfig:
    """What ends an answer."""
    ends = to_vocabulary(file.metadata).end_token_ids
    numbers = {
        f"{key}_token_id": special_token_id(file.metadata, name) for key, name in (("bos", "bos"), ("pad", "padding"))
    }
    return GenerationConfig(eos_token_id=ends, **numbers)


def read_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer, with the file's chat template.

    Raises:
        GgufError: When it is of a kind that is not supported, or damaged.
    """
    vocabulary = to_vocabulary(file.metadata)
    try:
        core = Tokenizer.from_str(json.dumps(vocabulary.tokenizer))
    except Exception as error:  # the Rust reader raises bare exceptions
        raise GgufError(
            f"The tokenizer in {file.path.name} cannot be read.", where=str(file.path), why=str(error)[:200]
        ) from error
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **vocabulary.special)
    tokenizer.chat_template = vocabulary.chat_template
    return tokenizer


def plan_gguf(twin: PreTrainedModel, file: GgufFile) -> ReadingPlan:
    """Which tensor of the file becomes which parameter.

    Args:
        twin: The pristine architecture.
        file: The file.
    """
    names = names_of(file.metadata)
    wanted = twin.state_dict()
    groups: list[Group] = []
    unexpected = []
    for tensor in file.tensors.values():
        target = names.to_hf(tensor.name)
        if target is None or target not in wanted:
            if tensor.name != ROPE_FREQS:
                unexpected.append(tensor.name)
            continue
        rows = wanted[target].shape[0]
        groups.append(GgufWeight(target, tensor, names.permutation(tensor.name, rows), names.offset(tensor.name)))
    return ReadingPlan(tuple(groups), tuple(unexpected))


def choose_formats(model: nn.Module, config: ModelConfig, base: BaseConfig) -> Formats | None:
    """The format of every linear map: what a GGUF file has it in, or else what the base asks for.

    Args:
        model: The skeleton.
        config: Which model.
        base: The config section; weights that the file holds as plain numbers are packed so.

    Raises:
        ModelError: When the file holds a weight in another format than the base asks for.
        QuantizationError: When the base is a mix that is not known for the architecture.
    """
    if not is_gguf(config.id):
        return make_formats(base, model)
    file = open_gguf(config.id, revision=config.revision)
    return _choose(model, file, _own_formats(file), base)


def convert_base(model: PreTrainedModel, config: ModelConfig, base: BaseConfig) -> None:
    """Packs the linear maps of a skeleton: as a GGUF file has them, or else as the base asks.

    Raises:
        ModelError: When a file holds weights in another format than the base asks for.
        QuantizationError: When the model holds weights that cannot be packed.
    """
    if not is_gguf(config.id):
        quant.convert(model, base)
        return
    file = open_gguf(config.id, revision=config.revision)
    own = _own_formats(file)
    quant.convert(model, base, formats=_choose(model, file, own, base))
    quant.quantize_ends(model, own)


def _choose(model: nn.Module, file: GgufFile, own: Formats, base: BaseConfig) -> Formats:
    """What the file has each module in; what it holds as plain numbers as the base asks."""
    wanted = make_formats(base, model)

    def choose(name: str, out_features: int, in_features: int) -> Format | None:
        found = own(name, out_features, in_features)
        asked = None if wanted is None else wanted(name, out_features, in_features)
        if found is not None and asked is not None and asked.name != found.name:
            raise ModelError(
                f"{file.path.name} holds {name} in {found.name}, and base.format asks for {asked.name}.",
                where=f"base.format = {base.format}",
                why="the file's own bytes are what is trained on",
                fix="--base.format=none",
            )
        return found or asked

    return choose


def _own_formats(file: GgufFile) -> Formats:
    """The format that the file holds each module's weight in; None for plain numbers."""
    names = names_of(file.metadata)
    make = GgufFormats()

    def choose(name: str, out_features: int, in_features: int) -> Format | None:
        tensor = file.tensors.get(names.to_gguf(f"{name}.weight") or "")
        if tensor is None or tensor.type_name in PLAIN:
            return None
        format = make(tensor.type_name)
        if format is None:
            raise unread_type(tensor)
        return format

    return choose
