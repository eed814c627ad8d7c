"""Exports that write one model: merged safetensors, and GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ingle import models
from ingle.events import Progress
from ingle.export.fidelity.fidelity_report import FidelityReport
from ingle.export.fidelity.measurement import TensorFidelity
from ingle.export.fidelity.promotion import Promotion, promote
from ingle.export.job import ExportJob, WrittenExport, plain_source
from ingle.export.model_card import write_companions
from ingle.export.ollama import make_modelfile
from ingle.export.output_paths import OutputPaths
from ingle.export.verify.certificate import Certificate
from ingle.export.verify.llama_cpp import LlamaCpp
from ingle.export.writers.gguf_file import GgufExport
from ingle.export.writers.gguf_types import choose_type
from ingle.export.writers.safetensors_folder import Layout, choose_layout, estimate_bytes, write_safetensors
from ingle.gguf.imatrix import read_imatrix
from ingle.gguf.rotary import CONTEXT_STEP
from ingle.inference import Engine, Source, open_source
from ingle.models.interop.transformers_peft import TransformersServer
from ingle.models.loading.gguf_model import is_gguf, open_gguf
from ingle.quant.format import PLAIN

#: Largest number of tokens in a text of a certificate.
_CONTEXT = 1024


def export_safetensors(job: ExportJob) -> WrittenExport:
    """Writes the merged model in the layout of the hub."""
    source = job.source
    layout = choose_layout((job.request.type or "bf16").lower(), source.base)
    paths = OutputPaths(job.request.out, None)
    trained = job.measure_trained()
    merged = job.open_merged()
    entries = merged.stream.entries
    paths.require_bytes(estimate_bytes(merged, layout))

    def written(folder: Path, dtype: str) -> Source:
        return Source(plain_source(folder, dtype).model, layout.base)

    with paths.opened() as partial:
        found = write_safetensors(merged, job.tokenizer, source.model, partial, layout, sink=job.sink)
        job.check_base(merged)
        num_weights = sum(entry.num_weights for entry in entries)
        divergence = job.measure_written(trained, written(partial, source.model.dtype), num_weights)
        report = job.accept(
            FidelityReport(
                type=layout.name,
                num_tensors=len(entries),
                num_copied=0,  # every tensor is converted to the type of the layout
                tensors=tuple(found),
                divergence=divergence,
                adapter_effect=trained.adapter_effect,
                max_kl=job.request.max_kl,
            )
        )
        usage = _safetensors_usage(paths.folder, layout, models.class_that_reads(merged.stream.model))
        write_companions(job, partial, paths, type_name=layout.name, usage=usage, report=report)

    def certify() -> Certificate:
        return job.certify_merged(
            TransformersServer(paths.folder),
            lambda: open_source(written(paths.folder, "float32")),
            divergence,
            quantized=layout.name not in PLAIN,
        )

    return WrittenExport(paths, tuple(sorted(paths.folder.glob("*.safetensors"))), layout.name, report, certify)


def export_gguf(job: ExportJob) -> WrittenExport:
    """Writes the merged, or unchanged, model as one GGUF file with a Modelfile."""
    source = job.source
    own = open_gguf(source.model.id, revision=source.model.revision) if is_gguf(source.model.id) else None
    type_name = choose_type(job.request.type, source.base, from_gguf=own is not None)
    paths = OutputPaths(job.request.out, f"{job.name}-{type_name}")
    assert paths.main is not None
    trained = job.measure_trained()
    merged = job.open_merged()
    importance = {} if job.request.imatrix is None else read_imatrix(job.request.imatrix).entries
    columns = {name: torch.from_numpy(entry.mean[0]) for name, entry in importance.items()}
    export = GgufExport(merged, job.tokenizer, type_name, columns, base_file=own)
    promotion = _promote(job, export) if job.request.promote else None
    paths.require_bytes(export.num_bytes)
    with paths.opened() as partial:
        path = partial / paths.main
        found = export.write(path, describe_model(job), sink=job.sink)
        job.check_base(merged)
        divergence = job.measure_written(trained, plain_source(path, source.model.dtype), 0)
        report = job.accept(
            FidelityReport(
                type=type_name,
                num_tensors=len(export.planned),
                num_copied=export.num_copied,
                tensors=tuple(found),
                divergence=divergence,
                adapter_effect=trained.adapter_effect,
                max_kl=job.request.max_kl,
                promotion=promotion,
            )
        )
        is_causal = models.kind_of(merged.stream.model.config) == "causal"
        if is_causal:  # Ollama runs no others
            write_modelfile(job, merged.stream.model, partial / paths.name("modelfile"), weights=f"./{paths.main}")
        usage = _gguf_usage(paths, is_causal=is_causal) + explain_context(merged.stream.model)
        write_companions(job, partial, paths, type_name=type_name, usage=usage, report=report)

    def open_written() -> Engine:
        model = open_source(plain_source(paths.result, "float32")).model
        return Engine(model, job.tokenizer, adapted=False)

    def certify() -> Certificate:
        with serve_llama(paths.result, merged.stream.model) as server:
            return job.certify_merged(server, open_written, divergence, quantized=export.is_quantized)

    return WrittenExport(paths, (paths.result,), type_name, report, certify)


def serve_llama(path: Path, model: Any, *, adapter: Path | None = None) -> LlamaCpp:
    """Loads a file in llama.cpp with a context for the texts of a certificate."""
    longest = getattr(model.config, "max_position_embeddings", _CONTEXT)
    return LlamaCpp(path, adapter=adapter, context=min(longest, _short_context(model) or _CONTEXT, _CONTEXT))


def explain_context(model: Any) -> str:
    """Returns the paragraph of a model card on llama.cpp's context; empty if its size changes no answer."""
    limit = _short_context(model)
    if limit is None:
        return ""
    return (
        f"\n\nFor texts of up to {limit:,} tokens, add `-c {limit}` (in Ollama: `PARAMETER num_ctx {limit}`). In a "
        "larger context, llama.cpp rotates the positions of every text as those of a long text, which changes the "
        "answers: the model was trained with the rotation for the length of each text."
    )


