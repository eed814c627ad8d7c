"""``ingle train``, and the next steps that it prints after a run."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ingle import env
from ingle.cli.arguments import CONFIG, Words, load_config
from ingle.cli.launching import connected, own_command
from ingle.errors import ConfigError, IngleError
from ingle.events import Sink, Warned
from ingle.launch.local import needs_ranks, run_ranks

if TYPE_CHECKING:
    from ingle.config import LoadedRun
    from ingle.config.parallel import ParallelConfig

_FLAGS = ("--resume", "--dry-run", "--tensorboard", "--wandb", "--debug", "--help")


#: Objectives of models that generate no text.
_PREDICTING = ("classify", "tag", "answer", "mlm")


def train(
    words: Annotated[Words, CONFIG] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Resume the run in this folder, without a config.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of the run without training.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard files to the run folder.")
    ] = False,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Log the run to this Weights & Biases project.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune a model as described in a config file, and compare it with its base.

    Every option of the config can be set on the command line: `--a.b=c` or `--a.b c`, with the value in YAML.

    - `ingle train run.yaml --optim.lr=1e-4 --train.num_steps=100`
    - `ingle train run.yaml --base.format=none` (another format; the old format's options in the file are ignored)
    - `ingle train run.yaml --data.sources=[a.jsonl,b.jsonl] --data.sources.0.limit=1000`
    - `ingle train --model.id=Qwen/Qwen3-0.6B --data.sources=my.jsonl --output=runs/mine` (without a file)

    `ingle config show run.yaml` lists all options with their values; `ingle config schema` describes them.
    To resume a run that was stopped, repeat the command. Ctrl-C saves a checkpoint and stops; a second Ctrl-C stops at
    once.
    """
    with connected() as channel:
        if resume is not None:
            _check_resume(resume, words, dry_run)
            loaded, folder, parallel = None, resume, _stored_parallel(resume)
        else:
            loaded = load_config(words, "train", _FLAGS)
            folder, parallel = Path(loaded.run.output), loaded.run.parallel
            if dry_run:
                with nullcontext() if channel is None or channel.is_main else redirect_stdout(StringIO()):
                    _print_plan(loaded)  # on all ranks, which plan together
                return
        if channel is None and needs_ranks(parallel):
            flags = [*(["--tensorboard"] if tensorboard else []), *(["--wandb", wandb] if wandb else [])]
            source = [*(words or ())] if resume is None else ["--resume", str(resume)]
            code = run_ranks(own_command("train", *source, *flags), parallel)
            if code == 0:
                print_next_steps(folder)
            raise SystemExit(code)
        if channel is not None:
            channel.timeout_s = parallel.timeout_s
        is_main = channel is None or channel.is_main
        trackers = _trackers(folder, tensorboard, wandb) if is_main else []
        _train(loaded, folder, trackers, parallel.stop_timeout_s, is_main=is_main)


def _train(
    loaded: LoadedRun | None, folder: Path, trackers: Sequence[Sink], stop_timeout_s: float | None, *, is_main: bool
) -> None:
    """Trains in this process; only rank 0 prints."""
    from rich.console import Console

    from ingle import flow, stopping
    from ingle.sinks import Terminal, combine

    console = None if is_main else Console(quiet=True)
    with stopping.grace(stop_timeout_s), Terminal(console) as terminal:
        sink = combine(terminal, *trackers)
        if loaded is None:
            flow.resume(folder, sink)
        else:
            _print_notes(loaded, terminal)
            flow.finetune(loaded.run, sink)
    if is_main and env.parent_process() is None:  # which prints them itself, under the name that the user called
        print_next_steps(folder)


def _stored_parallel(folder: Path) -> ParallelConfig:
    """Returns the options of a run's processes; the defaults if the folder is not a run folder."""
    from ingle.config.parallel import ParallelConfig
    from ingle.training.folder import RunFolder

    stored = RunFolder(folder)
    return stored.load_run().parallel if stored.config.is_file() else ParallelConfig()


def _check_resume(folder: Path, words: Words, dry_run: bool) -> None:
    if words or dry_run:
        raise ConfigError(
            "--resume cannot be combined with a config, overrides or --dry-run: a run resumes with its own options.",
            where=f"--resume {folder}",
            why=f"{(words or ['--dry-run'])[0]} is also given",
            fix=f"ingle train --resume {folder}",
        )


