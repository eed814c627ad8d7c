"""Prints the results of ``ingle data inspect`` and describes the problems that they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ingle.config.objective import ObjectiveKind, samples_answers
from ingle.report.data_results import (
    DataReport,
    DataStats,
    Duplicates,
    Ending,
    Lengths,
    Overlap,
    Pair,
    Preview,
    Remark,
    RowsReport,
    Stretch,
)
from ingle.report.preference_tables import preference_figures
from ingle.wording import plural

_BAR_WIDTH = 32
#: A larger share of unknown tokens is a problem.
_MANY_UNKNOWN = 0.01
_MAX_LABELS = 12
#: Rows of the table of classes or tags.
_MAX_CLASSES = 40
_MAX_DOCUMENT_CHARS, _MAX_MESSAGE_CHARS = 2400, 1200

#: What the share of supervised tokens means; documents of the other objectives have one loss each.
_SUPERVISED: Mapping[ObjectiveKind, str] = {
    "clm": "with loss",
    "sft": "with loss",
    "seq2seq": "with loss",
    "mlm": "that masks may hide",
    "span": "that may be removed",
    "tag": "with a tag",
    **dict.fromkeys(("reward", "dpo", "kto", "orpo", "simpo", "cpo", "bco"), "of answers"),
}
#: What marked tokens of a preview are; those of the other objectives carry loss. Texts with a label have no marks.
_MARKED: Mapping[ObjectiveKind, str] = {
    "tag": "has a tag",
    "answer": "is the answer",
    "classify": "",
    **dict.fromkeys(("reward", "dpo", "kto", "orpo", "simpo", "cpo", "bco"), "is the answer"),
}

_NO_MODEL = (
    "Tokens cannot be counted without a model. --model PATH_OR_ID shows which tokens carry loss, which documents are "
    "truncated and how they are packed."
)


def render_report(report: DataReport, console: Console) -> None:
    """Prints a report; without color, marks show which tokens carry loss."""
    for preview in report.previews:
        console.print(_draw_preview(preview, report.objective, console))
    console.print(_draw_sources(report.stats, _SUPERVISED.get(report.objective)))
    if report.labels:
        console.print(_draw_labels(report))
    name = "prompt" if samples_answers(report.objective) else "document" if report.targets is None else "source"
    console.print(_draw_lengths(f"Tokens of a {name}", report.lengths, console))
    if report.targets is not None:
        console.print(_draw_lengths("Tokens of a target", report.targets, console))
    console.print(_draw_table(_figures(report)))
    pairs = _duplicate_pairs(report.duplicates)
    if report.preferences is not None:
        pairs.append(("Judged both ways", report.preferences.contradictions))
    if report.overlap is not None:
        pairs.append(("Held-out rows whose prompt is in the training data", report.overlap.pairs))
    _print_findings(pairs, report.problems, console)


def render_rows(report: RowsReport, console: Console) -> None:
    """Prints a report that was made without a model."""
    for preview in report.previews:
        body = Text()
        for role, text in preview.parts:
            body.append(f"{role}\n", style="bold")
            body.append((text[:_MAX_MESSAGE_CHARS] + " ..." if len(text) > _MAX_MESSAGE_CHARS else text) + "\n")
        console.print(Panel(body, title=Text(preview.origin), title_align="left"))
    console.print(_draw_lengths("Characters of a row", report.characters, console))
    layouts = ", ".join(f"{name} ({plural(n, 'row')})" for name, n in report.layouts.items())
    figures = [
        ("file", report.path),
        ("rows", f"{report.rows:,}"),
        ("layout", layouts),
        ("columns", ", ".join(report.columns)),
        *([("labels", _list_labels(report.labels))] if report.labels else []),
        *_duplicate_figures(report.duplicates),
    ]
    console.print(_draw_table(figures))
    _print_findings(_duplicate_pairs(report.duplicates), report.problems, console)
    console.print(Text(_NO_MODEL))


def find_problems(
    objective: ObjectiveKind,
    stats: DataStats,
    endings: Sequence[Ending],
    duplicates: Duplicates,
    overlap: Overlap | None,
    unknown: float = 0.0,
) -> tuple[str, ...]:
    """Returns what a user should look at before training, in sentences; ``unknown`` is the share of unknown tokens."""
    problems = [_with_rows(remark, "Rows skipped: ") for remark in stats.dropped] + list(map(_with_rows, stats.remarks))
    if stats.truncated_documents:
        share = stats.truncated_documents / stats.documents
        problems.append(f"{_count(stats.truncated_documents, 'document', 'is', 'are')} cut ({share:.1%}).")
    unended = sum(ending.count for ending in endings if not ending.ends_turn)
    if objective == "sft" and unended:
        problems.append(f"{_count(unended, 'document', 'does', 'do')} not end in a token that stops generation.")
    if stats.open_turns:
        turns = _count(stats.open_turns, "trained turn", "has", "have")
        problems.append(f"{turns} no end-of-turn token in the chat template.")
    if objective in ("clm", "sft") and stats.supervised_share < 0.05:
        problems.append(f"Only {stats.supervised_share:.1%} of the tokens carry loss.")
    problems += duplicate_problems(duplicates)
    if objective in ("classify", "tag") and duplicates.same_prompt:
        repeats = _count(duplicates.same_prompt, "row", "repeats", "repeat")
        problems.append(f"{repeats} the text of an earlier row with another label.")
    if unknown > _MANY_UNKNOWN:
        problems.append(
            f"{unknown:.1%} of the tokens are unknown to the tokenizer, so the model cannot see their text."
        )
    if overlap is not None and overlap.same_prompt:
        verb = "is" if overlap.same_prompt == 1 else "are"
        prompts = plural(overlap.rows, "held-out prompt")
        problems.append(f"{overlap.same_prompt:,} of {prompts} {verb} in the training data.")
    return tuple(problems)


def duplicate_problems(duplicates: Duplicates) -> list[str]:
    """Returns what a user should know about duplicates, in sentences."""
    problems = []
    if duplicates.exact:
        verb = "is an exact duplicate" if duplicates.exact == 1 else "are exact duplicates"
        problems.append(f"{duplicates.exact:,} of {plural(duplicates.rows, 'row')} {verb}.")
    if duplicates.near > 0.05 * duplicates.compared:
        verb = "has" if duplicates.near == 1 else "have"
        rows = plural(duplicates.compared, "distinct row")
        problems.append(f"{duplicates.near:,} of {rows} {verb} a near duplicate.")
    return problems


def _count(number: int, noun: str, one: str, many: str) -> str:
    return f"{plural(number, noun)} {one if number == 1 else many}"


def _with_rows(remark: Remark, prefix: str = "") -> str:
    return f"{prefix}{remark.reason.removesuffix('.')} ({plural(remark.count, 'row')}, first {remark.first})."


def _draw_preview(preview: Preview, objective: ObjectiveKind, console: Console) -> Panel:
    plain = console.no_color or not console.is_terminal
    ascii_only = console.options.ascii_only
    newline = "\\n\n" if ascii_only else "⏎\n"
    opening, closing = ("[[", "]]") if ascii_only else ("«", "»")
    body, shown, inside = Text(), 0, False
    arrow = Stretch("\n-> " if ascii_only else "\n→ ", False, False)
    for stretch in (*preview.stretches, *([arrow] if preview.target else []), *preview.target):
        if plain and stretch.supervised != inside:
            body.append(opening if stretch.supervised else closing)
            inside = stretch.supervised
        style = "bold green" if stretch.supervised else "dim"
        text = stretch.text if stretch is arrow else stretch.text.replace("\n", newline)
        body.append(text, style=f"{style} reverse" if stretch.special else style)
        shown += len(stretch.text)
        if shown > _MAX_DOCUMENT_CHARS:
            body.append(" ...", style="dim")
            break
    if plain and inside:
        body.append(closing)
    marked = _MARKED.get(objective, "carries loss")
    legend = (f"{opening}{closing} {marked}" if plain else f"green {marked}") if marked else ""
    title = f"{preview.origin}  {plural(preview.num_tokens, 'token')}"
    if len(preview.token_types) > 1:
        title += f" (types {', '.join(f'{kind} x {count:,}' for kind, count in preview.token_types)})"
    if samples_answers(objective):
        legend = ""
        for name, value in preview.columns:
            body.append(f"\n{name}: ", style="bold")
            body.append(value[:_MAX_MESSAGE_CHARS] + " ..." if len(value) > _MAX_MESSAGE_CHARS else value)
    elif preview.label:
        title += f", {preview.label}" if preview.num_supervised else f", label {preview.label}"
    elif objective != "answer":
        title += f", {preview.num_supervised} {_SUPERVISED['tag'] if objective == 'tag' else 'with loss'}"
    return Panel(body, title=Text(title), subtitle=Text(legend), title_align="left", subtitle_align="right")


def _draw_sources(stats: DataStats, supervised: str | None) -> Table:
    table = Table(title="Sources", title_justify="left")
    table.add_column("source", overflow="fold")
    for name in ("rows", "documents", "tokens", "share", *([supervised] if supervised else [])):
        table.add_column(name, justify="right")
    for source in stats.sources:
        table.add_row(
            Text(source.path),
            f"{source.rows:,}",
            f"{source.documents:,}",
            f"{source.tokens:,}",
            f"{source.tokens / stats.tokens:.1%}",
            *([f"{source.supervised_tokens / max(source.tokens, 1):.1%}"] if supervised else []),
        )
    return table


def _draw_labels(report: DataReport) -> Table:
    total = sum(share.count for share in report.labels)
    table = Table(title="Tags" if report.objective == "tag" else "Classes", title_justify="left")
    table.add_column("label", overflow="fold")
    for name in ("words",) if report.objective == "tag" else ("rows",):
        table.add_column(name, justify="right")
    table.add_column("share", justify="right")
    if report.objective != "tag":
        table.add_column("tokens, mean", justify="right")
    for share in report.labels[:_MAX_CLASSES]:
        mean = [] if report.objective == "tag" else [f"{share.mean_tokens or 0:,.1f}"]
        table.add_row(Text(share.name), f"{share.count:,}", f"{share.count / max(total, 1):.1%}", *mean)
    if others := report.labels[_MAX_CLASSES:]:
        count = sum(share.count for share in others)
        table.add_row(f"{len(others):,} others", f"{count:,}", f"{count / max(total, 1):.1%}", style="dim")
    return table


def _count_entities(report: DataReport) -> dict[str, int]:
    """Returns the number of entities by type, from the tags that begin one; empty if no tag does."""
    found: dict[str, int] = {}
    for share in report.labels if report.objective == "tag" else ():
        prefix, _, kind = share.name.partition("-")
        if prefix in ("B", "S", "U") and kind:
            found[kind] = found.get(kind, 0) + share.count
    return found


def _draw_lengths(title: str, lengths: Lengths, console: Console) -> Group:
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


def _figures(report: DataReport) -> list[tuple[str, str]]:
    stats, packing = report.stats, report.packing
    rows = f"{stats.rows:,} read, {stats.num_dropped:,} skipped, {plural(stats.documents, 'document')}"
    split = f" ({plural(stats.split_documents, 'row')} split)" if stats.split_documents else ""
    lost = stats.truncated_tokens / max(stats.tokens + stats.truncated_tokens, 1)
    cut = f"{plural(stats.truncated_documents, 'document')}, {plural(stats.truncated_tokens, 'token')} ({lost:.1%})"
    sequences = f"{plural(packing.sequences, 'sequence')} of {packing.max_seq_len:,}, {packing.efficiency:.1%} full"
    endings = ", ".join(f"{ending.token!r} {ending.count / stats.documents:.1%}" for ending in report.endings)
    supervised = _SUPERVISED.get(report.objective)
    share = f", {stats.supervised_tokens:,} {supervised} ({stats.supervised_share:.1%})" if supervised else ""
    figures = [
        ("rows", rows + split),
        ("tokens", f"{stats.tokens:,}{share}"),
        ("truncation", cut),
    ]
    if samples_answers(report.objective):
        found = (f"{each.name} ({plural(each.count, 'prompt')})" for each in report.columns)
        figures.append(("columns for rewards", ", ".join(found) or "none"))
    else:
        figures.append(("packing" if packing.enabled else "no packing", sequences))
    if endings:
        figures.append(("documents end in", endings))
    if report.answered is not None:
        windows = f"{plural(stats.documents, 'window')}, {report.answered:,} with the answer"
        figures.append(("windows of contexts", windows))
    if entities := _count_entities(report):
        figures.append(("entities", ", ".join(f"{kind} {count:,}" for kind, count in entities.items())))
    if stats.control_tokens:
        found = (f"{r.reason} ({plural(r.count, 'row')}, first {r.first})" for r in stats.control_tokens)
        figures.append(("control tokens in messages", ", ".join(found)))
    if report.preferences is not None:
        figures += preference_figures(report.preferences)
    figures += _duplicate_figures(report.duplicates)
    other = "same text, other label" if report.objective in ("classify", "tag") else "same prompt, other answer"
    if not samples_answers(report.objective):
        figures.append((other, plural(report.duplicates.same_prompt, "row")))
    if (overlap := report.overlap) is not None:
        first, second = ("text", "label") if report.objective in ("classify", "tag") else ("prompt", "answer")
        same = f"{overlap.same_prompt:,} of {overlap.rows:,} by {first}, {overlap.same_row:,} by {first} and {second}"
        grams = f"{overlap.ngram_share:.1%} of {overlap.ngram_words}-grams; "
        half = f"{overlap.half_seen:,} of {plural(overlap.answers, 'answer')} at least by half"
        figures.append(("held-out rows in training", same))
        if report.objective in ("clm", "sft", "seq2seq"):  # labels have no words of their own
            figures.append(("held-out answers in training", grams + half))
    return figures


def _list_labels(labels: Mapping[str, int]) -> str:
    most = sorted(labels.items(), key=lambda item: -item[1])
    more = f" and {len(most) - _MAX_LABELS:,} more" if len(most) > _MAX_LABELS else ""
    return ", ".join(f"{name} {count:,}" for name, count in most[:_MAX_LABELS]) + more


def _duplicate_figures(duplicates: Duplicates) -> list[tuple[str, str]]:
    near = f"{duplicates.near:,} of {plural(duplicates.compared, 'distinct row')} compared"
    return [("exact duplicates", plural(duplicates.exact, "row")), ("near duplicates", near)]


def _draw_table(figures: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in figures:
        table.add_row(name, Text(value))
    return table


def _duplicate_pairs(duplicates: Duplicates) -> list[tuple[str, tuple[Pair, ...]]]:
    return [("Exact duplicates", duplicates.exact_pairs), ("Near duplicates", duplicates.near_pairs)]


def _print_findings(pairs: Sequence[tuple[str, tuple[Pair, ...]]], problems: Sequence[str], console: Console) -> None:
    for title, examples in pairs:
        if examples:
            console.print(Text(f"{title}, for example", style="bold"))
            for pair in examples:
                console.print(Text(f"  {pair.second} = {pair.first}  ({pair.similarity:.0%})"))
    if problems:
        console.print(Text("Problems", style="bold"))
        for problem in problems:
            console.print(Text(f"  ! {problem}", style="yellow"))
    elif any(examples for _, examples in pairs):
        console.print(Text("No problems were found apart from the few rows listed above.", style="green"))
    else:
        console.print(Text("No problems were found.", style="green"))
