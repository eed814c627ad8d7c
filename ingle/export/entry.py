"""The export function: checks the request, writes the files and verifies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingle import inference, models
from ingle.errors import ExportError, Interrupted
from ingle.events import Saved, Sink
from ingle.export.adapter_export import export_adapter_gguf, export_peft
from ingle.export.fidelity.fidelity_report import MAX_KL, FidelityReport
from ingle.export.job import ExportJob, WrittenExport
from ingle.export.model_export import export_gguf, export_safetensors
from ingle.export.request import SIZE_BUDGET, ExportRequest, Target
from ingle.export.verify.certificate import Certificate
from ingle.export.verify.llama_cpp import import_binding
from ingle.export.writers.safetensors_folder import READERS
from ingle.models.interop.transformers_peft import require_readers
from ingle.models.loading.config_json import read_config
from ingle.quant.format import PLAIN
from ingle.wording import either


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        path: The GGUF file, or the folder.
        to: Kind of export, as in :func:`export`.
        type: Type of the weights; None for an adapter in PEFT's layout.
        num_bytes: Size of the weights.
        fidelity: Fidelity report; None if nothing was merged or quantized.
        certificate: Certificate; None without ``verify``.
        files: Path of each file by its kind: ``model``, ``card``, ``modelfile``, ``fidelity``, ``fidelity_page``,
            ``certificate``.
    """

    path: Path
    to: Target
    type: str | None
    num_bytes: int
    fidelity: FidelityReport | None
    certificate: Certificate | None
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, as ``ingle export --json`` prints it."""
        return {
            "path": str(self.path),
            "to": self.to,
            "type": self.type,
            "num_bytes": self.num_bytes,
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "files": self.files,
        }


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
) -> ExportResult:
    """Writes a trained model for serving.

    Args:
        run_or_model: A run folder, an adapter folder, a model folder, a ``.gguf`` file or a hub id.
        to: ``peft``, ``safetensors``, ``gguf`` or ``gguf-adapter``.
        out: A new folder.  For GGUF any folder, or a file ending in ``.gguf``; companion files are named after it.
        type: Type of the weights.  None selects the type of the base if possible, or one that loses little.
        verify: Whether another program reads the export, its answers are compared, and a certificate is written.
        promote: Whether tensors that lose much of their change get a wider type.
        size_budget: Largest additional size for ``promote``, as a share of the size of the file.
        max_kl: Largest accepted KL divergence of the exported model from the trained one, nats per token.
        allow_loss: Whether to write the export even if it loses too much.
        allow_mismatch: Whether to accept a base that the adapter was not trained on.
        data: Text to measure on.  None selects the run's held-out rows, or else its training rows.
        imatrix: Importance matrix for the quantizer.
        sink: Receives progress and warnings.

    Raises:
        ExportError: Too much would be lost, or the export does not answer like the trained model.
        IngleError: Any other error that the user can fix.
        Interrupted: Stopped during the verification; the export itself is complete.
    """
    request = ExportRequest(
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
    source = inference.locate(run_or_model)
    _refuse_head(source, request)
    if verify:  # report a missing program before anything is written
        _require_reader(request)
    job = ExportJob(request, source, models.load_tokenizer(source.model), sink)
    job.find_run(run_or_model)
    written = _EXPORTERS[to](job)
    sink(Saved(0, str(written.paths.result), "export"))
    certificate = _verify(written, sink) if verify else None
    return ExportResult(
        path=written.paths.result,
        to=to,
        type=written.type,
        num_bytes=written.num_bytes,
        fidelity=written.fidelity,
        certificate=certificate,
        files=written.paths.files(),
    )


def _refuse_head(source: inference.Source, request: ExportRequest) -> None:
    """Refuses what only language models can be exported to.

    Raises:
        ExportError: The model has a task head, which GGUF files, quantized layouts or the verification cannot have; or
            the verification would need the answers of a model that llama.cpp does not generate with.
    """
    kind = source.objective().kind
    if request.verify and request.to in ("gguf", "gguf-adapter") and models.stored_kind(source.model) != "causal":
        raise ExportError(
            "--verify compares the answers that llama.cpp generates, and it does so only for causal models.",
            where=f"--to {request.to} --verify",
            fix="omit --verify",
        )
    if kind not in ("classify", "tag", "answer", "reward"):
        return
    has_head = kind == "classify" and read_config(source.model, None).model_type == "bert"
    if request.to == "gguf-adapter" or (request.to == "gguf" and not has_head):
        raise ExportError(
            f"This model for {kind} cannot be written as {'an adapter in GGUF' if has_head else 'GGUF'}.",
            where=f"--to {request.to}",
            why="llama.cpp reads the heads of BERT models for classify, in one file with the model"
            if has_head
            else "llama.cpp reads language models and embeddings, but no heads of this kind",
            fix="--to safetensors" + (" or --to peft" if source.adapter is not None else ""),
        )
    if request.to == "safetensors" and (request.type or "bf16").lower() not in PLAIN:
        raise ExportError(
            f"A model for {kind} cannot be written as {request.type}.",
            where=f"--type {request.type}",
            why="its head stays unquantized, which the layouts of quantized safetensors do not describe",
            fix=f"--type {either(tuple(PLAIN))}",
        )
    if request.verify:
        raise ExportError(
            f"--verify compares the answers of language models; this one was trained for {kind}.", fix="omit --verify"
        )


def _verify(written: WrittenExport, sink: Sink) -> Certificate:
    path = written.paths.path("certificate")
    try:
        certificate = written.certify()
    except KeyboardInterrupt:
        raise Interrupted(
            "The export was stopped during its verification.",
            why=f"{written.paths.result} is complete, but not verified",
        ) from None
    certificate.write(path, written.files)
    sink(Saved(0, str(path), "certificate"))
    certificate.require_passed(path)
    return certificate


def _require_reader(request: ExportRequest) -> None:
    """Checks that the program that reads the export is installed."""
    match request.to:
        case "gguf" | "gguf-adapter":
            import_binding()
        case "peft":
            require_readers("peft")
        case "safetensors":
            require_readers(*READERS.get((request.type or "bf16").lower().partition("-")[0], ()))


_EXPORTERS: dict[Target, Callable[[ExportJob], WrittenExport]] = {
    "peft": export_peft,
    "safetensors": export_safetensors,
    "gguf": export_gguf,
    "gguf-adapter": export_adapter_gguf,
}
