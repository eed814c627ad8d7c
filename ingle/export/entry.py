"""An export from beginning to end: check the request, write the files, verify them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ingle import inference, models
from ingle.errors import Interrupted
from ingle.events import Saved, Sink
from ingle.export import certificate, hf, llama
from ingle.export.merged import export_gguf, export_safetensors
from ingle.export.request import MAX_KL, SIZE_BUDGET, Request, Subject, Target
from ingle.export.unmerged import export_adapter_gguf, export_peft
from ingle.export.work import Outcome, Work
from ingle.models.interop.transformers_peft import require_readers


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
        out: A new folder; for GGUF any folder, or a file ending in ``.gguf``.  What belongs to a GGUF file is named
            after it.
        type: Of the weights; when None the type of the base, or one that loses little.
        verify: Let another program read it, compare its answers, and write a certificate.
        promote: Give weights that lose too much of their change a wider type.
        size_budget: What that may cost, as a share of the file.
        max_kl: Largest KL divergence of what is written from what was trained, nats a token.
        allow_loss: Write it however much is lost.
        allow_mismatch: Put the adapter on another base than it was trained on.
        data: Text to measure on; the run's held-out rows, or its training rows, when None.
        imatrix: Importance matrix for the quantizer.
        sink: Gets the progress and warnings.

    Returns:
        ``path``, ``to``, ``type``, ``num_bytes``, ``fidelity`` (the content of the fidelity report; None where nothing
        was merged or packed), ``certificate`` (None without ``verify``) and ``files``: the path of each file by what
        it is (``model``, ``card``, ``modelfile``, ``fidelity``, ``fidelity_page``, ``certificate``).

    Raises:
        ExportError: Too much would be lost, or the export does not answer as the trained model.
        IngleError: For every other mistake of the user.
        Interrupted: Stopped during the verification; the export itself is complete.
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
    if verify:  # say that a program is missing before anything is written, not after
        _require_reader(request)
    source = inference.locate(run_or_model)
    work = Work(request, Subject.find(run_or_model, source), models.load_tokenizer(source.model), sink)
    outcome = _WAYS[to](work)
    place = outcome.place
    sink(Saved(0, str(place.result), "export"))
    result: dict[str, Any] = {
        "path": str(place.result),
        "to": to,
        "type": outcome.type,
        "num_bytes": outcome.num_bytes,
        "fidelity": outcome.fidelity,
        "certificate": None,
    }
    if verify:
        path = place.path("certificate")
        try:
            made = outcome.certify()
        except KeyboardInterrupt:
            raise Interrupted(
                "Stopped before the verification was finished.", why=f"{place.result} is complete, but not verified"
            ) from None
        certificate.write_certificate(path, made, outcome.files)
        sink(Saved(0, str(path), "certificate"))
        certificate.require_passed(made, path)
        result["certificate"] = made
    return result | {"files": place.files()}


def _require_reader(request: Request) -> None:
    """Raises unless the program that reads the export is installed."""
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
