"""An export from beginning to end: what is asked, what is written, what is proved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ingle import inference, models
from ingle.events import Saved, Sink
from ingle.export import certificate, hf, llama
from ingle.export.merged import export_gguf, export_safetensors
from ingle.export.request import MAX_KL, SIZE_BUDGET, Request, Subject, Target
from ingle.export.unmerged import export_adapter_gguf, export_peft
from ingle.export.work import Outcome, Work
from ingle.models.peers import require_readers


def export(
    run_or_model: str,
    to: Target,
    out: Path | str,
    *,
    type: str | None = None,
    verify: bool = False,
    promote: bool = False,
    size_budget: float = SIZE_BUDGET,
    max_kl: float = MAX_KL,
    allow_loss: bool = False,
    allow_mismatch: bool = False,
    data: Path | None = None,
    imatrix: Path | None = None,
    sink: Sink = lambda event: None,
) -> dict[str, Any]:
    """Writes what was trained in the form in which it is served.

    Args:
        run_or_model: A run folder, an adapter folder, a model folder, a ``.gguf`` file or a hub id.
        to: ``peft``, ``safetensors``, ``gguf`` or ``gguf-adapter``.
        out: A new folder, or a ``.gguf`` file whose companions then lie beside it.
        type: Of the weights; what was trained on, or what loses least, when None.
        verify: Let another program read it, compare its answers, and write ``certificate.json``.
        promote: Give weights that lose too much of their change a wider type.
        size_budget: What that may cost, as a share of the file.
        max_kl: Largest KL divergence of what is written from what was trained, nats a token.
        allow_loss: Write it whatever is lost.
        allow_mismatch: Put the adapter on another base than it was trained on.
        data: Text to measure on; the run's held-out rows, or its training rows, when None.
        imatrix: Importance matrix for the quantizer.
        sink: Is told of the progress.

    Returns:
        ``path``, ``to``, ``type``, ``num_bytes``, ``fidelity`` (of ``fidelity.json``; None where nothing was
        merged or packed) and ``certificate`` (of ``certificate.json``; None without ``verify``).

    Raises:
        ExportError: Too much would be lost, or what was written does not answer as it should.
        IngleError: For every other mistake the user can mend.
    """
    request = Request(
        to=to,
        out=Path(out),
        type=type,
        verify=verify,
        promote=promote,
        size_budget=size_budget,
        max_kl=max_kl,
        allow_loss=allow_loss,
        allow_mismatch=allow_mismatch,
        data=data,
        imatrix=imatrix,
    )
    request.check()
    if verify:  # what is missing is known before anything is written, not after
        _require_reader(request)
    source = inference.locate(run_or_model)
    work = Work(request, Subject.find(run_or_model, source), models.load_tokenizer(source.model), sink)
    outcome = _WAYS[to](work)
    sink(Saved(0, str(outcome.path), "export"))
    result: dict[str, Any] = {
        "path": str(outcome.path),
        "to": to,
        "type": outcome.type,
        "num_bytes": outcome.num_bytes,
        "fidelity": outcome.fidelity,
        "certificate": None,
    }
    if verify:
        made = outcome.certify()
        path = outcome.folder / "certificate.json"
        certificate.write_certificate(path, made, outcome.files)
        sink(Saved(0, str(path), "certificate"))
        certificate.require_passed(made, path)
        result["certificate"] = made
    return result


def _require_reader(request: Request) -> None:
    """Raises unless the program that is to answer is installed."""
    match request.to:
        case "gguf" | "gguf-adapter":
            llama.require()
        case "peft":
            require_readers("peft")
        case "safetensors":
            require_readers(*hf.READERS.get((request.type or "bf16").lower().partition("-")[0], ()))


_WAYS: dict[Target, Callable[[Work], Outcome]] = {
    "peft": export_peft,
    "safetensors": export_safetensors,
    "gguf": export_gguf,
    "gguf-adapter": export_adapter_gguf,
}
