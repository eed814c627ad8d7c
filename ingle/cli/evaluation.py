"""``ingle evaluate``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingle.cli.arguments import split_words
from ingle.cli.generation import AllowMismatch
from ingle.errors import ConfigError
from ingle.events import Sink

if TYPE_CHECKING:
    from ingle.config import TaskConfig

_FLAGS = ("--task", "--json", "--out", "--allow-mismatch", "--debug", "--help")


def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_OR_MODEL|--option=value",
            show_default=False,
            help="A run folder (base against tuned), an adapter or model folder or a hub id; "
            "and options that win over the task's.",
        ),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            metavar="TASK.yaml",
            show_default=False,
            help="What to ask: a file with the options of `evaluate:`, or a training config that has this section. "
            "A run is asked its own task when none is given.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON into this file.")] = None,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Score a model on held-out samples; a run is compared with its base, sample by sample.

    - `ingle evaluate runs/mine` (its own task again)
    - `ingle evaluate runs/mine --num_samples=50 --metrics=[bleu,chrf]` (with other options of the task)
    - `ingle evaluate runs/mine --task other.yaml` (another task, or another run's config)
    - `ingle evaluate Qwen/Qwen3-0.6B --task train.yaml` (a model alone)
    """
    from ingle.config import TaskConfig, load_task
    from ingle.config.model_names import check_name

    models, overrides = split_words(words, known=TaskConfig.model_fields, flags=_FLAGS)
    model = _only_model(models, task)
    check_name(model)
    loaded = load_task(task if task is not None else _own_task(Path(model).expanduser(), overrides), overrides)
    if out is not None:
        _require_place(out)
    from ingle.sinks import Terminal
    from ingle.sinks.tables import comparison_table, side_by_side, summary_table
    from ingle.sinks.terminal import make_console, show

    with Terminal(make_console(stderr=True)) as terminal:
        report = evaluate_model(model, loaded, terminal, allow_mismatch=allow_mismatch)
    text = json.dumps(report, ensure_ascii=False, indent=2)
    if out is not None:
        from ingle.atomic import write_atomically

        write_atomically(out, (text + "\n").encode())
    if as_json:
        print(text)
        return
    console = make_console()
    if "verdict" not in report:
        show(console, summary_table(report))
        return
    show(console, comparison_table(report), *side_by_side(report, loaded.num_shown))


def _only_model(models: list[str], task: Path | None) -> str:
    if len(models) == 1 and Path(models[0]).suffix not in (".yaml", ".yml"):
        return models[0]
    if len(models) == 1:
        raise ConfigError(
            f"{models[0]} is a config; the model to evaluate is missing.",
            fix=f"ingle evaluate RUN_OR_MODEL --task {models[0]}",
        )
    given = f" --task {task}" if task is not None else ""
    if not models:
        raise ConfigError("No run and no model is named.", fix=f"ingle evaluate RUN_OR_MODEL{given}")
    raise ConfigError(
        f"One model at a time, not {len(models)}: {', '.join(models)}.", fix=f"ingle evaluate {models[0]}{given}"
    )


def _own_task(folder: Path, overrides: list[str]) -> TaskConfig | None:
    """The task that a run was evaluated with, None where the options are a task of their own.

    The folder may be that of the run's adapter or model.
    """
    from ingle.config.paths import locate_paths
    from ingle.training.folder import RunFolder

    places = (folder, folder.parent) if folder.name in ("adapter", "model") else (folder,)
    run_folder = next((place for place in places if (place / "run.yaml").is_file()), None)
    options_suffice = any(word.startswith("--sources") for word in overrides)
    if run_folder is None and not options_suffice:
        raise ConfigError(
            f"{folder} is not a run, so it has no task of its own.",
            fix=f"ingle evaluate {folder} --task TASK.yaml (a training config with an `evaluate:` section will do), "
            f"or ingle evaluate {folder} --sources=[held-out.jsonl]",
        )
    task = locate_paths(RunFolder(run_folder).load_run()).evaluate if run_folder is not None else None
    if task is None and not options_suffice:
        raise ConfigError(
            f"{run_folder} was trained without a task: its config has no `evaluate:` section.",
            fix=f"ingle evaluate {folder} --task TASK.yaml, or ingle evaluate {folder} --sources=[held-out.jsonl]",
        )
    return task


def _require_place(out: Path) -> None:
    """Refuses a file that could not be written, before the work and not after it."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder.", where=f"--out {out}", fix=f"--out {out / 'scores.json'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The folder {out.parent} cannot be made.",
            where=f"--out {out}",
            why=error.strerror,
            fix="name another file",
        ) from error
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"Nothing can be written in {out.parent}.", where=f"--out {out}", fix="name another file")


def evaluate_model(path_or_id: str, task: TaskConfig, sink: Sink, *, allow_mismatch: bool = False) -> dict[str, Any]:
    """Scores what ``path_or_id`` names: against its base when it was trained here, alone otherwise.

    Args:
        path_or_id: A run folder, an adapter folder, a model folder or a hub id.
        task: What to ask and how to score the answers.
        sink: Takes the progress.
        allow_mismatch: Put the adapter on another base than it was trained on.

    Returns:
        What :func:`ingle.evaluation.compare` or :func:`ingle.evaluation.summarize` returns.
    """
    from ingle import evaluation, inference

    base = None
    if inference.locate(path_or_id).original is not None:
        # A fully fine-tuned model holds no base to go back to, so the two are opened one after the other.
        before = inference.open_model(path_or_id, base_only=True, sink=sink)
        base = evaluation.run_task(before.model, before.tokenizer, task, sink=sink, stage="base")
        del before
    engine = inference.open_model(path_or_id, allow_mismatch=allow_mismatch, sink=sink)
    if base is None and not engine.adapted:
        return evaluation.evaluate_single(engine.model, engine.tokenizer, task, sink=sink)
    return evaluation.evaluate_pair(engine.model, engine.tokenizer, task, sink=sink, base=base)
