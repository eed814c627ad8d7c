"""``ingle train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ingle.cli.configs import CONFIG, Words, load_config
from ingle.cli.next_steps import print_next_steps
from ingle.errors import ConfigError
from ingle.events import Sink, Warned

if TYPE_CHECKING:
    from ingle.config import LoadedRun

_FLAGS = ("--resume", "--dry-run", "--tensorboard", "--wandb", "--debug", "--help")


def train(
    words: Annotated[Words, CONFIG] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Continue the run in this folder; takes no config.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of the run and stop.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard files into the run folder.")
    ] = False,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Send the run to this Weights & Biases project.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune a model as a config file says, and compare it with its base.

    Every option of the config can be set on the command line: `--a.b=c` or `--a.b c`, the value written as in YAML.

    - `ingle train run.yaml --optim.lr=1e-4 --train.num_steps=100`
    - `ingle train run.yaml --base.format=none` (another format; options of the old one in the file are left out)
    - `ingle train run.yaml --data.sources=[a.jsonl,b.jsonl] --data.sources.0.limit=1000`
    - `ingle train --model.id=Qwen/Qwen3-0.6B --data.sources=my.jsonl --output=runs/mine` (no file at all)

    `ingle config show run.yaml` lists all options with their values; `ingle config schema` describes each of them.
    The same command again resumes a run that was stopped, and says so when it is finished. Ctrl-C saves a checkpoint
    first; a second Ctrl-C stops at once.
    """
    if resume is not None:
        _resume(resume, words, dry_run, tensorboard, wandb)
        return
    loaded = load_config(words, "train", _FLAGS)
    if dry_run:
        _print_plan(loaded)
        return
    trackers = _trackers(Path(loaded.run.output), tensorboard, wandb)
    from ingle import flow
    from ingle.sinks import Terminal, combine

    with Terminal() as terminal:
        for note in loaded.notes:
            terminal(Warned(note))
        flow.finetune(loaded.run, combine(terminal, *trackers))
    print_next_steps(Path(loaded.run.output))


def _resume(folder: Path, words: Words, dry_run: bool, tensorboard: bool, wandb: str | None) -> None:
    if words or dry_run:
        raise ConfigError(
            "--resume takes no config, no overrides and no --dry-run: a run continues with its own options.",
            where=f"--resume {folder}",
            why=f"{(words or ['--dry-run'])[0]} is given too",
            fix=f"ingle train --resume {folder}",
        )
    trackers = _trackers(folder, tensorboard, wandb)
    from ingle import flow
    from ingle.sinks import Terminal, combine

    with Terminal() as terminal:
        flow.resume(folder, combine(terminal, *trackers))
    print_next_steps(folder)


def _trackers(folder: Path, tensorboard: bool, wandb: str | None) -> list[Sink]:
    """The trackers asked for; made before anything else, so that a missing library is reported at once."""
    from ingle.sinks import TensorBoard, Wandb

    trackers: list[Sink] = []
    if tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard"))
    if wandb is not None:
        trackers.append(Wandb(wandb))
    return trackers


def _print_plan(loaded: LoadedRun) -> None:
    from ingle.config.paths import locate_paths
    from ingle.training.folder import RunFolder

    folder, run = RunFolder(Path(loaded.run.output)), locate_paths(loaded.run)
    outlook = folder.outlook(run)  # a folder that would be refused is refused here as well
    if folder.state(run) == "finished":
        print(outlook)
        return
    from ingle import flow
    from ingle.report.terminal_tables import plan_table
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import show

    with Terminal() as terminal:
        for note in loaded.notes:
            terminal(Warned(note))
        plan = flow.plan(loaded.run, terminal)
    show(terminal.console, plan_table(loaded.run.model_dump(mode="json"), plan.to_dict()))
    print(outlook)
