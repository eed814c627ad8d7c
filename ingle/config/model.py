"""``model:`` the model and tokenizer to start from."""

from __future__ import annotations

from typing import Literal

from ingle.config.section import Section, Text

DType = Literal["auto", "bfloat16", "float32"]


class ModelConfig(Section):
    """The model to start from.

    Attributes:
        id: A hub id (``Qwen/Qwen3-0.6B``), a local folder, or a ``.gguf`` file (a local path, or
            ``owner/name/file.gguf`` on the hub).
        revision: Branch, tag or commit on the hub.
        tokenizer: Hub id or folder of a different tokenizer. If null, the model's own.
        dtype: Compute dtype. ``auto`` is bfloat16 on hardware with fast bfloat16 arithmetic, and float32 elsewhere.
        init: ``pretrained`` loads the weights. ``random`` initializes them as the architecture does, for pre-training;
            ``id`` then needs only a ``config.json``.
        chat_template: File with a Jinja chat template that replaces the tokenizer's own.
        trust_remote_code: Allow the model's repository to run its own Python code.
    """

    id: Text
    revision: Text | None = None
    tokenizer: Text | None = None
    dtype: DType = "auto"
    init: Literal["pretrained", "random"] = "pretrained"
    chat_template: Text | None = None
    trust_remote_code: bool = False
