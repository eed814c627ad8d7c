"""The command ``ingle evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ingle.cli.arguments import check_writable, split_words
from ingle.cli.generation import AllowMismatch
from ingle.errors import ConfigError

if TYPE_CHECKING:
    from ingle.config import TaskConfig

_FLAGS = ("--task", "--json", "--out", "--allow-mismatch", "--debug", "--help")


def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_OR_MODEL|--option=value",
            show_default=False,
            help="A run folder (base against tuned model), an adapter or model folder, or a hub id; "
            "and options that override those of the task.",
        ),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            metavar="TASK.yaml",
            show_default=False,
            help="A file with the options of `evaluate:`, or a training config with this section. "
            "The default for a run is its own task.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the full result as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON to this file.")] = None,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Score a model on held-out samples; a run is compared with its base, sample by sample.

    - `ingle evaluate runs/mine` (the task of the run)
    - `ingle evaluate runs/mine --num_samples=50 --metrics=[bleu,chrf]` (with other options)
    - `ingle evaluate runs/mine --task other.yaml` (another task, or the config of another run)
    - `ingle evaluate Qwen/Qwen3-0.6B --task train.yaml` (a model without training)
    """
    from ingle.config import TaskConfig, load_task
    from ingle.config.model_names import check_name

    models, overrides = split_words(words, known=TaskConfig.model_fields, flags=_FLAGS)
    model = _only_model(models, task)
    check_name(model)
    loaded = load_task(task if task is not None else _own_task(Path(model).expanduser(), overrides), overrides)
    if out is not None:
        check_writable(out, "--out", "scores.json")
    from ingle import scoring
    from ingle.report.results import Comparison, to_dict
    from ingle.report.terminal_tables import comparison_table, side_by_side, summary_table
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console, show

    with Terminal(make_console(stderr=True)) as terminal:
        (result,) = scoring.evaluate(model, [loaded], terminal, allow_mismatch=allow_mismatch)
    text = json.dumps(to_dict(result), ensure_ascii=False, indent=2)
    if out is not None:
        from ingle.atomic import write_atomically

        write_atomically(out, (text + "\n").encode())
    if as_json:
        print(text)
        return
    console = make_console()
    if isinstance(result, Comparison):
        show(console, comparison_table(result), *side_by_side(result, loaded.num_shown))
    else:
        show(console, summary_table(result))


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
        raise ConfigError("The run or model to evaluate is missing.", fix=f"ingle evaluate RUN_OR_MODEL{given}")
    raise ConfigError(
        f"Expected one model, got {len(models)}: {', '.join(models)}.", fix=f"ingle evaluate {models[0]}{given}"
    )


def _own_task(folder: Path, overrides: list[str]) -> TaskConfig | None:
    """Returns the task of a run, also for its adapter or model folder; None if the options define a task."""
    from ingle.config.paths import locate_paths
    from ingle.training.folder import RunFolder

    places = (folder, folder.parent) if folder.name in ("adapter", "model") else (folder,)
    run_folder = next((place for place in places if (place / "run.yaml").is_file()), None)
    options_suffice = any(word.startswith("--sources") for word in overrides)
    if run_folder is None and not options_suffice:
        raise ConfigError(
            f"{folder} is not a run, so it has no task of its own.",
            fix=f"ingle evaluate {folder} --task TASK.yaml (or a training config with an `evaluate:` section), "
            f"or ingle evaluate {folder} --sources=[held-out.jsonl]",
        )
    task = locate_paths(RunFolder(run_folder).load_run()).task if run_folder is not None else None
    if task is None and not options_suffice:
        raise ConfigError(
            f"{run_folder} has no task: its config has no `evaluate:` section.",
            fix=f"ingle evaluate {folder} --task TASK.yaml, or ingle evaluate {folder} --sources=[held-out.jsonl]",
        )
    return task
