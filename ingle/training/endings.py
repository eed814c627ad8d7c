"""What a run says that ends without a report of its own: it was finished before, or it was interrupted."""

from __future__ import annotations

import shlex

from ingle import stopping
from ingle.config.run import Run
from ingle.errors import Interrupted
from ingle.events import Finished, Sink, Warned
from ingle.report.results import RunReport
from ingle.report.run_files import read_report
from ingle.training.folder import RunFolder


def already_finished(run: Run, folder: RunFolder, sink: Sink) -> RunReport:
    """Returns the report of a finished run, and says which options have no effect."""
    report = read_report(folder.report)
    sink(Warned(f"This run is finished; its report is {folder.report.with_suffix('.html')}."))
    ignored = folder.ignored(run)
    if ignored:
        command = f"ingle evaluate {shlex.quote(str(folder.path))} --task FILE"
        lines = [
            "These options differ from the finished run and have no effect:",
            *ignored,
            f"Use `{command}` to evaluate it on another task, or --output=DIR to start a new run.",
        ]
        sink(Warned("\n  ".join(lines)))
    sink(Finished(report.num_steps, report))
    return report


def interrupted(run: Run, folder: RunFolder) -> Interrupted:
    """Returns the message about what a stopped run has saved, and how to resume it."""
    stopped = f"Stopped{stopping.by_signal()}"
    if not folder.config.is_file():
        return Interrupted(f"{stopped}: no training step was made.", fix="run the same command again")
    step = folder.last_step()
    if folder.result(run).exists():
        saved = "training is complete, evaluation is not"
    elif step:
        saved = f"step {step:,} is saved in {folder.checkpoints / f'step-{step}'}"
    else:
        saved = "no step is saved yet"
    return Interrupted(
        f"{stopped}: {saved}.",
        where=str(folder.path),
        fix=f"run the same command again, or `ingle train --resume {shlex.quote(str(folder.path))}`",
    )
