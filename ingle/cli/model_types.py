"""The command ``ingle models``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ingle.planning.model_types import ModelType


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            show_default=False,
            help="A model type (llama, t5, ...), or a model to try: a folder or a hub id.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the own Python code of a model that is tried.")
    ] = False,
) -> None:
    """List the types of models: how each is trained, in which formats, and for what.

    The table is that of the release. A model is tried by building a tiny copy from its `config.json`; no weights are
    read.
    """
    from ingle.planning.model_types import model_table

    table = model_table()
    types = list(table.types) if name is None else table.find(name) or [_try(name, trust_remote_code)]
    if as_json:
        print(json.dumps({"transformers": table.transformers, "types": [each.to_dict() for each in types]}, indent=2))
        return
    from ingle.sinks.terminal import make_console

    console = make_console()
    console.print(_table(types))
    for each in types:
        if each.reason is not None and name is not None:
            console.print(f"{each.name}, {each.kind}: {each.reason}.", markup=False)
    if name is None:
        trained = sum(each.is_trained for each in types)
        console.print(
            f"{trained} of {len(types)} are trained; transformers {table.transformers}. `ingle models NAME` says why "
            "the others are not.",
            markup=False,
        )


def _try(name: str, trust_remote_code: bool) -> ModelType:
    from ingle.config.model_names import check_name
    from ingle.errors import ModelError
    from ingle.planning.model_types import model_table
    from ingle.wording import nearest

    if "/" not in name and not Path(name).exists():
        near = nearest(name, [each.name for each in model_table().types])
        raise ModelError(
            f"There is no model type {name!r}, and no folder of this name.",
            where=name,
            fix=f"did you mean {near}?" if near else "ingle models lists all types",
        )
    check_name(name)
    from ingle.config.model import ModelConfig
    from ingle.models.survey import survey_model

    return survey_model(ModelConfig(id=name, trust_remote_code=trust_remote_code))


def _table(types: list[ModelType]) -> Table:
    from rich import box
    from rich.table import Table

    from ingle.report.model_types import COLUMNS, cells

    table = Table(box=box.SIMPLE_HEAD)
    for column in COLUMNS[:-1]:
        table.add_column(column, overflow="fold")
    for each in types:
        table.add_row(*cells(each)[:-1], style=None if each.is_trained else "dim")
    return table
