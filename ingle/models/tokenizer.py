"""Loads fast tokenizers, which report offsets, and chooses a pad token that is not the end-of-text token."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ingle.config.model import ModelConfig
from ingle.errors import ModelError
from ingle.models.boundary import COMPARE_CONFIG, read_object, reading, refuse_absurd
from ingle.models.loading.gguf_model import is_gguf, open_gguf, read_gguf_tokenizer
from ingle.models.loading.hub import locate

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FIX = (
    "fetch or copy tokenizer.json and tokenizer_config.json again, or name another folder or hub id in model.tokenizer"
)

#: Tokens that models reserve for padding, in order of preference.
_SPARE = (
    re.compile(r"pad", re.IGNORECASE),
    re.compile(r"reserved|unused|placeholder|dummy|extra_id|fim_pad|vision_pad", re.IGNORECASE),
)


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a model.

    The pad token is the tokenizer's own if it differs from the end-of-text token, otherwise a token that the model does
    not use, otherwise None. It is never the end-of-text token, which is supervised.

    Raises:
        ModelError: There is no tokenizer, only a slow one, or the chat template cannot be read.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    name = model.tokenizer or model.id
    option = "model.tokenizer" if model.tokenizer else "model.id"
    revision = None if model.tokenizer else model.revision
    if is_gguf(name):
        tokenizer = read_gguf_tokenizer(open_gguf(name, revision=revision, option=option))
    else:
        folder = locate(name, revision=revision, code=model.trust_remote_code, option=option)
        tokenizer = _read(folder, name, option, model.trust_remote_code)
    _choose_pad(tokenizer)
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError("The chat template cannot be read.", where="model.chat_template", why=str(error)) from None
    return tokenizer


def _read(folder: Path, name: str, option: str, code: bool) -> PreTrainedTokenizerFast:
    if not any((folder / file).is_file() for file in ("config.json", *_FILES)):
        raise ModelError(
            f"{name} contains no model: there is no config.json and no tokenizer.", where=option, fix="check the path"
        )
    if not any((folder / file).is_file() for file in _FILES):
        raise ModelError(
            f"{name} contains no tokenizer.",
            where=str(folder),
            why=f"none of {', '.join(_FILES)} exists",
            fix="name another folder or hub id in model.tokenizer",
        )
    config = folder / "config.json"
    if config.is_file():  # AutoTokenizer reads it too
        refuse_absurd(read_object(config), config)
    settings = folder / "tokenizer_config.json"
    place = settings if settings.is_file() else folder
    try:
        with reading(place, f"The tokenizer of {name} cannot be read.", fix=_FIX):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=code, local_files_only=True, clean_up_tokenization_spaces=False
            )
    except ModelError:
        _find_culprit(folder, code)
        raise
    _refuse_invalid(tokenizer, folder)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name} has a slow tokenizer, but a fast one (tokenizer.json) is needed.",
            where=option,
            why="the loss mask is derived from character offsets, which only fast tokenizers provide",
            fix="name a hub id or folder with a tokenizer.json in model.tokenizer",
        )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def _find_culprit(folder: Path, code: bool) -> None:
    """Raises an error that names the one file that cannot be read, if there is one."""
    config, core = folder / "config.json", folder / "tokenizer.json"
    if config.is_file():
        with reading(config, "transformers cannot read config.json.", fix=COMPARE_CONFIG):
            AutoConfig.from_pretrained(folder, trust_remote_code=code, local_files_only=True)
    if core.is_file():
        with reading(core, "tokenizer.json cannot be read.", fix=_FIX):
            Tokenizer.from_file(str(core))
    for path in (folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")):
        if path.is_file():
            read_object(path)


def _refuse_invalid(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuses settings that transformers accepts at first and fails on later."""
    path = folder / "tokenizer_config.json"
    with reading(path, "The tokenizer does not work with this tokenizer_config.json.", fix=_FIX):
        template = tokenizer.chat_template
        if template is not None and not isinstance(template, str | dict):
            raise TypeError(f"chat_template is {template!r}")
        for name in ("bos", "eos", "pad", "unk"):
            number = getattr(tokenizer, f"{name}_token_id")
            if number is not None and not isinstance(number, int):
                raise TypeError(f"{name}_token is {getattr(tokenizer, f'{name}_token')!r}")
        tokenizer.decode(tokenizer("a b", add_special_tokens=True)["input_ids"])


def _choose_pad(tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    tokenizer.pad_token = None
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    added = sorted(tokenizer.added_tokens_decoder.items())
    unused = [token.content for index, token in added if token.special and index not in used]
    for pattern in _SPARE:
        for content in unused:
            if pattern.search(content):
                tokenizer.pad_token = content
                return
    if tokenizer.unk_token is not None and tokenizer.unk_token_id not in used:
        tokenizer.pad_token = tokenizer.unk_token