def _short_context(model: Any) -> int | None:
    """Returns the largest context in which llama.cpp uses LongRoPE's factors for short texts; None without them."""
    limit = models.unscaled_limit(model)
    return None if limit is None else max(limit // CONTEXT_STEP, 1) * CONTEXT_STEP


def describe_model(job: ExportJob) -> dict[str, Any]:
    """Returns the GGUF metadata that names the model and its base."""
    return {"general.name": job.name, "general.base_model.count": 1, "general.base_model.0.name": job.base_model}


def write_modelfile(job: ExportJob, model: Any, path: Path, *, weights: str, adapter: str | None = None) -> None:
    """Writes the Modelfile of a GGUF export; Ollama resolves its paths from the folder of the Modelfile."""
    ends = models.end_token_ids(model, job.tokenizer)
    notes = [f"ollama create {job.name} -f {path.name}"]
    text = make_modelfile(job.tokenizer, sorted(ends), weights=weights, adapter=adapter, notes=notes)
    path.write_text(text, encoding="utf-8")


def _promote(job: ExportJob, export: GgufExport) -> Promotion:
    """Gives wider types to the tensors that lose most."""
    changed = {
        planned.name: planned
        for planned in export.planned
        if planned.hf_name in export.merged.changed and planned.type not in PLAIN
    }
    done = 0

    def measure_as(name: str, type_name: str) -> TensorFidelity:
        nonlocal done
        done += 1
        job.sink(Progress("Measuring wider types", done))
        return export.measure_as(changed[name], type_name)

    promotion = promote(
        [(name, planned.type, planned.shape[-1]) for name, planned in changed.items()],
        measure_as,
        int(job.request.size_budget * export.num_bytes),
    )
    export.promote(promotion.types)
    return promotion


def _safetensors_usage(folder: Path, layout: Layout, reader: str) -> str:
    if layout.base.format == "hqq":
        return (
            f'```python\nimport ingle\n\nmodel = ingle.open_model("{folder.name}")\n```\n\n'
            "The linear layers have the layout of the `hqq` package: its `HQQLinear` loads each of them from these "
            "tensors. transformers 5 does not read them and starts from random weights instead."
        )
    return (
        f"```python\nfrom transformers import {reader}, AutoTokenizer\n\n"
        f'model = {reader}.from_pretrained("{folder.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder.name}")\n```'
    )


def _gguf_usage(paths: OutputPaths, *, is_causal: bool) -> str:
    command = f"```console\n$ llama-server -m {paths.main}\n```"
    if not is_causal:
        return command
    return (
        f"{command}\n\nor, with Ollama:\n\n"
        f"```console\n$ ollama create my-model -f {paths.name('modelfile')}\n$ ollama run my-model\n```"
    )
