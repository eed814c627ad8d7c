"""Opens a run folder, an adapter folder or a plain model, and generates text with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ingle import adapters, data, models, parallel
from ingle.config.base import BaseConfig, NoBase
from ingle.config.model import ModelConfig
from ingle.config.model_names import check_name, missing
from ingle.config.objective import ObjectiveConfig, Seq2Seq
from ingle.config.parallel import ParallelConfig
from ingle.config.paths import find_path, locate_paths
from ingle.config.run import Run
from ingle.data.types import Example, Message
from ingle.errors import AdapterError, HubUnavailable, ModelError
from ingle.events import Sink, Warned
from ingle.models.generation.stop_criteria import Generation
from ingle.training.folder import RunFolder

#: Longest document of a model without a run that says it; longer texts are cut, or read in windows.
_MAX_TOKENS = 4096

#: What models predict that generate no text.
NOT_TEXT: dict[str, str] = {
    "classify": "labels of texts",
    "tag": "tags of words",
    "answer": "places of answers",
    "mlm": "masked tokens",
    "reward": "scores of answers",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A model to open.

    Attributes:
        model: The base, or the fully fine-tuned model.
        base: The format of its weights.
        adapter: Folder of the adapter, or None.
        original: The model before full fine-tuning, or None.
        keeps_control_tokens: Whether the model was trained with ``data.control_tokens: keep``.
        run: The run that trained it, if it is known.
    """

    model: ModelConfig
    base: BaseConfig
    adapter: Path | None = None
    original: ModelConfig | None = None
    keeps_control_tokens: bool = False
    run: Run | None = None

    @property
    def prefix(self) -> str:
        """Text before every source that an encoder-decoder reads."""
        trained = None if self.run is None else self.run.objective
        return trained.prefix if isinstance(trained, Seq2Seq) else ""

    def objective(self) -> ObjectiveConfig:
        """Returns what the model was trained for, with the names of its labels.

        Raises:
            ModelError: There is no such model, or it does not say what its head predicts.
            HubUnavailable: The hub is needed and cannot be reached.
        """
        if self.run is not None and models.has_labels(self.run.objective):
            return self.run.objective
        head = None if self.adapter is None else self.adapter / "head"
        described = ModelConfig(id=str(head)) if head is not None and head.is_dir() else self.model
        return models.trained_objective(models.stored_task(described), models.stored_kind(self.model))


class Opened(NamedTuple):
    """A loaded model.

    Attributes:
        model: The model, with its adapter attached.
        tokenizer: Its tokenizer.
        objective: What it was trained for.
        adapted: Whether an adapter is attached.
    """

    model: Any
    tokenizer: Any
    objective: ObjectiveConfig
    adapted: bool


