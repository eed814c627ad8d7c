"""Opens a GGUF file as a model: the file contains config, tokenizer, chat template and weights.

Linear layers keep the bytes of the file, whatever their types. So do embedding and head, unless the architecture
modifies them. Neither a ``config.json`` nor 16-bit weights are needed.
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
from ingle.gguf.names import TensorNames, names_of
from ingle.gguf.rotary import ROPE_TENSORS
from ingle.gguf.special_tokens import special_token_id
from ingle.gguf.vocabulary import to_vocabulary
from ingle.models.forward.mixers import original_class, source
from ingle.models.loading.gguf_weights import GgufWeight, unsupported_type
from ingle.models.loading.hub import locate_file
from ingle.models.loading.reading_plan import Group, ReadingPlan
from ingle.quant import Format, Formats, GgufFormats, make_formats
from ingle.quant.format import PLAIN
from ingle.quant.ggml.joined import JoinedRows


def is_gguf(name: str) -> bool:
    """Returns whether a model's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def open_gguf(name: str, *, revision: str | None = None, option: str = "model.id") -> GgufFile:
    """Reads the header of a GGUF file: a local path, or ``owner/name/file.gguf`` on the hub.

    Raises:
        GgufError: The file is damaged.
        ModelError: There is no such file.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    from ingle.gguf import read_gguf

    return read_gguf(locate_file(name, revision=revision, option=option))


def read_gguf_config(file: GgufFile) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Returns the architecture's config, and what its ``config.json`` would contain.

    Raises:
        GgufError: The architecture is not supported, or metadata and tensors describe different models.
    """
    raw = to_config(file)
    require_sizes(file, raw)
    config: PretrainedConfig = AutoConfig.for_model(**raw)
    return config, raw


def read_gguf_generation_config(file: GgufFile) -> GenerationConfig:
    """Returns the generation config: the tokens that end an answer, begin a text and pad a row."""
    ends = to_vocabulary(file.metadata).end_token_ids
    numbers = {
        f"{key}_token_id": special_token_id(file.metadata, name) for key, name in (("bos", "bos"), ("pad", "padding"))
    }
    return GenerationConfig(eos_token_id=ends, **numbers)


def read_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Returns the tokenizer, with the file's chat template.

    Raises:
        GgufError: The tokenizer is damaged, or its kind is not supported.
    """
    vocabulary = to_vocabulary(file.metadata)
    try:
        core = Tokenizer.from_str(json.dumps(vocabulary.tokenizer))
    except Exception as error:  # the Rust library raises bare exceptions
        raise GgufError(
            f"The tokenizer in {file.path.name} cannot be read.", where=str(file.path), why=str(error)[:200]
        ) from error
    options: dict[str, Any] = dict(vocabulary.special)
    if vocabulary.input_names is not None:
        options["model_input_names"] = vocabulary.input_names
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **options)
    tokenizer.chat_template = vocabulary.chat_template
    return tokenizer


def plan_gguf(architecture: PreTrainedModel, file: GgufFile) -> ReadingPlan:
    """Decides which tensor of a file becomes which parameter of the architecture."""
    names = names_of(to_config(file))
    wanted = architecture.state_dict()
    groups: dict[str, Group] = {}
    unexpected = []
    for tensor in file.tensors.values():
        target = names.to_hf(tensor.name, wanted)
        weight = None if target is None else _weight(file, names, target, tuple(wanted[target].shape))
        if weight is not None and tensor in weight.tensors:
            groups.setdefault(weight.target, weight)
        elif tensor.name not in ROPE_TENSORS:
            unexpected.append(tensor.name)
    return ReadingPlan(tuple(groups.values()), tuple(unexpected))


def _weight(file: GgufFile, names: TensorNames, target: str, shape: tuple[int, ...]) -> GgufWeight | None:
    """Returns the tensors of a parameter, or None if the file does not have all of them."""
    rule = names.rule(target, shape, file.tensors)
    if rule is None or any(name not in file.tensors for name in rule.tensors):
        return None
    return GgufWeight(rule, tuple(file.tensors[name] for name in rule.tensors))


def _stack(file: GgufFile, names: TensorNames, target: str, shape: tuple[int, int, int]) -> GgufWeight | None:
    """As :func:`_weight`, for a stack of matrices ``[O, I]``, which the parameter may store transposed."""
    weight = _weight(file, names, target, shape)
    if weight is None or not weight.rule.change.is_transposed:
        return weight
    return _weight(file, names, target, (shape[0], shape[2], shape[1]))


def choose_formats(model: nn.Module, config: ModelConfig, base: BaseConfig) -> Formats | None:
    """Returns a function that chooses the format of each linear layer: that of a GGUF file, otherwise that of the base.

    Args:
        model: The model on the meta device.
        config: The config section of the model.
        base: The config section of the base; it applies to weights that a GGUF file stores as plain numbers.

    Raises:
        ModelError: The file stores a weight in another format than the base requests.
        QuantizationError: The base is a mix without rules for the architecture.
    """
    if not is_gguf(config.id):
        return make_formats(base, model)
    file = open_gguf(config.id, revision=config.revision)
    return _choose(model, file, _own_formats(file), base)


def convert_base(model: PreTrainedModel, config: ModelConfig, base: BaseConfig) -> None:
    """Replaces the linear layers of a model on the meta device by quantized ones in the :func:`choose_formats` formats.

    Raises:
        ModelError: The file stores a weight in another format than the base requests.
        QuantizationError: The model has weights that cannot be quantized.
    """
    if not is_gguf(config.id):
        quant.convert(model, base)
        return
    file = open_gguf(config.id, revision=config.revision)
    own = _own_formats(file)
    quant.convert(model, base, formats=_choose(model, file, own, base))
    if "self.lm_head.weight" in source(original_class(model)):  # Mamba's own code reads its dtype
        return
    if model.config.is_encoder_decoder:  # two stacks share the embedding
        return
    quant.quantize_ends(model, own)


def _choose(model: nn.Module, file: GgufFile, own: Formats, base: BaseConfig) -> Formats:
    wanted = make_formats(base, model)

    def choose(name: str, out_features: int, in_features: int) -> Format | None:
        found = own(name, out_features, in_features)
        requested = None if wanted is None else wanted(name, out_features, in_features)
        if found is not None and requested is not None and requested.name != found.name:
            raise ModelError(
                f"{file.path.name} stores {name} as {found.name}, but base.format requests {requested.name}.",
                where=f"base.format = {base.format}",
                why="a GGUF base keeps the bytes of its file",
                fix="--base.format=none",
            )
        return found or requested

    return choose


def _own_formats(file: GgufFile) -> Formats:
    """Returns a function that finds the format of a module's weight in the file; None for plain numbers."""
    config = to_config(file)
    names, num_experts = names_of(config), config.get("num_experts") or config.get("num_local_experts") or 0
    make = GgufFormats()

    def choose(name: str, out_features: int, in_features: int) -> Format | None:
        # A projection of stacked experts is a parameter, and so has no ``weight``.
        weight = _weight(file, names, f"{name}.weight", (out_features, in_features))
        if weight is None:
            weight = _stack(file, names, name, (num_experts, out_features, in_features))
        if weight is None:
            return None
        for tensor in weight.tensors:
            if tensor.type_name not in PLAIN and make(tensor.type_name) is None:
                raise unsupported_type(tensor)
        formats = [format for each in weight.type_names or () if (format := make(each)) is not None]
        if len(formats) < 2:
            return formats[0] if formats else None
        return JoinedRows(tuple(formats), weight.rule.sizes, weight.rule.change.rows)

    return choose
