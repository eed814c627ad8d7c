"""Exports of the adapter alone: for PEFT, and as GGUF for ``llama-server --lora``."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ingle import adapters, models
from ingle.adapters.head_files import HEAD_CONFIG, LABELS
from ingle.adapters.lora import LoraLinear
from ingle.config.adapter_kinds import BottleneckAdapter
from ingle.config.base import NoBase
from ingle.errors import AdapterError, ConfigError
from ingle.events import Warned
from ingle.export.job import ExportJob, WrittenExport
from ingle.export.model_card import write_companions
from ingle.export.model_export import describe_model, explain_context, serve_llama, write_modelfile
from ingle.export.output_paths import OutputPaths
from ingle.export.verify import certificate
from ingle.export.verify.certificate import Certificate
from ingle.export.writers.gguf_file import GgufExport
from ingle.export.writers.gguf_types import AS_TRAINED, is_gguf_format
from ingle.export.writers.merged_model import MergedModel, is_transposed
from ingle.export.writers.safetensors_folder import Layout, write_safetensors
from ingle.gguf import TensorToWrite, write_gguf
from ingle.inference import Source
from ingle.models.interop.transformers_peft import TransformersServer
from ingle.models.loading.config_json import read_config
from ingle.models.loading.gguf_model import is_gguf, open_gguf
from ingle.quant.format import PLAIN
from ingle.wording import either

#: Objectives whose models have a head that a GGUF file cannot have, or only with the whole model.
_WITH_HEAD = ("classify", "tag", "answer", "reward")
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_HEAD_FILES = (HEAD_CONFIG, LABELS)


def export_peft(job: ExportJob) -> WrittenExport:
    """Copies the adapter, which already has PEFT's layout, with the tokenizer and a model card.

    Raises:
        AdapterError: There is no adapter, or PEFT has no such adapters.
    """
    adapter = _require_adapter(job)
    if isinstance(adapters.read_record(adapter).section, BottleneckAdapter):
        raise AdapterError(
            "PEFT has no bottleneck adapters.",
            where="adapter.kind = bottleneck",
            fix="use the run folder with ingle predict or ingle serve, or train --adapter.kind=lora",
        )
    paths = OutputPaths(job.request.out, None)
    paths.require_bytes(sum((adapter / name).stat().st_size for name in _FILES))
    with paths.opened() as folder:
        for name in (*_FILES, *_HEAD_FILES):
            if (adapter / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(adapter / name, folder / name)
        job.tokenizer.save_pretrained(folder)
        write_companions(job, folder, paths, type_name=None, usage=_peft_usage(job, paths.folder))

    def certify() -> Certificate:
        model, base = job.source.model, job.source.base
        engine = job.open_trained(dtype="float32")
        with paths.scratch() as folder:
            layout = Layout(torch.float32, NoBase())
            write_safetensors(MergedModel(Source(model, base)), job.tokenizer, model, folder, layout, sink=job.sink)
            return job.certify(TransformersServer(folder, adapter=paths.folder), engine, certificate.PLAIN)

    return WrittenExport(paths, tuple(paths.folder / name for name in _FILES), None, None, certify)


def export_adapter_gguf(job: ExportJob) -> WrittenExport:
    """Writes the adapter as GGUF, with a Modelfile that applies it to its base.

    Raises:
        AdapterError: There is no adapter, or GGUF cannot store it.
        ConfigError: GGUF adapters do not support the type.
        GgufError: llama.cpp does not support the architecture.
    """
    _require_adapter(job)
    type_name = (job.request.type or "f32").lower()
    if type_name not in PLAIN:
        raise ConfigError(
            f"An adapter cannot be written as {type_name}.",
            where=f"--type {type_name}",
            fix=f"--type {either(tuple(PLAIN))}; --to gguf writes the merged model in any type",
        )
    paths = OutputPaths(job.request.out, f"{job.name}-lora")
    assert paths.main is not None
    merged = job.open_merged()
    paths.require_bytes(4 * sum(p.numel() for layer in merged.adapted.values() for p in layer.own_parameters()))
    base_path = _base_path(job, paths.folder)
    with paths.opened() as folder:
        _write_gguf_adapter(job, merged, folder / paths.main, type_name)
        modelfile = folder / paths.name("modelfile")
        write_modelfile(job, merged.stream.model, modelfile, weights=base_path, adapter=f"./{paths.main}")
        usage = _gguf_usage(job, base_path, paths.main) + explain_context(merged.stream.model)
        write_companions(job, folder, paths, type_name=type_name, usage=usage)

    def certify_on(base: Path, *, quantized: bool) -> Certificate:
        engine = job.open_trained(dtype="float32")
        with serve_llama(base, engine.model, adapter=paths.result) as server:
            return job.certify(server, engine, certificate.QUANTIZED if quantized else certificate.PLAIN)

    def certify() -> Certificate:
        source = Source(job.source.model, job.source.base)
        if is_gguf(source.model.id):
            return certify_on(open_gguf(source.model.id, revision=source.model.revision).path, quantized=True)
        with paths.scratch() as folder:
            kind = AS_TRAINED if is_gguf_format(source.base) else "f32"
            base = GgufExport(MergedModel(source), job.tokenizer, kind)
            base.write(folder / "base.gguf", describe_model(job), sink=job.sink)
            return certify_on(folder / "base.gguf", quantized=base.is_quantized)

    return WrittenExport(paths, (paths.result,), type_name, None, certify)


def _write_gguf_adapter(job: ExportJob, merged: MergedModel, path: Path, type_name: str) -> None:
    """Writes A and B of every layer, with the rows of B in llama.cpp's order.

    One ``alpha`` applies to the complete file, so the B of a module with another scale is multiplied by the ratio.

    Source: llama.cpp's ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``.
    """
    layers = {name: layer for name, layer in merged.adapted.items() if isinstance(layer, LoraLinear)}
    if len(layers) < len(merged.adapted):
        raise AdapterError(
            "A GGUF adapter can only store LoRA.",
            where="adapter.kind",
            fix="--to gguf merges everything into one file",
        )
    if merged.replaced:
        raise AdapterError(
            f"A GGUF adapter cannot store {', '.join(merged.replaced)}, which the adapter replaces.",
            fix="--to gguf merges everything into one file",
        )
    if any(layer.magnitude is not None for layer in layers.values()):
        raise AdapterError(
            "A GGUF adapter cannot store the magnitudes of DoRA.",
            where="adapter.kind = dora",
            fix="--to gguf merges everything into one file",
        )
    names = models.gguf_names(merged.stream.model)
    alpha = next(iter(layers.values())).scale * max(layer.rank for layer in layers.values())
    tensors = []
    for name, layer in layers.items():
        a, b = _factors(layer, alpha)
        shape = (len(b), a.shape[1])
        rule = names.rule(name, shape[::-1] if is_transposed(layer.base) else shape)
        if rule is None:
            raise AdapterError(f"llama.cpp has no tensor for {name}.", where=name, fix="--to peft")
        a = torch.from_numpy(rule.columns_to_file(a.numpy()))
        # A layer that is several tensors in the file has one A for all of them.
        for gguf_name, part in zip(rule.tensors, rule.split_rows(rule.change.to_file(b.numpy())), strict=True):
            for kind, value in (("lora_a", a), ("lora_b", torch.from_numpy(part))):
                data = value.to(PLAIN[type_name]).contiguous().view(torch.uint8).numpy()
                read = partial(np.ascontiguousarray, data)
                tensors.append(TensorToWrite(f"{gguf_name}.{kind}", type_name, tuple(value.shape), read))
    about = {
        "general.architecture": names.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    write_gguf(path, about | describe_model(job), tensors)


@torch.no_grad()
def _factors(layer: LoraLinear, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A ``[R, I]`` and B ``[O, R]`` such that ``alpha / R * B A`` is the layer's change."""
    a = layer.spread(layer.lora_a.detach().float())
    b = layer.lora_b.detach().float() * (layer.scale * layer.rank / alpha)
    return a.contiguous(), b.contiguous()


