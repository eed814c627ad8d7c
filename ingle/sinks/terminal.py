"""Terminal output: a live progress bar on a terminal, plain lines in logs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from ingle import events
from ingle.events import Evaluated, Event, Failed, Finished, Proved, Sampled, Saved, Started, Step, Validated, Warned
from ingle.report.terminal_tables import audit_table, comparison_table, finish_lines, plan_table, side_by_side
from ingle.wording import count, duration, size

#: Columns of output that is no terminal.
_PLAIN_WIDTH = 120
#: Columns from which the bar has room for the speed next to the validation loss.
_WIDE = 100
#: Share of a long stage between two lines, without a live bar.
_PLAIN_SHARE = 0.25
#: Characters of a sampled answer to show.
_MAX_ANSWER = 160
#: Shorter stages print no line.
_PLAIN_SILENCE_S = 2.0


class Terminal:
    """Shows a run. As a context manager, it removes its progress bar however the block ends.

    On a terminal, it shows one live bar; elsewhere, a line per logged step and at each quarter of a long stage.

    Args:
        console: Console to print on; standard output by default.
        clock: Monotonic time in seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or make_console()
        self._clock = clock
        self._live: Progress | None = None
        self._stages: dict[str, TaskID] = {}
        self._reported: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._compared = False
        self._warnings: Counter[str] = Counter()
        self._printed: Counter[str] = Counter()
        self._training: TaskID | None = None
        self._num_steps = 0
        self._first_step = 0
        self._log_every = 1
        self._num_shown = 3
        self._began = 0.0
        self._validation = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Receives an event."""
        match event:
            case Started():
                self._start(event)
            case Proved():
                self._print(f"Checked the start: {', '.join(map(_checked, event.checks, event.checks.values()))}")
            case Step():
                self._step(event)
            case Sampled():
                self._sample(event)
            case Validated():
                self._validate(event)
            case events.Progress():
                self._stage(event)
            case Warned():
                self._warn(event)
            case Evaluated():
                self._stop()
                self._compared = True
                show(self.console, comparison_table(event.comparison), *side_by_side(event.comparison, self._num_shown))
            case Saved():
                if event.kind != "checkpoint" or not self.console.is_terminal:
                    self._print(f"Saved {event.kind}: {event.path}")
            case Finished():
                self.close()
                if event.report.metrics and not self._compared:  # a run that was finished before
                    show(self.console, comparison_table(event.report))
                for line in finish_lines(event.report):
                    self._print(line)
            case Failed():
                self.close()

    def close(self) -> None:
        """Removes the live bar and prints how often each warning occurred."""
        self._stop()
        for message, total in self._warnings.items():
            if total > self._printed[message]:
                self._print(f"Warning: {message} ({total:,} times in total)", style="yellow")
        self._warnings.clear()
        self._printed.clear()

    def _start(self, event: Started) -> None:
        self._stop()
        self._num_steps, self._first_step = event.num_steps, event.step
        self._log_every = event.run.get("train", {}).get("log_every", 1)
        self._num_shown = (event.run.get("evaluate") or {}).get("num_shown", 3)
        show(self.console, plan_table(event.run, event.plan), audit_table(event.audit))
        if event.resumed_from:
            self._print(f"Resuming from {event.resumed_from}; {event.step:,} of {event.num_steps:,} steps done.")
        self._validation = ""
        self._began = self._clock()

    def _step(self, event: Step) -> None:
        made = event.step - self._first_step
        left = (self._clock() - self._began) / max(made, 1) * (self._num_steps - event.step)
        loss, speed = f"loss {event.loss:.4f}", f"{count(event.tokens_per_s)} tokens/s"
        if "reward" in event.metrics:  # the loss of a policy says little
            kl = f"  kl {event.metrics['kl']:.3g}" if "kl" in event.metrics else ""
            loss = f"reward {event.metrics['reward']:.4f}{kl}"
        elif "rewards/accuracy" in event.metrics:
            loss += f"  accuracy {event.metrics['rewards/accuracy']:.2f}"
        facts = f"{loss}  {speed}  lr {event.lr:.2e}"
        is_last = event.step == self._num_steps
        if self.console.is_terminal:
            live = self._progress()
            if self._training is None:
                self._training = live.add_task("Training", total=self._num_steps, completed=self._first_step, facts="")
            shown = facts
            if self._validation:
                shown = "  ".join([loss, self._validation, *([speed] if self.console.width >= _WIDE else [])])
            live.update(self._training, completed=event.step, facts=f"{shown}  ETA {duration(left)}")
            if is_last:
                self._stop()
        if is_last or (not self.console.is_terminal and event.step % self._log_every == 0):
            end = f"took {duration(self._clock() - self._began)}" if is_last else f"ETA {duration(left)}"
            self._print(
                f"Step {event.step}/{self._num_steps}  {facts}  grad {event.grad_norm:.3g}  "
                f"{size(event.peak_memory_bytes)}  {end}"
            )

    def _validate(self, event: Validated) -> None:
        """Shows the validation loss in the bar, or on a line of its own."""
        is_best = event.best_step == event.step
        self._validation = f"val {event.loss:.4f} ({'best' if is_best else f'best {event.best_loss:.4f}'})"
        if not self.console.is_terminal:
            best = "the lowest so far" if is_best else f"lowest {event.best_loss:.4f} at step {event.best_step:,}"
            metrics = "".join(f"  {name} {value:.4g}" for name, value in event.metrics.items())
            self._print(f"Validation {event.step}/{self._num_steps}  loss {event.loss:.4f}, {best}{metrics}")

    def _sample(self, event: Sampled) -> None:
        """Shows the first of the sampled answers, as often as steps."""
        due = event.iteration == 0 or event.step % self._log_every == 0
        for sample in event.samples[:1] if due else ():
            reward = "none" if sample["reward"] is None else f"{sample['reward']:.3g}"
            answer = " ".join(str(sample["answer"]).split())
            shown = answer if len(answer) <= _MAX_ANSWER else f"{answer[:_MAX_ANSWER]} ..."
            self._print(f"Answer {event.iteration + 1}  reward {reward}  {shown}")

    def _stage(self, event: events.Progress) -> None:
        if self.console.is_terminal:
            live = self._progress()
            if event.stage not in self._stages:
                # A stage of unknown length is over when the next one begins.
                for task in [task for task in live.tasks if task.total is None]:
                    live.remove_task(self._stages.pop(task.description))
                self._stages[event.stage] = live.add_task(event.stage, total=event.total, facts="")
            live.update(self._stages[event.stage], completed=event.done, total=event.total)
            if event.total is not None and event.done >= event.total:
                live.remove_task(self._stages.pop(event.stage))
            return
        self._plain_stage(event)

    def _plain_stage(self, event: events.Progress) -> None:
        """Prints a line at each quarter of a stage that is not short."""
        now = self._clock()
        is_over = event.total is not None and event.done >= event.total
        share = event.done / event.total if event.total else 0.0
        if now - self._since.setdefault(event.stage, now) >= _PLAIN_SILENCE_S:
            reported = self._reported.get(event.stage)
            if reported is None or share >= reported + _PLAIN_SHARE or is_over:
                total = f" of {event.total:,}" if event.total is not None else ""
                self._print(f"{event.stage}: {event.done:,}{total}")
                self._reported[event.stage] = share
        if is_over:
            self._reported.pop(event.stage, None)
            self._since.pop(event.stage, None)

    def _warn(self, event: Warned) -> None:
        word, style = ("Note", "") if event.is_note else ("Warning", "yellow")
        self._warnings[event.message] += event.count * (not event.is_note)
        if event.message not in self._printed:
            self._printed[event.message] = event.count
            where = f" [{event.where}]" if event.where else ""
            often = f" ({event.count:,} times)" if event.count > 1 and str(event.count) not in event.message else ""
            self._print(f"{word}: {event.message}{often}{where}", style=style)

    def _progress(self) -> Progress:
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
                TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),
                console=self.console,
                transient=True,
                expand=True,
            )
            self._live.start()
        return self._live

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._stages.clear()
        self._training = None

    def _print(self, line: str, style: str = "") -> None:
        # Text, not markup: a path or a message may contain brackets.
        self.console.print(Text(line, style=style), soft_wrap=True)


def _checked(name: str, found: dict[str, float]) -> str:
    """Returns a check of the start: how far it is off, or the value that it has."""
    return f"{name} ({found['measured']:.3g} off)" if found["expected"] == 0 else f"{name} {found['measured']:.6g}"


def show(console: Console, *renderables: RenderableType) -> None:
    """Prints tables; without trailing spaces if the output is no terminal."""
    for renderable in renderables:
        if console.is_terminal:
            console.print(renderable)
            continue
        with console.capture() as capture:
            console.print(renderable)
        lines = "\n".join(line.rstrip() for line in capture.get().splitlines())
        console.print(Text(lines), soft_wrap=True)


def make_console(*, stderr: bool = False) -> Console:
    """Returns a console as wide as the terminal, or wide enough for the tables if there is none."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)
