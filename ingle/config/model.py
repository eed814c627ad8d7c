"""``model:`` which model and tokenizer to start from."""

from __future__ import annotations

from typing import Literal

from ingle.config.section import Section, Text

DType = Literal["auto", "bfloat16", "float32"]


class ModelConfig(Section):
    """Which model to start from.

    Attributes:
        id: A hub id (``Qwen/Qwen3-0.6B``), a local folder, or a ``.gguf`` file (a path, or ``owner/name/file.gguf`` on
            the hub).
        revision: Branch, tag or commit on the hub.
        tokenizer: Hub id or folder of another tokenizer; the model's own when null.
        dtype: Compute type. ``auto`` is bfloat16 where the hardware multiplies it fast, else float32.
        init: ``pretrained`` reads the weights; ``random`` starts from the architecture's own initialisation
            (``id`` then needs only a ``config.json``), for pre-training.
        chat_template: A file whose Jinja template replaces the tokenizer's own.
        trust_remote_code: Run Python that comes with the model.
    """

    id: Text
    revision: Text | None = None
    tokenizer: Text | None = None
    dtype: DType = "auto"
    init: Literal["pretrained", "random"] = "pretrained"
    chat_template: Text | None = None
    trust_remote_code: bool = False