def _require_adapter(job: ExportJob) -> Path:
    adapter = job.source.adapter
    if adapter is None:
        others = "" if job.source.objective().kind in _WITH_HEAD else " or --to gguf"
        raise AdapterError(
            "There is no adapter to export.",
            where=job.base_model,
            fix=f"--to safetensors{others} exports the model",
        )
    if adapters.read_record(adapter).adapter.merge_aware is not None:
        job.sink(
            Warned(
                "This adapter was trained to be merged. On the unmerged base it answers somewhat differently than in "
                "training; --to gguf and --to safetensors write what was trained.",
                where=str(adapter),
            )
        )
    return adapter


def _peft_usage(job: ExportJob, folder: Path) -> str:
    objective = job.source.objective()
    if objective.kind in _WITH_HEAD:
        return _head_usage(folder, "classify" if objective.kind == "reward" else objective.kind)
    reader = models.reader_class(read_config(job.source.model))
    text = (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {reader}\n\n"
        f'base = {reader}.from_pretrained("{job.base_model}")\n'
        f'model = PeftModel.from_pretrained(base, "{folder.name}")\n```'
    )
    base = job.source.base
    if not isinstance(base, NoBase):
        text += (
            f"\n\nThe adapter was trained on the base in {base.format}. On the 16-bit base it answers slightly "
            "differently; `ingle export --to safetensors` merges the two as they were trained."
        )
    return text


def _head_usage(folder: Path, kind: str) -> str:
    reader = {"classify": "SequenceClassification", "tag": "TokenClassification"}.get(kind, "QuestionAnswering")
    return (
        f"```python\nfrom peft import AutoPeftModelFor{reader}\nfrom transformers import AutoConfig\n\n"
        f'head = AutoConfig.from_pretrained("{folder.name}/head")\n'
        f'model = AutoPeftModelFor{reader}.from_pretrained("{folder.name}", id2label=head.id2label, '
        "label2id=head.label2id, pad_token_id=head.pad_token_id)\n```"
    )


def _base_path(job: ExportJob, folder: Path) -> str:
    """Returns the path of the base's GGUF file from the folder of the Modelfile."""
    model = job.source.model
    if not is_gguf(model.id):
        return "./base.gguf"
    path = os.path.relpath(open_gguf(model.id, revision=model.revision).path.absolute(), folder.absolute())
    return path if path.startswith(".") else f"./{path}"


def _gguf_usage(job: ExportJob, base_path: str, name: str) -> str:
    command = f"```console\n$ llama-server -m {base_path} --lora {name}\n```\n\n"
    base = job.source.base
    if is_gguf(job.source.model.id):
        return f"{command}`{base_path}` is the file that the adapter was trained on."
    type_name = base.format if is_gguf_format(base) else "bf16"
    command += "`base.gguf` is the base model; create it once, in the same folder:\n\n```console\n"
    command += f"$ ingle quantize {job.base_model} --to {type_name} --out base.gguf\n```"
    if not is_gguf_format(base) and not isinstance(base, NoBase):
        command += (
            f"\n\nThe adapter was trained on the base in {base.format}, which GGUF does not support: on this base it "
            "answers slightly differently. `ingle export --to gguf` merges the two as they were trained."
        )
    return command
