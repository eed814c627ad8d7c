"""``ingle export``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ingle.errors import ConfigError
from ingle.wording import size


class To(StrEnum):
    """What is written."""

    PEFT = "peft"
    SAFETENSORS = "safetensors"
    GGUF = "gguf"
    GGUF_ADAPTER = "gguf-adapter"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="A run folder, an adapter folder, a model folder, a .gguf file or a hub id."
        ),
    ],
    to: Annotated[
        To,
        typer.Option(
            show_default=False,
            help="`peft`: the adapter. `safetensors`: the merged model for transformers and vLLM. `gguf`: the merged "
            "model for llama.cpp and Ollama. `gguf-adapter`: the adapter for `llama-server --lora`.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            show_default=False,
            help="A new folder; for GGUF also a file ending in .gguf, whose companions then lie beside it.",
        ),
    ],
    type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            show_default=False,
            help="GGUF: q4_k_m, q5_k_m, q6_k, q8_0, q4_0, ..., bf16, f16, f32, or as-trained (every weight in the "
            "format it was trained in). safetensors: bf16 (the default), f16, f32, nf4, fp4, int8, hqq-4 (or 8, 3, 2, "
            "1 bits; hqq-3-g32 for groups of 32).",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Let llama.cpp (or transformers and PEFT) read what was written, compare its tokens, probabilities "
            "and greedy answers with Ingle's, and write certificate.json. A mismatch fails the command.",
        ),
    ] = False,
    promote: Annotated[
        bool, typer.Option("--promote", help="Give the weights that lose most of their training a wider type.")
    ] = False,
    size_budget: Annotated[
        float, typer.Option(min=0.0, help="What --promote may add, as a share of the file's size.")
    ] = 0.15,
    max_kl: Annotated[
        float,
        typer.Option(
            "--max-kl",
            min=0.0,
            help="Refuse to write a model whose answers are further from the trained one's: KL divergence in nats a "
            "token on held-out text.",
        ),
    ] = 0.15,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Write it whatever is lost; fidelity.json still says what.")
    ] = False,
    allow_mismatch: Annotated[
        bool,
        typer.Option("--allow-mismatch", help="Take another base than the adapter was trained on; says how far it is."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Text to measure on and to take prompts from; by default the run's held-out rows.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Importance matrix for the quantizer, as llama.cpp's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write what was trained in the form in which it is served.

    - `ingle export runs/demo --to gguf --type q4_k_m --out served --verify`
    - `ingle export runs/demo --to safetensors --out merged`
    - `ingle export runs/demo --to gguf-adapter --out lora.gguf`

    Every merge is measured: per weight what survives of the change, and on text how far the written model's answers are
    from the trained one's. Both stand in `fidelity.json` and `fidelity.md`. Nothing is overwritten, and a command that
    is stopped leaves nothing behind.
    """
    if not to:
        raise ConfigError("Say what to write.", fix="--to gguf")
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    with Terminal(make_console(stderr=True)) as terminal:
        from ingle.export import export as run_export

        result = run_export(
            model,
            to.value,
            out,
            type=type,
            verify=verify,
            promote=promote,
            size_budget=size_budget,
            max_kl=max_kl,
            allow_loss=allow_loss,
            allow_mismatch=allow_mismatch,
            data=data,
            imatrix=imatrix,
            sink=terminal,
        )
    print(json.dumps(result, ensure_ascii=False, indent=1) if as_json else "\n".join(summarize(result)))


def summarize(result: dict[str, Any]) -> list[str]:
    """What a person wants to know of an export, a line each."""
    kind = f" as {result['type']}" if result["type"] else ""
    lines = [f"wrote {result['path']}{kind}, {size(result['num_bytes'])}"]
    fidelity = result["fidelity"]
    if fidelity is not None:
        text = f"{fidelity['num_copied']} of {fidelity['num_tensors']} weights copied as they were"
        if fidelity["mean_correlation"] is not None:
            text += (
                f", {fidelity['num_merged']} merged: correlation of what survived {fidelity['mean_correlation']:.3f}"
            )
        lines.append(text)
        if fidelity["promotion"] is not None:
            promotion = fidelity["promotion"]
            lines.append(f"{len(promotion['types'])} weights promoted, {size(promotion['extra_bytes'])} more")
        divergence = fidelity["divergence"]
        if divergence is not None:
            lines.append(
                f"against the trained model: KL {divergence['kl']:.4f} nats a token, same likeliest token in "
                f"{divergence['top1_agreement']:.1%}, perplexity {divergence['perplexity_second']:.3f} "
                f"(trained {divergence['perplexity_first']:.3f})"
            )
    made = result["certificate"]
    if made is not None:
        lines.append(
            f"{made['versions']['other']} answers as Ingle does: KL {made['mean_kl']:.1e}, "
            f"{made['greedy_equal']} of {made['num_prompts']} greedy answers equal, tokens equal"
        )
    return lines
