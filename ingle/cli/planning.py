"""``ingle plan``: whether a run fits, how fast it is, and what it costs; loads neither torch nor transformers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingle.cli.arguments import CONFIG, Words, load_config, split_words
from ingle.cli.shapes import read_shape
from ingle.errors import ConfigError

if TYPE_CHECKING:
    from ingle.config import Run
    from ingle.planning import Device, DeviceTable, Plan, Problem
    from ingle.planning.search import Option

_FLAGS = ("--device", "--budget", "--json", "--picture", "--probe", "--debug", "--help")
#: Devices that the table lists, and strategies of the picture.
_SHOWN_OFFERS, _SHOWN_BARS = 8, 10
#: Numbers of devices to propose.
_COUNTS = (2, 4, 8)
#: Formats that a table compares with that of the config.
_FORMATS = ("none", "int8", "nf4")


def plan(
    words: Annotated[Words, CONFIG] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICES", help='Plan for these devices, e.g. "2x rtx-4090"; by default this machine\'s.'),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help='Name the fastest devices within this price, e.g. "20 EUR" or "$20".'),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the memory of each strategy as an SVG.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Make two steps on this machine, and correct the prediction by them.")
    ] = False,
) -> None:
    """Predict whether a run fits, how long it takes and what it costs, before anything is downloaded or rented.

    Needs only the model's config.json, from a folder, a GGUF file, the hub or the shapes shipped with Ingle. The size
    of the data is estimated from its files, or assumed if there are none.

    - `ingle plan run.yaml --device "2x rtx-4090"`
    - `ingle plan --model.id=meta-llama/Llama-3.1-70B --base.format=nf4 --device 4x a100-80gb --json`
    - `ingle plan run.yaml --budget "20 EUR"` (ranks rented devices)
    - `ingle plan run.yaml --device h100 --picture memory.svg`
    - `ingle plan run.yaml --probe` (reads the weights and a few rows of the data)

    Options that are `auto` (parallel.kind, parallel.recompute, parallel.offload, train.micro_batch_size) take the
    fastest values that fit. Devices and prices are a table that ~/.config/ingle/devices.toml extends.
    """
    from ingle.planning import DeviceTable

    table = DeviceTable.read()
    run, notes = _load(words)
    limit = None
    if budget is not None:
        from ingle.planning.market import parse_budget

        limit = parse_budget(budget, table)
    problem, more = read_problem(run, table, device)
    answer = _answer(problem, table, limit)
    notes += more + _device_notes(problem.device, table)
    if probe:
        answer["probe"] = _probe(problem, table, is_here=device is None)
    if picture is not None:
        _draw(problem, answer, picture)
    if as_json:
        for note in notes:
            print(f"Note: {note}", file=sys.stderr)
        print(json.dumps(answer, indent=2))
    else:
        _print(problem, answer, notes, limit)


def _probe(problem: Problem, table: DeviceTable, *, is_here: bool) -> dict[str, Any]:
    """Returns the figures of two steps, and the plan corrected by them."""
    from ingle.cli.probe import probe
    from ingle.planning.plan import describe
    from ingle.planning.search import decide

    chosen, options = decide(problem, table.devices["cpu-avx2"])
    option = chosen or min(options, key=lambda option: option.memory.total_bytes)
    return probe(problem.run, option.strategy).to_dict(describe(problem, option), is_here=is_here)


def _load(words: Words) -> tuple[Run, list[str]]:
    """Returns the run, with data and output assumed if only overrides are given."""
    from ingle.config import Run
    from ingle.config.paths import locate_paths

    files, overrides = split_words(words, known=Run.model_fields, flags=_FLAGS)
    added = []
    if not files and overrides:
        names = [override.partition("=")[0] for override in overrides]
        if not any(name.startswith("--data.sources") for name in names):
            added.append("--data.sources=[assumed.jsonl]")
        if "--output" not in names:
            added.append("--output=runs/planned")
    loaded = load_config([*(words or ()), *added], "plan", _FLAGS)
    return locate_paths(loaded.run), list(loaded.notes)


def read_problem(run: Run, table: DeviceTable, device: str | None) -> tuple[Problem, list[str]]:
    """Returns the run with its shapes and devices, and notes on what was assumed."""
    from ingle.planning import Problem, find_companions
    from ingle.planning.data_estimate import estimate_data
    from ingle.planning.rates import with_measured_rates

    shape, notes = read_shape(run)
    data, more = estimate_data(run)
    if device is not None:
        count, kind = table.parse(device)
    else:
        count, kind = table.local()
        kind = with_measured_rates(kind)
    if run.parallel.device == "cpu" and device is None:
        count, kind = 1, with_measured_rates(table.local_cpu(run.parallel.num_threads))
    companions, unread = find_companions(run, kind.dtype_bytes)
    shape = replace(shape, companions=companions)
    ranks = run.parallel.num_processes or count
    if run.parallel.kind == "none":
        ranks = 1
    local = min(ranks, count) if device is not None else ranks
    if ranks % local or (ranks > local and kind.kind != "cpu" and run.parallel.kind != "hsdp"):
        raise ConfigError(
            f"{ranks} processes need {ranks} devices, but --device names {count}.",
            where="parallel.num_processes, --device",
            fix=f'--device="{ranks}x {kind.name}", or --parallel.kind=hsdp for several machines with {count} each',
        )
    local = ranks if kind.kind == "cpu" else local
    group = run.parallel.shard_size or 1
    if ranks % group:
        raise ConfigError(
            f"{ranks} processes cannot form groups of {group} for hsdp.",
            where="parallel.shard_size, --device",
            fix=f"--parallel.shard_size={math.gcd(ranks, group)}",
        )
    dtype_bytes = {"auto": kind.dtype_bytes, "bfloat16": 2, "float32": 4}[run.model.dtype]
    free = kind.memory_bytes
    if kind.kind == "cpu":  # processes share it
        free, kind = free // ranks, kind.divided(ranks)
    return Problem(run, shape, data, kind, free, dtype_bytes, ranks, local), [*notes, *more, *unread]


def _answer(problem: Problem, table: DeviceTable, budget: float | None) -> dict[str, Any]:
    """Returns the plan as plain data, in the format of ``--json``."""
    from ingle.planning.plan import count_steps, describe
    from ingle.planning.search import decide, representatives

    count_steps(problem.run, problem.data)
    chosen, options = decide(problem, table.devices["cpu-avx2"])
    option = chosen or min(options, key=lambda option: option.memory.total_bytes)
    planned = describe(problem, option)
    here = _devices_name(problem)
    alternatives = [
        _entry(here, describe(problem, other), other.fits) | {"limit": other.limit}
        for other in representatives(options)
        if _sharing(other) != _sharing(option)
    ]
    alternatives += _changed(problem, fits=chosen is not None)
    alternatives += _offers(problem, table, budget)
    first = _entry(here, planned, option.fits)
    return {
        "fits": first["fits"],
        "strategy": first["strategy"],
        "per_device": first["per_device"],
        "host_bytes": planned.host_bytes,
        "disk_bytes": planned.disk_bytes,
        "tokens_per_s": first["tokens_per_s"],
        "hours": first["hours"],
        "price": first["price"],
        "alternatives": alternatives,
    }


def _sharing(option: Option) -> tuple[object, ...]:
    strategy = option.strategy
    return strategy.kind, strategy.recompute, strategy.offload, strategy.offload_activations


def _entry(device: str, planned: Plan, fits: bool, change: str | None = None) -> dict[str, Any]:
    return {
        "device": device,
        "change": change,
        "fits": fits,
        "strategy": planned.strategy.to_dict(),
        "per_device": planned.per_device.to_dict(),
        "tokens_per_s": planned.tokens_per_s,
        "hours": planned.hours,
        "price": planned.price,
    }


def _changed(problem: Problem, *, fits: bool) -> list[dict[str, Any]]:
    """Returns plans with other formats of the base, or, if the run does not fit, with each change that makes it fit."""
    from ingle.planning.plan import describe
    from ingle.planning.remedies import changes, with_format
    from ingle.planning.search import choose, search

    run = problem.run
    tried: Iterable[tuple[str, Problem]] = ()
    if not fits:
        tried = (*changes(problem), *_more_devices(problem))
    elif run.adapter.kind != "none" and not run.model.id.lower().endswith(".gguf"):
        tried = (with_format(problem, name) for name in _FORMATS if name != run.base.format)
    found: dict[str, dict[str, Any]] = {}
    for change, changed in tried:
        option = choose(search(changed))
        if option is not None:  # of several ranks, lengths or numbers of devices, the first
            entry = _entry(_devices_name(changed), describe(changed, option), True, change)
            found.setdefault(change.partition("=")[0] if not fits else change, entry)
    return list(found.values())


def _more_devices(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """Yields larger numbers of the same device."""
    if problem.device.kind != "cpu" and problem.run.parallel.num_processes is None:
        for count in _COUNTS:
            if count > problem.world_size:
                name = f'--device="{count}x {problem.device.name}"'
                yield name, replace(problem, world_size=count, local_world_size=count)


def _offers(problem: Problem, table: DeviceTable, budget: float | None) -> list[dict[str, Any]]:
    from ingle.planning.market import offers

    found = offers(problem, table.devices.values(), budget)
    return [
        _entry(offer.name, offer.plan, True) for offer in found[:_SHOWN_OFFERS] if budget is None or offer.within_budget
    ]


def _devices_name(problem: Problem) -> str:
    from ingle.wording import plural

    name = problem.device.name
    if problem.device.kind == "cpu":
        return f"{name}, {plural(problem.device.cores, 'core')}" + (
            f", {problem.world_size} processes" if problem.world_size > 1 else ""
        )
    return f"{problem.world_size}x {name}"


def _device_notes(device: Device, table: DeviceTable) -> list[str]:
    notes = ["Speeds are those that ingle doctor measured on this machine."] if device.is_measured else []
    if device.note:
        notes.append(f"{device.name}: {device.note}.")
    source = f"rental prices of {table.prices_of}" if device.kind == "cuda" else "the price of its energy"
    return [*notes, f"Prices are {source}."]


def _print(problem: Problem, answer: dict[str, Any], notes: Sequence[str], budget: float | None) -> None:
    from ingle.planning.remedies import find_remedy
    from ingle.planning.search import search
    from ingle.report.plan_tables import devices_table, money, strategies_table
    from ingle.sinks.terminal import make_console
    from ingle.wording import count, size

    console = make_console()
    here = _devices_name(problem)
    others = answer["alternatives"]
    same = [entry for entry in others if entry["device"] == here and entry["change"] is None]
    changed = [entry for entry in others if entry["change"] is not None]
    elsewhere = [entry for entry in others if entry["device"] != here and entry["change"] is None]
    run = problem.run
    base = "of the file" if run.model.id.lower().endswith(".gguf") else run.base.format
    console.print(
        f"{run.model.id}: {count(problem.shape.num_parameters)} parameters, base {base}, "
        f"adapter {run.adapter.kind}; {size(problem.usable_bytes)} usable per device",
        markup=False,
    )
    console.print(strategies_table([_with_limit(answer, problem), *same], f"Strategies on {here}"))
    if changed:
        console.print(strategies_table(changed, "With one change" if answer["fits"] else "Changes that make it fit"))
    if elsewhere:
        title = f"Fastest within {money(budget)}" if budget is not None else "Cheapest rented devices"
        console.print(devices_table(elsewhere, title))
    elif budget is not None:
        console.print(f"No devices of the table do it for {money(budget)}.", markup=False)
    lines = [
        f"host memory {size(answer['host_bytes'])}, disk {size(answer['disk_bytes'])}; "
        f"energy {problem.device.watts * problem.world_size * answer['hours'] / 1000:.2f} kWh",
        *notes,
    ]
    if any(entry.get("limit") == "host" for entry in same):
        lines.insert(1, f"no: host = more than the {size(problem.usable_host_bytes)} of host memory that are assumed.")
    if "probe" in answer:
        from ingle.cli.probe import probe_lines

        lines = [*probe_lines(answer["probe"]), *lines]
    if not answer["fits"]:
        fixes = [f"{entry['change']} ({size(entry['per_device']['total_bytes'])})" for entry in changed]
        least = min(search(problem), key=lambda option: option.memory.total_bytes)
        remedy = f"Try {'   or   '.join(fixes)}" if fixes else find_remedy(problem, least)
        lines.insert(0, f"It does not fit. {remedy[0].upper()}{remedy[1:]}")
    for line in lines:
        console.print(line, markup=False)


def _with_limit(answer: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """Returns the plan with the memory that is too small for it."""
    is_large = answer["per_device"]["total_bytes"] > problem.usable_bytes
    return answer | {"limit": None if answer["fits"] else "device" if is_large else "host"}


def _shortage(entry: dict[str, Any]) -> str:
    from ingle.wording import size

    needed = size(entry["per_device"]["total_bytes"])
    return f"{needed}, too little host memory" if entry["limit"] == "host" else needed


def _draw(problem: Problem, answer: dict[str, Any], path: Path) -> None:
    from ingle.atomic import write_atomically
    from ingle.report.plan_picture import Bar, plan_picture
    from ingle.report.plan_tables import strategy_name
    from ingle.wording import count

    here = _devices_name(problem)
    others = (e for e in answer["alternatives"] if e["device"] == here and e["change"] is None)
    entries = [_with_limit(answer, problem), *others]
    bars = [
        Bar(
            f"{strategy_name(entry['strategy'])}, micro-batch {entry['strategy']['micro_batch_size']}",
            entry["per_device"],
            entry["fits"],
            index == 0 and entry["fits"],
            f"{count(entry['tokens_per_s'])} tokens/s" if entry["fits"] else _shortage(entry),
        )
        for index, entry in enumerate(entries[:_SHOWN_BARS])
    ]
    title = f"{problem.run.model.id} on {here}, base {problem.run.base.format}"
    drawn = plan_picture(title, bars, problem.device.memory_bytes, problem.usable_bytes)
    write_atomically(path, drawn.encode())