class Engine:
    """A model that generates answers.

    Args:
        model: The model, with its adapter attached.
        tokenizer: Its tokenizer.
        adapted: Whether an adapter is attached.
        source: Where it was opened from.

    Attributes:
        reads_sources: Whether it is an encoder-decoder, which reads texts as they are.
    """

    def __init__(self, model: Any, tokenizer: Any, *, adapted: bool, source: Source | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.adapted = adapted
        keeps = source is not None and source.keeps_control_tokens
        self._control = data.ControlTokens(tokenizer, "keep" if keeps else "escape")
        self.source = source
        self.reads_sources = models.kind_of(model.config) == "encoder_decoder"

    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        batch_size: int = 32,
        base_only: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """Generates one answer for each prompt.

        Args:
            prompts: Conversations, or texts to continue without a chat template.
            system: System message for conversations without one.
            max_new_tokens: Maximum length of an answer, in tokens.
            temperature: Sampling temperature; 0 decodes greedily.
            top_p: Probability mass to sample from (nucleus sampling).
            seed: Sampling seed; each prompt has its own random stream.
            stop: Strings that end an answer.
            batch_size: Prompts per batch.
            base_only: Generate without the adapter.
            on_progress: Called with the number of finished answers and the total.

        Returns:
            The answers, in the order of the prompts.
        """
        ids = [self._prompt_ids(prompt, system) for prompt in prompts]
        with adapters.disabled(self.model) if base_only and self.adapted else nullcontext():
            return models.generate(
                self.model,
                self.tokenizer,
                ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop,
                batch_size=batch_size,
                on_progress=on_progress,
            )

    def stream(
        self, prompt: str | Sequence[Message], *, system: str | None = None, **options: Any
    ) -> Generator[str, None, Generation]:
        """Yields one answer piece by piece, and returns it as a whole; ``options`` as in :meth:`generate`."""
        return (yield from models.stream(self.model, self.tokenizer, self._prompt_ids(prompt, system), **options))

    def _prompt_ids(self, prompt: str | Sequence[Message], system: str | None) -> list[int]:
        if self.reads_sources:
            return self._source_ids(prompt)
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt, add_special_tokens=True)["input_ids"])
        example = Example(origin="prompt", messages=(*prompt, Message("assistant", "")))
        return data.prompt_ids(self.tokenizer, example, system, control=self._control)

    def _source_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        if not isinstance(prompt, str):
            raise ModelError(
                "An encoder-decoder reads a text, not a conversation.",
                where="messages",
                fix="give the text as the prompt",
            )
        return data.source_ids(self.tokenizer, [prompt], self.source.prefix if self.source is not None else "")[0]


def locate(path_or_id: str) -> Source:
    """Finds out what a path or hub id refers to.

    Raises:
        ModelError: A run folder contains no trained model yet, or nothing with this name exists.
        HubUnavailable: It may be a hub id, and the hub cannot be reached.
        AdapterError: An adapter folder does not name its base.
    """
    check_name(path_or_id)
    folder = Path(path_or_id).expanduser()
    if (folder / "run.yaml").is_file():
        return _locate_run(folder)
    if (folder / "adapter_config.json").is_file():
        return _locate_adapter(folder)
    model = ModelConfig(id=path_or_id)
    try:
        return Source(model, models.stored_base(model))
    except HubUnavailable as error:
        if "/" in path_or_id and not Path(path_or_id).parent.is_dir():
            raise
        raise missing(path_or_id) from error  # hub ids have two parts: this was meant as a local path


def open_model(
    path_or_id: str | Path, *, base_only: bool = False, allow_mismatch: bool = False, sink: Sink | None = None
) -> Engine:
    """Opens a run folder, an adapter folder, a model folder or a hub id.

    The weights of a run have the format that they had in training.

    Args:
        path_or_id: What to open.
        base_only: Open the base without the adapter; after full fine-tuning, the original model.
        allow_mismatch: Attach the adapter to another base than it was trained on; the sink receives a warning.
        sink: Receives progress and warnings.

    Raises:
        ModelError: The model cannot be found or read.
        AdapterError: The adapter does not fit its base, or was trained on another base.
    """
    return open_source(locate(str(path_or_id)), base_only=base_only, allow_mismatch=allow_mismatch, sink=sink)


def open_source(
    source: Source, *, base_only: bool = False, allow_mismatch: bool = False, sink: Sink | None = None
) -> Engine:
    """Opens a source that :func:`locate` returned; arguments and errors are those of :func:`open_model`."""
    refuse_heads(source)
    opened = load(source, base_only=base_only, allow_mismatch=allow_mismatch, sink=sink)
    return Engine(opened.model, opened.tokenizer, adapted=opened.adapted, source=source)


def refuse_heads(source: Source) -> None:
    """Refuses a model that predicts no text.

    Raises:
        ModelError: It has a task head, or is an encoder.
    """
    kind = source.objective().kind
    if kind in NOT_TEXT:
        name = source.model.id if source.adapter is None else str(source.adapter)
        if kind == "reward":
            raise ModelError(f"{name} generates no text: it predicts {NOT_TEXT[kind]}.", fix="name a language model")
        example = "--question Q --context C" if kind == "answer" else "--text TEXT"
        raise ModelError(
            f"{name} generates no text: it predicts {NOT_TEXT[kind]}.",
            fix=f"ingle predict {shlex.quote(name)} {example}",
        )


