"""The ways of exporting that write one model: merged safetensors, and GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ingle import models
from ingle.events import Progress
from ingle.export import hf, ollama
from ingle.export.fidelity import TensorFidelity
from ingle.export.gguf import GgufExport, read_importance
from ingle.export.gguf_types import choose_type
from ingle.export.hf import Layout
from ingle.export.llama import LlamaCpp
from ingle.export.place import Place
from ingle.export.promotion import Promotion, promote
from ingle.export.work import Outcome, Work, plain_source
from ingle.inference import Engine, Source, open_source
from ingle.models.interop.transformers_peft import TransformersServer
from ingle.models.loading.gguf_model import is_gguf, open_gguf
from ingle.quant.format import PLAIN

#: Tokens of a certificate's longest text.
_CONTEXT = 1024


def export_safetensors(work: Work) -> Outcome:
    """Writes the merged model in the hub's layout."""
    source = work.subject.source
    layout = hf.choose_layout((work.request.type or "bf16").lower(), source.base)
    place = Place(work.request.out, None)
    yardstick = work.measure_trained()
    merger = work.merger()
    place.require_bytes(hf.estimate_bytes(merger, layout))
    with place.opened() as partial:
        found = hf.write_safetensors(merger, work.tokenizer, source.model, partial, layout, sink=work.sink)
        work.check_base(merger)
        written = _folder_source(partial, layout, source)
        num_weights = sum(entry.num_weights for entry in merger.stream.entries)
        divergence = work.measure_written(yardstick, written, num_weights)
        report = work.report(
            layout.name,
            found,
            divergence,
            yardstick,
            num_tensors=len(merger.stream.entries),
            num_copied=0,  # every tensor is written anew in the layout's type
        )
        work.accept(report, found)
        work.write_companions(
            partial,
            place,
            type_name=layout.name,
            usage=_usage(place.folder, layout),
            found=found,
            report=report,
        )
    files = tuple(sorted(place.folder.glob("*.safetensors")))

    def certify() -> dict[str, Any]:
        def reopen() -> Engine:
            return open_source(_folder_source(place.folder, layout, source, dtype="float32"))

        return work.certify(TransformersServer(place.folder), reopen, divergence, packed=layout.name not in PLAIN)

    num_bytes = sum(file.stat().st_size for file in files)
    return Outcome(place, files, layout.name, num_bytes, report, certify)


def export_gguf(work: Work) -> Outcome:
    """Writes the merged, or untouched, model as one GGUF file with a Modelfile."""
    source = work.subject.source
    own = open_gguf(source.model.id, revision=source.model.revision) if is_gguf(source.model.id) else None
    type_name = choose_type(work.request.type, source.base, from_gguf=own is not None)
    place = Place(work.request.out, f"{work.name}-{type_name}")
    assert place.main is not None
    yardstick = work.measure_trained()
    merger = work.merger()
    export = GgufExport(merger, work.tokenizer, type_name, _importance(work), base_file=own)
    promotion = _promote(work, export) if work.request.promote else None
    place.require_bytes(export.num_bytes)
    with place.opened() as partial:
        path = partial / place.main
        found = export.write(path, about(work), sink=work.sink)
        work.check_base(merger)
        written = plain_source(path, source.model.dtype)
        divergence = work.measure_written(yardstick, written, 0)
        report = work.report(
            type_name,
            found,
            divergence,
            yardstick,
            num_tensors=len(export.planned),
            num_copied=export.num_copied,
            promotion=promotion,
        )
        work.accept(report, found)
        write_modelfile(work, merger.stream.model, partial / place.name("modelfile"), weights=f"./{place.main}")
        work.write_companions(
            partial,
            place,
            type_name=type_name,
            usage=_gguf_usage(place),
            found=found,
            report=report,
        )

    def certify() -> dict[str, Any]:
        def reopen() -> Engine:
            model = open_source(plain_source(place.result, "float32")).model
            return Engine(model, work.tokenizer, adapted=False)

        with serve_llama(place.result, merger.stream.model.config) as server:
            return work.certify(server, reopen, divergence, packed=export.is_quantized)

    return Outcome(place, (place.result,), type_name, place.result.stat().st_size, report, certify)


def serve_llama(path: Path, config: Any, *, adapter: Path | None = None) -> LlamaCpp:
    """llama.cpp with a file loaded, and room for a certificate's texts."""
    longest = getattr(config, "max_position_embeddings", _CONTEXT)
    return LlamaCpp(path, adapter=adapter, context=min(longest, _CONTEXT))


def about(work: Work) -> dict[str, Any]:
    """The metadata of a file besides its shape."""
    return {"general.name": work.name, "general.base_model.count": 1, "general.base_model.0.name": work.base_model}


def write_modelfile(work: Work, model: Any, path: Path, *, weights: str, adapter: str | None = None) -> None:
    """Writes the Modelfile of a GGUF export; Ollama reads the paths in it from the folder where it lies."""
    ends = models.end_token_ids(model, work.tokenizer)
    notes = [f"ollama create {work.name} -f {path.name}"]
    text = ollama.make_modelfile(work.tokenizer, sorted(ends), weights=weights, adapter=adapter, notes=notes)
    path.write_text(text, encoding="utf-8")


def _promote(work: Work, export: GgufExport) -> Promotion:
    """Gives the tensors that lose most a wider type."""
    merged = {
        planned.name: planned
        for planned in export.planned
        if planned.hf_name in export.merger.layers and planned.type not in PLAIN
    }
    done = 0

    def measure_as(name: str, type_name: str) -> TensorFidelity:
        nonlocal done
        done += 1
        work.sink(Progress("measuring wider types", done))
        return export.measure_as(merged[name], type_name)

    promotion = promote(
        [(name, planned.type, planned.shape[-1]) for name, planned in merged.items()],
        measure_as,
        int(work.request.size_budget * export.num_bytes),
    )
    export.promote(promotion.types)
    return promotion


def _importance(work: Work) -> dict[str, Tensor]:
    if work.request.imatrix is None:
        return {}
    return read_importance(work.request.imatrix)


def _folder_source(folder: Path, layout: Layout, source: Source, *, dtype: str | None = None) -> Source:
    plain = plain_source(folder, dtype or source.model.dtype)
    return Source(plain.model, layout.base)


def _usage(folder: Path, layout: Layout) -> str:
    if layout.base.format == "hqq":
        return (
            f'```python\nimport ingle\n\nmodel = ingle.open_model("{folder.name}")\n```\n\n'
            "The linear layers are in the layout of the `hqq` package: its `HQQLinear` loads each of them from these "
            "tensors. transformers 5 does not read them and starts from random weights instead."
        )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder.name}")\n```'
    )


def _gguf_usage(place: Place) -> str:
    return (
        f"```console\n$ llama-server -m {place.main}\n```\n\nor, with Ollama:\n\n"
        f"```console\n$ ollama create my-model -f {place.name('modelfile')}\n$ ollama run my-model\n```"
    )
