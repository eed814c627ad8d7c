"""``ingle quantize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ingle.export import QuantizationResult


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An unquantized model (16 or 32 bits): a folder or a hub id.")
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            show_default=False,
            help="GGUF: q4_k_m, q5_k_m, q6_k, q8_0, q4_0, ..., bf16. safetensors: nf4, fp4, int8, hqq-4 (or 8, 3, 2, "
            "1 bits; hqq-3-g32 for groups of 32).",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="PATH", show_default=False, help="A .gguf file or a new folder; nothing is overwritten."),
    ],
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Importance matrix, for hqq and GGUF types that quantize. Without --data the file is read; with "
            "--data the matrix is gathered and written to it.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Text from which to gather an importance matrix."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens of --data to read, from its start.")] = 65_536,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantize a model to any format, and report what each class of weights lost.

    - `ingle quantize my-model --to q4_k_m --out my-model.gguf --data text.jsonl`
    - `ingle quantize my-model --to nf4 --out my-model-nf4` (loads in Ingle and in transformers)

    Use `ingle export` for a trained adapter, and `ingle formats` to find the format that suits a model.
    """
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console, show

    with Terminal(make_console(stderr=True)) as terminal:
        from ingle.export import quantize as run_quantize

        result = run_quantize(model, to, out, imatrix=imatrix, data=data, num_tokens=tokens, sink=terminal)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
        return
    show(make_console(), *_render(result))


def _render(result: QuantizationResult) -> list[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ingle.wording import count, size

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("weights", no_wrap=True)
    table.add_column("types")
    for head in ("number", "bits", "relative error"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, loss in result.classes.items():
        types = ", ".join(sorted(loss.types, key=lambda kind: -loss.types[kind]))
        error = f"{loss.relative_error:.4f}" if loss.relative_error else "0"
        table.add_row(name, types, count(loss.num_weights), f"{loss.bits_per_weight:.2f}", error)
    before, after = result.num_bytes_before, result.num_bytes
    lines = [
        f"  {size(before)} -> {size(after)} ({after / before:.0%}), {result.bits_per_weight:.2f} bits per weight.",
        "  Relative error: RMS of the error over RMS of the weights, read back from the written files.",
    ]
    if result.imatrix is not None:
        lines.append(f"  Used the importance matrix of {result.imatrix}.")
    lines.append(f"  Wrote {result.path}.")
    return [table, *(Text(line) for line in lines)]