def load(
    source: Source,
    *,
    base_only: bool = False,
    allow_mismatch: bool = False,
    sink: Sink | None = None,
    device: torch.device | None = None,
) -> Opened:
    """Loads a source that :func:`locate` returned, whatever it predicts; arguments as in :func:`open_model`.

    In a process that computes already, ``device`` is the one to load it on.

    Raises:
        ModelError: The model cannot be read, or ``base_only`` asks for a head that the base does not have.
        AdapterError: The adapter does not fit its base, or was trained on another base.
    """
    config = source.original if base_only and source.original is not None else source.model
    objective = source.objective()
    device = parallel.start(ParallelConfig()).device if device is None else device
    tokenizer = models.load_tokenizer(config)
    task = models.model_task(objective)
    model = models.load_model(config, source.base, device=device, sink=sink, task=task)
    if task.kind == "classify" and models.kind_of(model.config) == "causal":
        models.choose_padding(model, tokenizer, ())  # the adapter may name the one of its training
    adapted = source.adapter is not None and not base_only
    if adapted:
        assert source.adapter is not None
        for note in adapters.load_adapter(model, source.adapter, allow_mismatch=allow_mismatch).notes:
            if sink is not None:
                sink(Warned(note, where=str(source.adapter)))
    return Opened(model, tokenizer, objective, adapted)


def longest_document(source: Source, opened: Opened) -> int:
    """Returns the most tokens that a document may have: those of the run, or what the model can read."""
    if source.run is not None:
        return source.run.data.max_seq_len
    limits = (models.text_limit(opened.model), getattr(opened.tokenizer, "model_max_length", None))
    return min(_MAX_TOKENS, *(int(limit) for limit in limits if limit is not None), _MAX_TOKENS)


def _locate_run(folder: Path) -> Source:
    run = locate_paths(RunFolder(folder).load_run())
    if run.adapter.kind != "none":
        if not (folder / "adapter").is_dir():
            raise ModelError(
                "This run has no adapter yet: its training has not finished.",
                where=str(folder),
                fix=f"ingle train --resume {folder}",
            )
        return Source(run.model, run.base, folder / "adapter", keeps_control_tokens=_keeps_control_tokens(run), run=run)
    if not (folder / "model").is_dir():
        raise ModelError(
            "This run has no model yet: its training has not finished.",
            where=str(folder),
            fix=f"ingle train --resume {folder}",
        )
    trained = ModelConfig(
        id=str(folder / "model"), dtype=run.model.dtype, trust_remote_code=run.model.trust_remote_code
    )
    return Source(trained, NoBase(), original=run.model, keeps_control_tokens=_keeps_control_tokens(run), run=run)


def _keeps_control_tokens(run: Run) -> bool:
    """Returns whether prompts keep control tokens, as the training data did."""
    return run.data.control_tokens == "keep"


def _locate_adapter(folder: Path) -> Source:
    try:
        base = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
        if not isinstance(base, str) or not base or "\0" in base:
            raise ValueError("it is not a name")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(
            "The adapter does not name its base model.",
            where=str(folder / "adapter_config.json"),
            why=f"base_model_name_or_path cannot be read: {str(error)[:200]}",
            fix="open the run folder instead, or write the base model's path or hub id into that field",
        ) from error
    keeps, run = False, None
    if (folder.parent / "run.yaml").is_file():  # the run knows where its base is
        run = RunFolder(folder.parent).load_run()
        base = find_path(base, run.paths_from)
        keeps = _keeps_control_tokens(run)
    model = ModelConfig(id=base)
    held = adapters.read_record(folder).base or models.stored_base(model)
    return Source(model, held, folder, keeps_control_tokens=keeps, run=run)
