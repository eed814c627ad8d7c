"""The files of a task's head in an adapter folder: the model's config with the labels, and their names alone.

PEFT keeps the weights of the head, but no labels. The config lies in a folder of its own: next to the adapter,
transformers would take it for that of a complete model.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from ingle.atomic import write_atomically
from ingle.errors import AdapterError
from ingle.quant.task_heads import task_heads

#: The config of the model with its head, in the adapter folder.
HEAD_CONFIG = "head/config.json"
#: The names of its labels, in the order of its outputs.
LABELS = "labels.json"

#: PEFT's types by what the names of transformers' classes say; models for masked tokens have none.
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForMaskedLM": None,
    "WithLMHeadModel": None,  # XLM and FlauBERT
}


def task_type(model: Any) -> str | None:
    """Returns PEFT's name for what a model predicts; None if it has none."""
    name = type(model).__name__
    for part, kind in _TASK_TYPES.items():
        if part in name:
            return kind
    config = getattr(model, "config", None)
    return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"


def write_head_files(model: Any, folder: Path) -> None:
    """Writes config and labels of a model with a task head; nothing for a language model."""
    if not task_heads(model):
        return
    config = deepcopy(model.config)
    config.architectures = [getattr(type(model), "original", type(model)).__name__.removeprefix("FSDP")]
    (folder / HEAD_CONFIG).parent.mkdir(exist_ok=True)
    write_atomically(folder / HEAD_CONFIG, config.to_json_string().encode())
    if config.problem_type != "regression" and task_type(model) != "QUESTION_ANS":
        names = [config.id2label[index] for index in sorted(config.id2label)]
        write_atomically(folder / LABELS, (json.dumps(names, indent=1, ensure_ascii=False) + "\n").encode())


def read_padding(model: nn.Module, folder: Path) -> None:
    """Gives a model the padding token that its head was trained with: decoders are read at the token before it.

    Raises:
        AdapterError: The config of the head cannot be read.
    """
    path = folder / HEAD_CONFIG
    if not task_heads(model) or not path.is_file():
        return
    try:
        padding = json.loads(path.read_text(encoding="utf-8")).get("pad_token_id")
        if padding is not None and type(padding) is not int:
            raise ValueError(f"pad_token_id is {padding!r}")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(
            "The config of the head cannot be read.", where=str(path), why=str(error)[:200], fix="copy the file again"
        ) from None
    config: Any = model.config
    config.get_text_config().pad_token_id = padding
