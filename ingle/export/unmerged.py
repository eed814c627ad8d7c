"""The ways of exporting that leave the base alone: the adapter for PEFT, and for ``llama-server --lora``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ingle import adapters
from ingle.config.base import NoBase
from ingle.errors import AdapterError, ConfigError
from ingle.events import Warned
from ingle.export import adapter_gguf, certificate, hf
from ingle.export.gguf import GgufExport
from ingle.export.gguf_types import AS_TRAINED, holds
from ingle.export.hf import Layout
from ingle.export.merged import about, serve_llama, write_modelfile
from ingle.export.merging import Merger
from ingle.export.place import Place
from ingle.export.work import Outcome, Work
from ingle.inference import Source
from ingle.models.interop.transformers_peft import TransformersServer
from ingle.models.loading.gguf_model import is_gguf, open_gguf
from ingle.quant.format import PLAIN
from ingle.wording import either

_FILES = ("adapter_config.json", "adapter_model.safetensors")


def export_peft(work: Work) -> Outcome:
    """Copies the adapter, which is in PEFT's layout already, with the tokenizer and a card."""
    adapter = _require_adapter(work)
    place = Place(work.request.out, None)
    place.require_bytes(sum((adapter / name).stat().st_size for name in _FILES))
    with place.opened() as partial:
        for name in _FILES:
            shutil.copyfile(adapter / name, partial / name)
        work.tokenizer.save_pretrained(partial)
        work.write_companions(partial, place, type_name=None, usage=_peft_usage(work, place.folder))
    files = tuple(place.folder / name for name in _FILES)

    def certify() -> dict[str, Any]:
        engine = work.open_trained(dtype="float32")
        with place.scratch() as folder:
            base = Merger(Source(work.subject.source.model, work.subject.source.base))
            layout = Layout(torch.float32, NoBase())
            hf.write_safetensors(base, work.tokenizer, work.subject.source.model, folder, layout, sink=work.sink)
            return certificate.certify(
                TransformersServer(folder, adapter=place.folder),
                engine,
                work.subject.prompts(work.request.data),
                system=work.subject.system,
                tolerance=certificate.PLAIN,
                sink=work.sink,
            )

    return Outcome(place, files, None, files[1].stat().st_size, None, certify)


def export_adapter_gguf(work: Work) -> Outcome:
    """Writes the adapter as GGUF, with a Modelfile that puts it on its base.

    Raises:
        AdapterError: There is no adapter, or one that such a file has no place for.
        ConfigError: An adapter has no such type.
        GgufError: llama.cpp does not know the architecture.
    """
    _require_adapter(work)
    type_name = (work.request.type or "f32").lower()
    if type_name not in PLAIN:
        raise ConfigError(
            f"An adapter cannot be written as {type_name}.",
            where=f"--type {type_name}",
            fix=f"--type {either(tuple(PLAIN))}; --to gguf writes the merged model in any type",
        )
    place = Place(work.request.out, f"{work.name}-lora")
    assert place.main is not None
    merger = work.merger()
    place.require_bytes(4 * sum(p.lora_a.numel() + p.lora_b.numel() for p in merger.all_layers.values()))
    with place.opened() as partial:
        adapter_gguf.write_adapter(merger, partial / place.main, type_name, about(work))
        base = _base_path(work, place.folder)
        modelfile = partial / place.name("modelfile")
        write_modelfile(work, merger.stream.model, modelfile, weights=base, adapter=f"./{place.main}")
        work.write_companions(partial, place, type_name=type_name, usage=_adapter_usage(work, base, place.main))

    def certify_on(base: Path, *, packed: bool) -> dict[str, Any]:
        engine = work.open_trained(dtype="float32")
        with serve_llama(base, engine.model.config, adapter=place.result) as server:
            return certificate.certify(
                server,
                engine,
                work.subject.prompts(work.request.data),
                system=work.subject.system,
                tolerance=certificate.PACKED if packed else certificate.PLAIN,
                sink=work.sink,
            )

    def certify() -> dict[str, Any]:
        source = Source(work.subject.source.model, work.subject.source.base)
        if is_gguf(source.model.id):
            return certify_on(open_gguf(source.model.id, revision=source.model.revision).path, packed=True)
        with place.scratch() as folder:
            path = folder / "base.gguf"
            kind = AS_TRAINED if holds(source.base) else "f32"
            base = GgufExport(Merger(source), work.tokenizer, kind)
            base.write(path, about(work), sink=work.sink)
            return certify_on(path, packed=base.is_quantized)

    size = place.result.stat().st_size
    return Outcome(place, (place.result,), type_name, size, None, certify)


def _require_adapter(work: Work) -> Path:
    adapter = work.subject.source.adapter
    if adapter is None:
        raise AdapterError(
            "There is no adapter to export here.",
            where=work.base_model,
            fix="--to safetensors or --to gguf exports the model",
        )
    if adapters.read_record(adapter).adapter.get("merge_aware") is not None:
        work.sink(
            Warned(
                "This adapter was trained to be merged. On the unmerged base it answers somewhat differently than in "
                "training; --to gguf and --to safetensors write what was trained.",
                where=str(adapter),
            )
        )
    return adapter


def _peft_usage(work: Work, folder: Path) -> str:
    text = (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{work.base_model}")\n'
        f'model = PeftModel.from_pretrained(base, "{folder.name}")\n```'
    )
    base = work.subject.source.base
    if not isinstance(base, NoBase):
        text += (
            f"\n\nThe adapter was trained on the base in {base.format}. On the 16-bit base it answers slightly "
            "differently; `ingle export --to safetensors` merges the two as they were trained."
        )
    return text


def _base_path(work: Work, folder: Path) -> str:
    """The base's GGUF file as seen from the folder of the Modelfile."""
    model = work.subject.source.model
    if not is_gguf(model.id):
        return "./base.gguf"
    path = os.path.relpath(open_gguf(model.id, revision=model.revision).path.absolute(), folder.absolute())
    return path if path.startswith(".") else f"./{path}"


def _adapter_usage(work: Work, base: str, name: str) -> str:
    """How to serve the adapter with llama.cpp."""
    model, held = work.subject.source.model, work.subject.source.base
    if is_gguf(model.id):
        made = f"`{base}` is the file that the adapter was trained on."
    else:
        type_name = held.format if holds(held) else "bf16"
        made = "`base.gguf` is the base model; make it once, in the same folder:\n\n```console\n"
        made += f"$ ingle quantize {work.base_model} --to {type_name} --out base.gguf\n```"
        if not holds(held) and not isinstance(held, NoBase):
            made += (
                f"\n\nThe adapter was trained on the base in {held.format}, which GGUF cannot hold: on this base it "
            )
            made += "answers slightly differently. `ingle export --to gguf` merges the two as they were trained."
    return f"```console\n$ llama-server -m {base} --lora {name}\n```\n\n{made}"
