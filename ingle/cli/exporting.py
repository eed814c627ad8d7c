"""``ingle export``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ingle.wording import plural, size

if TYPE_CHECKING:
    from ingle.export import ExportResult


class To(StrEnum):
    """Values of ``--to``."""

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
            help="A new folder. For GGUF: any folder, or a file ending in .gguf; card, Modelfile, fidelity report and "
            "certificate are named after the file, so that several exports fit in one folder.",
        ),
    ],
    type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            show_default=False,
            help="GGUF: q4_k_m, q5_k_m, q6_k, q8_0, q4_0, ..., bf16, f16, f32, or as-trained (every tensor in the "
            "format it had in training; this is not lossless: merged weights are rounded to that format again). "
            "safetensors: bf16 (the default), f16, f32, nf4, fp4, int8, hqq-4 (or 8, 3, 2, 1 bits; hqq-3-g32 for "
            "groups of 32).",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Let llama.cpp (or transformers and PEFT) read the export, compare its tokens, probabilities and "
            "greedy answers with Ingle's, and write a certificate. A mismatch fails the command.",
        ),
    ] = False,
    promote: Annotated[
        bool, typer.Option("--promote", help="Give the tensors that lose most of their change a wider type.")
    ] = False,
    size_budget: Annotated[
        float, typer.Option(min=0.0, help="Largest size that --promote may add, as a share of the file.")
    ] = 0.15,
    max_kl: Annotated[
        float,
        typer.Option(
            "--max-kl",
            min=0.0,
            help="Refuse an export whose predictions differ more from those of the trained model: KL divergence in "
            "nats per token on held-out text.",
        ),
    ] = 0.15,
    allow_loss: Annotated[
        bool,
        typer.Option("--allow-loss", help="Write the export however much is lost; see the fidelity report."),
    ] = False,
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch", help="Accept another base than the adapter was trained on, and report the difference."
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Text to measure on and to take prompts from; the default is the run's held-out rows.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Importance matrix for the quantizer, in llama.cpp's format."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Export a trained model for serving.

    - `ingle export runs/demo --to gguf --type q4_k_m --out served --verify`
    - `ingle export runs/demo --to safetensors --out merged`
    - `ingle export runs/demo --to gguf-adapter --out lora.gguf`

    Every merge is measured: for each tensor, how much of the trained change survives the rounding, and on text, how
    far the predictions of the export are from those of the trained model. The fidelity report contains both. Nothing
    is overwritten, and a command that is stopped leaves no incomplete files.
    """
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
    print(json.dumps(result.to_dict(), ensure_ascii=False, indent=1) if as_json else "\n".join(describe(result)))


def describe(result: ExportResult) -> list[str]:
    """Returns the lines that the command prints."""
    kind = f"{result.type}, " if result.type else ""
    lines = [f"Wrote {result.path} ({kind}{size(result.num_bytes)})."]
    report, certificate = result.fidelity, result.certificate
    if report is not None:
        lines += report.describe_weights()
        if report.promotion is not None:
            count = plural(len(report.promotion.types), "tensor")
            lines.append(f"Promoted {count} to wider types, for {size(report.promotion.extra_bytes)} more.")
        lines.append(
            report.describe_divergence() or "Not measured on text; --data FILE measures how far the predictions moved."
        )
    if certificate is not None:
        found = certificate.agreement
        lines.append(
            f"Verified: {certificate.versions['other']} answers as Ingle does. Tokens are equal; KL divergence "
            f"{found.mean_kl:.1e} nats per token on {plural(found.num_tokens, 'token')}; {found.greedy_equal} of "
            f"{plural(found.num_prompts, 'greedy answer')} equal."
        )
        lines += [f"Note: {note}." for note in certificate.notes]
    return lines
