"""What the data doctor found, as plain data and on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ingle.data.duplicates import Duplicates, Overlap, Pair
from ingle.data.statistics import DataStats
from ingle.wording import plural

_NUM_BARS = 12
_BAR_WIDTH = 32
_MAX_SHOWN_CHARS = 2400


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens of one kind, decoded."""

    text: str
    supervised: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Preview:
    """One document as the model sees it."""

    origin: str
    num_tokens: int
    num_supervised: int
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """Documents with ``low <= tokens <= high``."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How many documents end, as far as they carry loss, with a token."""

    token: str
    count: int
    ends_turn: bool


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of documents, after truncation."""

    min: int
    median: float
    mean: float
    p95: float
    max: int
    histogram: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Packing:
    """How documents fill sequences.

    Attributes:
        enabled: ``data.packing``.
        sequences: Of an epoch.
        max_seq_len: Room of each.
        efficiency: Tokens over the room of all sequences.
    """

    enabled: bool
    sequences: int
    max_seq_len: int
    efficiency: float


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything ``ingle data inspect`` tells.

    Attributes:
        objective: ``clm`` or ``sft``.
        stats: What became of the rows.
        lengths: Of documents.
        packing: Into sequences.
        endings: With what token documents stop, most frequent first.
        duplicates: Within training.
        overlap: Between training and held-out rows; None without held-out rows.
        previews: A few documents.
        problems: What to look at, in sentences.
    """

    objective: Literal["clm", "sft"]
    stats: DataStats
    lengths: Lengths
    packing: Packing
    endings: tuple[Ending, ...]
    duplicates: Duplicates
    overlap: Overlap | None
    previews: tuple[Preview, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def render_report(report: DataReport, console: Console) -> None:
    """Print a report; without colour, supervision is shown by marks."""
    for preview in report.previews:
        console.print(_draw_preview(preview, console))
    console.print(_draw_sources(report))
    console.print(draw_lengths("Tokens of a document", report.lengths, console))
    console.print(_draw_figures(report))
    for title, pairs in _listed_pairs(report):
        console.print(draw_pairs(title, pairs))
    draw_problems(report.problems, bool(_listed_pairs(report)), console)


def draw_problems(problems: Sequence[str], listed: bool, console: Console) -> None:
    """What to look at.  ``listed``: something is listed above that is too little for a sentence of its own."""
    if problems:
        console.print(Text("To look at", style="bold"))
        for problem in problems:
            console.print(Text(f"  ! {problem}", style="yellow"))
    elif listed:
        console.print(Text("There is nothing to look at but the few rows listed above.", style="green"))
    else:
        console.print(Text("Nothing odd was found.", style="green"))


def _draw_preview(preview: Preview, console: Console) -> Panel:
    plain = console.no_color or not console.is_terminal
    ascii_only = console.options.ascii_only
    newline = "\\n\n" if ascii_only else "⏎\n"
    opening, closing = ("[[", "]]") if ascii_only else ("«", "»")
    body, shown, inside = Text(), 0, False
    for stretch in preview.stretches:
        if plain and stretch.supervised != inside:
            body.append(opening if stretch.supervised else closing)
            inside = stretch.supervised
        style = "bold green" if stretch.supervised else "dim"
        body.append(stretch.text.replace("\n", newline), style=f"{style} reverse" if stretch.special else style)
        shown += len(stretch.text)
        if shown > _MAX_SHOWN_CHARS:
            body.append(" ...", style="dim")
            break
    if plain and inside:
        body.append(closing)
    legend = f"{opening}{closing} carries loss" if plain else "green carries loss"
    title = f"{preview.origin}  {plural(preview.num_tokens, 'token')}, {preview.num_supervised} with loss"
    return Panel(body, title=Text(title), subtitle=Text(legend), title_align="left", subtitle_align="right")


def _draw_sources(report: DataReport) -> Table:
    table = Table(title="Sources", title_justify="left")
    table.add_column("source", overflow="fold")
    for name in ("rows", "documents", "tokens", "share", "with loss"):
        table.add_column(name, justify="right")
    for source in report.stats.sources:
        table.add_row(
            Text(source.path),
            f"{source.rows:,}",
            f"{source.documents:,}",
            f"{source.tokens:,}",
            f"{source.tokens / report.stats.tokens:.1%}",
            f"{source.supervised_tokens / max(source.tokens, 1):.1%}",
        )
    return table


def measure(lengths: npt.NDArray[np.int64]) -> Lengths:
    """Figures and histogram of lengths, int64 [D]."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _NUM_BARS)
    counts = np.bincount((lengths - low) // width)
    bars = (Bar(low + i * width, min(low + (i + 1) * width - 1, high), int(n)) for i, n in enumerate(counts))
    return Lengths(
        min=low,
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        p95=float(np.percentile(lengths, 95)),
        max=high,
        histogram=tuple(bars),
    )


def draw_lengths(title: str, lengths: Lengths, console: Console) -> Group:
    """A histogram."""
    block = "#" if console.options.ascii_only else "█"
    most = max(bar.count for bar in lengths.histogram)
    head = (
        f"{title}: {lengths.min:,} to {lengths.max:,}, median {lengths.median:,.0f}, "
        f"mean {lengths.mean:,.1f}, 95 % below {lengths.p95:,.0f}"
    )
    width = len(f"{lengths.histogram[-1].high:,}")
    lines = [Text(head, style="bold")]
    for bar in lengths.histogram:
        size = -(-bar.count * _BAR_WIDTH // most)
        lines.append(Text(f"  {bar.low:>{width},} - {bar.high:>{width},}  {block * size:<{_BAR_WIDTH}}  {bar.count:,}"))
    return Group(*lines)


def _draw_figures(report: DataReport) -> Table:
    stats, packing, duplicates = report.stats, report.packing, report.duplicates
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    kept = f"{stats.rows:,} read, {stats.num_dropped:,} skipped, {plural(stats.documents, 'document')}"
    table.add_row("rows", kept + (f" ({plural(stats.split_documents, 'row')} split)" if stats.split_documents else ""))
    table.add_row("tokens", f"{stats.tokens:,}, {stats.supervised_tokens:,} with loss ({stats.supervised_share:.1%})")
    lost = stats.truncated_tokens / max(stats.tokens + stats.truncated_tokens, 1)
    table.add_row(
        "truncation",
        f"{plural(stats.truncated_documents, 'document')}, {plural(stats.truncated_tokens, 'token')} ({lost:.1%})",
    )
    how = "packing" if packing.enabled else "no packing"
    table.add_row(
        how, f"{plural(packing.sequences, 'sequence')} of {packing.max_seq_len:,}, filled to {packing.efficiency:.1%}"
    )
    endings = ", ".join(f"{ending.token!r} {ending.count / stats.documents:.1%}" for ending in report.endings)
    table.add_row("documents end in", Text(endings))
    if stats.control_tokens:
        found = ", ".join(f"{r.reason} ({plural(r.count, 'row')}, first {r.first})" for r in stats.control_tokens)
        table.add_row("control tokens in messages", Text(found))
    table.add_row("exact duplicates", plural(duplicates.exact, "row"))
    table.add_row("near duplicates", f"{duplicates.near:,} of {plural(duplicates.compared, 'distinct row')} compared")
    table.add_row("same prompt, other answer", plural(duplicates.same_prompt, "row"))
    if report.overlap is not None:
        overlap = report.overlap
        table.add_row(
            "held-out rows in training",
            f"{overlap.same_prompt:,} of {overlap.rows:,} by prompt, {overlap.same_row:,} by prompt and answer",
        )
        seen = f"{overlap.ngram_share:.1%} of {overlap.ngram_words}-grams; {overlap.half_seen:,} of {overlap.answers:,}"
        table.add_row("held-out answers in training", f"{seen} answers at least by half")
    return table


def _listed_pairs(report: DataReport) -> list[tuple[str, tuple[Pair, ...]]]:
    lists = [("Exact duplicates", report.duplicates.exact_pairs), ("Near duplicates", report.duplicates.near_pairs)]
    if report.overlap is not None:
        lists.append(("Held-out rows whose prompt is in training", report.overlap.pairs))
    return [(title, pairs) for title, pairs in lists if pairs]


def draw_pairs(title: str, pairs: tuple[Pair, ...]) -> Group:
    """Examples of rows that are alike."""
    lines = [Text(f"{title}, for example", style="bold")]
    lines += [Text(f"  {pair.second} = {pair.first}  ({pair.similarity:.0%})") for pair in pairs]
    return Group(*lines)
