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
    blocks: Annotated[int, typer.Option(min=1, max=10_000, help="Number of new layers, one after each equal group.")],
    out: Annotated[Path, typer.Option(metavar="DIR", show_default=False, help="A new folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Add layers to a model that compute nothing at first, to train only them (block expansion, as in LLaMA Pro).

    The new model computes the same as the original one, which is checked. The command prints the lines of a config that
    train the new layers and leave everything else as it is.

    - `ingle expand examples/models/ember-6m --blocks 2 --out models/ember-expanded`
    """
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    with Terminal(make_console(stderr=True)) as terminal:
        from ingle.config import ModelConfig
        from ingle.models.expansion import expand as run_expand

        result = run_expand(ModelConfig(id=model), blocks, out, terminal)
    if as_json:
        print(json.dumps({"path": str(result.path), "added": result.added, "modules": result.modules}, indent=1))
        return
    print(f"Wrote {result.path}: {len(result.added)} new layers; its logits are those of {model}. To train only them:")
    print(f"  model: {{id: {result.path}}}")
    print(f"  adapter: {{kind: lora, target_modules: none, trainable_modules: [{', '.join(result.modules)}]}}")
