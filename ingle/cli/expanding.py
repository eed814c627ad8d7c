"""``ingle expand``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def expand(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An unquantized model (16 or 32 bits): a folder or a hub id.")
    ],
    blocks: Annotated[int, typer.Option(min=1, metavar="N", show_default=False, help="Number of layers to add.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", show_default=False, help="A new folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Add layers to a model that change nothing yet, to train them alone (block expansion).

    - `ingle expand my-model --blocks 2 --out my-larger-model`

    The new layers are copies whose attention and MLP end in zeros. The command ends with the options that train them
    and nothing else.
    """
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    with Terminal(make_console(stderr=True)) as terminal:
        from ingle.export import expand as run_expand

        result = run_expand(model, blocks, out, sink=terminal)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
        return
    from ingle.wording import count

    print(f"  {result.num_layers} layers, {len(result.new_layers)} of them new: {', '.join(result.new_layers)}.")
    print(f"  {count(result.num_new)} of {count(result.num_weights)} weights are new. The logits are the same.")
    print(f"  Wrote {result.path}. To train the new layers only:")
    print(f"    --model.id={result.path} --base.format=none --adapter.target_modules=none")
    print(f"    --adapter.trainable_modules=[{','.join(result.new_layers)}]")
