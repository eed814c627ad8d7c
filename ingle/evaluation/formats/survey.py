"""A survey of formats from beginning to end: what is asked, what is opened, what is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ingle import models
from ingle.atomic import write_atomically
from ingle.config.model import ModelConfig
from ingle.config.model_names import check_name
from ingle.errors import ConfigError, EvaluationError
from ingle.evaluation.formats.candidates import find_target, list_candidates, target_names
from ingle.evaluation.formats.choice import LIMIT
from ingle.evaluation.formats.comparison import SCHEMA, Notebook, Subject, compare_formats
from ingle.evaluation.formats.page import render_page
from ingle.evaluation.formats.text import read_windows
from ingle.evaluation.likelihood import Window
from ingle.events import Sink, Warned
from ingle.quant.imatrix_collector import linear_maps
from ingle.quant.linear import QuantModule

#: Tokens of the text that are scored.
NUM_TOKENS = 16_384

#: Bytes of either end of a tensor that tell it from another model's.
_ENDS = 2048


@dataclass(frozen=True, slots=True)
class Survey:
    """What is asked.

    Attributes:
        model: A folder or hub id.
        data: The text.
        names: Formats; all when empty.
        num_tokens: How much of the text is scored.
        limit: Nats a token that the recommended format may cost.
        imatrix: An importance matrix to pack with.
        out: Folder for ``formats.json`` and ``formats.html``; None writes nothing.
    """

    model: ModelConfig
    data: str
    names: Sequence[str] = ()
    num_tokens: int = NUM_TOKENS
    limit: float = LIMIT
    imatrix: Path | None = None
    out: Path | None = None

    def check(self) -> None:
        """Raises before anything is loaded for what makes no sense.

        Raises:
            ConfigError: A format is unknown, or the folder holds something else.
        """
        for name in self.names:
            find_target(name, "--formats")
        if self.out is None:
            return
        is_folder = not self.out.exists() or self.out.is_dir()
        if not is_folder or (self.out.exists() and any(self.out.iterdir()) and not self.notes.is_file()):
            raise ConfigError(
                f"{self.out} holds other files." if is_folder else f"{self.out} is a file.",
                where=f"--out {self.out}",
                fix="name a new folder",
            )

    @property
    def notes(self) -> Path:
        """Where rows are written down."""
        assert self.out is not None
        return self.out / "formats.json"


def survey(asked: Survey, sink: Sink = lambda event: None) -> dict[str, Any]:
    """Compares formats on a model and a text.

    Args:
        asked: What to compare on what.
        sink: Gets the progress.

    Returns:
        What :func:`ingle.evaluation.formats.comparison.compare_formats` returns; with ``out``, it is in
        ``formats.json`` there too, and ``formats.html`` shows it.

    Raises:
        ConfigError: A format is unknown, or the folder holds something else.
        ModelError: The model cannot be read.
        DataError: The text cannot be read.
        EvaluationError: The model is packed already or has fused experts, or the folder holds another comparison.
    """
    asked.check()
    check_name(asked.model.id)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = models.load_tokenizer(asked.model)
    model = models.load_model(asked.model, device=device, sink=sink)
    _require_plain(model, asked.model.id)
    windows = read_windows(asked.data, model, tokenizer, asked.num_tokens)
    importance = None if asked.imatrix is None else models.load_importance(model, asked.imatrix, sink)
    maps = [f"{name}.weight" for name in linear_maps(model)]
    names = asked.names or target_names()
    candidates, left_out = list_candidates(model, maps, names, has_imatrix=importance is not None)
    if left_out:
        sink(
            Warned(
                f"llama.cpp's file types are left out: Ingle does not know llama.cpp's names for the weights of a "
                f"{model.config.model_type} model.",
                count=len(left_out),
            )
        )
    subject = Subject(
        model=asked.model.id,
        data=asked.data,
        imatrix=None if asked.imatrix is None else str(asked.imatrix),
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=_fingerprint(model, windows, importance),
    )
    notebook = Notebook(None if asked.out is None else asked.notes, subject)
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
    report = compare_formats(
        model,
        windows,
        candidates,
        subject,
        importance=importance,
        notebook=notebook,
        limit=asked.limit,
        sink=sink,
    )
    if asked.out is not None:
        write_atomically(asked.out / "formats.html", render_page(report).encode())
        write_atomically(asked.notes, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    return report


def _require_plain(model: Any, name: str) -> None:
    packed = next((module for module in model.modules() if isinstance(module, QuantModule)), None)
    if packed is not None:
        raise EvaluationError(
            f"The weights of {name} are already packed in {packed.format.name}.",
            where="MODEL",
            why="the loss of another format can be measured against the unpacked weights only",
            fix="name the model's 16-bit release",
        )


def _fingerprint(model: Any, windows: Sequence[Window], importance: dict[str, Tensor] | None) -> str:
    """Of all that decides the figures: weights (the ends of each), text, importance, number type and our arithmetic."""
    digest = hashlib.sha256(f"{SCHEMA} {model.dtype}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        for end in (flat[:_ENDS], flat[-_ENDS:]):
            digest.update(end.float().cpu().numpy().tobytes())
    for window in windows:
        digest.update(window.sample.input_ids.tobytes() + window.sample.labels.tobytes())
    for name, values in (importance or {}).items():
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()