def _trackers(folder: Path, tensorboard: bool, wandb: str | None) -> list[Sink]:
    """Makes the trackers; called before anything else, so that a missing library is reported at once."""
    from ingle.sinks import TensorBoard, Wandb

    trackers: list[Sink] = []
    if tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard"))
    if wandb is not None:
        trackers.append(Wandb(wandb))
    return trackers


def _print_notes(loaded: LoadedRun, sink: Sink) -> None:
    for note in loaded.notes:
        sink(Warned(note))


def _print_plan(loaded: LoadedRun) -> None:
    from ingle.config.paths import locate_paths
    from ingle.training.folder import RunFolder

    folder, run = RunFolder(Path(loaded.run.output)), locate_paths(loaded.run)
    outlook = folder.outlook(run)  # raises if training in this folder would
    if folder.state(run) == "finished":
        print(outlook)
        return
    from ingle import flow
    from ingle.report.plan_tables import strategies_table
    from ingle.report.terminal_tables import plan_table
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import show

    with Terminal() as terminal:
        _print_notes(loaded, terminal)
        plan = flow.plan(loaded.run, terminal)
    planned = plan.to_dict()
    memory = planned | {"fits": True, "per_device": plan.per_device.to_dict()}
    show(
        terminal.console,
        plan_table(loaded.run.model_dump(mode="json"), planned),
        strategies_table([memory], f"Memory of each process on {plan.device}"),
    )
    print(outlook)


def print_next_steps(folder: Path) -> None:
    """Prints commands that open the report of a run, chat with its model, and export it."""
    steps = next_steps(folder)
    if steps:
        print("Next:")
        width = max(len(purpose) for purpose, _ in steps)
        for purpose, line in steps:
            print(f"  {purpose:<{width}}  {line}")


def next_steps(folder: Path) -> list[tuple[str, str]]:
    """Returns purposes and commands that work for the trained model."""
    run, ingle = shlex.quote(str(folder)), command_name()
    steps = []
    if (folder / "report.html").is_file():
        page = shlex.quote(str(folder / "report.html"))
        opener = next((name for name in ("xdg-open", "open") if shutil.which(name)), None)
        steps.append(("report", f"{opener} {page}" if opener else f"{page} (open it in a browser)"))
    trained = next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), None)
    if trained is None:
        return steps
    kind = _objective(folder)
    if kind in _PREDICTING:
        example = "--question Q --context C" if kind == "answer" else "--text TEXT"
        steps.append(("predict", f"{ingle} predict {run} {example}"))
        return steps
    if kind == "reward":
        return steps
    to = "gguf"
    if kind in ("seq2seq", "span"):
        steps.append(("generate", f"{ingle} generate {run} --prompt 'Hello'"))
        to = "safetensors"  # GGUF has no file of an encoder-decoder
    elif _has_template(trained):
        steps.append(("chat", f"{ingle} chat {run}"))
        steps.append(("answer", f"{ingle} generate {run} --prompt 'Hello'"))
    else:
        steps.append(("continue a text", f"{ingle} generate {run} --raw --prompt 'Hello'"))
    out = shlex.quote(str(_unused(folder / "export")))
    steps.append(("export", f"{ingle} export {run} --to {to} --out {out}"))
    return steps


def _objective(folder: Path) -> str:
    """Returns the objective of a run; of one whose config cannot be read, that of most runs."""
    from ingle.training.folder import RunFolder

    try:
        return RunFolder(folder).load_run().objective.kind
    except IngleError:
        return "sft"


def command_name() -> str:
    """Returns how the user called ``ingle``: by name, by the path of its script, or as ``python -m ingle``."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return f"{shlex.quote(_relative(Path(sys.executable)))} -m ingle"
    found = shutil.which("ingle")
    if found is not None and Path(found).resolve() == script.resolve():
        return "ingle"
    return shlex.quote(_relative(script)) if script.name == "ingle" else "ingle"


def _relative(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def _has_template(trained: Path) -> bool:
    """Returns whether the saved tokenizer has a chat template."""
    if (trained / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((trained / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError):
        return False


def _unused(path: Path) -> Path:
    """Returns ``path`` with a number if it exists already, because an export overwrites nothing."""
    number, unused = 2, path
    while unused.exists():
        unused, number = path.with_name(f"{path.name}-{number}"), number + 1
    return unused
