"""The fuzz targets: files, functions that read them, and references for their answers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz import inputs, rewards
from tests.fuzz.sandbox import Refused, command

#: Texts that are encoded with every tokenizer.
_TEXTS = ("the quick brown fox", " héllo\n\tworld 12", "<|im_start|>user\nhi<|im_end|>")


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: Name on the command line.
        make: Writes the input; its second argument is a folder with ``model/`` and ``data/``.
        act: Reads the input and returns an answer as JSON; may write to the output folder.
        kinds: The files to mutate, and their kinds of mutations.
        fixed: Whether every mutated input must give the same answer or be refused.
        expect: Reads parts of the answer from the mutated input independently; an exception means unknown.
        strict: Whether the input must be refused if ``expect`` raises.
        option: An option that refusals may name instead of the file.
    """

    name: str
    make: Callable[[Path, Path], None]
    act: Callable[[Path, Path], Any]
    kinds: Mapping[str, str]
    fixed: bool = False
    expect: Callable[[Path], Mapping[str, Any]] | None = None
    strict: bool = False
    option: str | None = None


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _weights(model: Any) -> dict[str, str]:
    """Returns a digest of the bytes of every parameter."""
    return {name: _bytes(tensor) for name, tensor in model.state_dict().items()}


def _bytes(*tensors: Any) -> str:
    """Returns a digest of the bytes of tensors."""
    import torch

    flat = (tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors)
    return _sha(b"".join(part.numpy().tobytes() for part in flat))


def _open(path: Path) -> Any:
    from ingle import inference, models
    from ingle.config.model import ModelConfig

    if (path / "adapter_config.json").is_file() or (path / "run.yaml").is_file():
        return inference.open_model(str(path))
    model = ModelConfig(id=str(path), dtype="float32")
    return inference.open_source(inference.Source(model, models.stored_base(model)))


def _answer(path: Path) -> dict[str, Any]:
    """Returns digests of a model's weights, adapter and logits, token ids of texts, and two tokens of an answer."""
    import torch

    from ingle.data.types import Message

    engine = _open(path)
    ids = [engine.tokenizer(text)["input_ids"] for text in _TEXTS]
    question = (Message("user", "what is two plus two?"),) if engine.tokenizer.chat_template else "what is two"
    answer = engine.generate([question], max_new_tokens=2)[0]
    with torch.no_grad():
        logits = engine.model(input_ids=torch.arange(6).view(1, -1)).logits
    return {
        "weights": _weights(engine.model),
        "ids": ids,
        "answer": [answer.token_ids, answer.finish_reason],
        "logits": _bytes(logits),
        "adapter": _factors(engine.model),
    }


def _factors(model: Any) -> dict[str, Any]:
    from ingle.adapters.adapted import lora_modules

    return {
        name: [module.rank, module.scale, _bytes(module.lora_a, module.lora_b)]
        for name, module in lora_modules(model).items()
    }


def _copy(*names: str) -> Callable[[Path, Path], None]:
    """Copies shared files or folders."""

    def make(folder: Path, shared: Path) -> None:
        for name in names:
            source, target = shared / name, folder / Path(name).name
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)

    return make


# Configs.


def _make_config(folder: Path, shared: Path) -> None:
    text = inputs.CONFIG.format(model=shared / "model", data=shared / "data" / "rows.jsonl", output="runs/x")
    (folder / "run.yaml").write_text(text)
    words = ["--optim.lr=1e-4", "--data.sources.0.limit", "5", "--train.num_steps=3", "--base.format=int8", "--seed=3"]
    (folder / "words.json").write_text(json.dumps(words))


def _show_config(folder: Path, out: Path) -> Any:
    try:
        words = [str(word) for word in json.loads((folder / "words.json").read_bytes()) if "\0" not in str(word)]
    except (ValueError, TypeError, RecursionError):
        words = []
    from ingle.config.loader import load_run, run_to_yaml

    return {"run": run_to_yaml(load_run(folder / "run.yaml", words).run).replace(str(folder), "")}


# Data.


def _report(folder: Path, *words: str) -> Any:
    """Returns the report of ``ingle data inspect``."""
    model = f"--model.id={folder / 'model'}"
    text = command("data", "inspect", model, *words, "--data.max_seq_len=64", "--output=x", "--json")
    # The position of a row may change when nothing else does.
    return json.loads(re.sub(r'"origin": "[^"]*"', '"origin": ""', text.replace(str(folder), "")))


def _inspect(source: str, *words: str) -> Callable[[Path, Path], Any]:
    def act(folder: Path, out: Path) -> Any:
        from ingle.data.readers import read_rows

        report = _report(folder, f"--data.sources={folder / source}", *words)
        return {"report": report, "rows": [_canonical(row) for _, row in read_rows(folder / source)]}

    return act


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _rows_jsonl(folder: Path) -> Mapping[str, Any]:
    lines = (folder / "rows.jsonl").read_bytes().decode("utf-8-sig").split("\n")
    return {"rows": [_canonical(json.loads(line)) for line in lines if line.strip()]}


def _rows_array(folder: Path) -> Mapping[str, Any]:
    return {"rows": [_canonical(row) for row in json.loads((folder / "array.json").read_text("utf-8-sig"))]}


def _rows_parquet(folder: Path) -> Mapping[str, Any]:
    import pyarrow.parquet

    return {"rows": [_canonical(row) for row in pyarrow.parquet.read_table(folder / "rows.parquet").to_pylist()]}


def _data(
    name: str, file: str, kind: str, expect: Callable[[Path], Mapping[str, Any]] | None = None, *words: str
) -> Target:
    return Target(name, _copy("model", f"data/{file}"), _inspect(file, *words), {file: kind}, expect=expect)


def _prompts(folder: Path, out: Path) -> Any:
    from ingle.cli.generation import read_prompts

    return {"prompts": read_prompts([], folder / "rows.jsonl")}


def _make_template(folder: Path, shared: Path) -> None:
    _copy("model", "data/rows.jsonl")(folder, shared)
    (folder / "template.jinja").write_text((shared / "model" / "chat_template.jinja").read_text())


def _render(folder: Path, out: Path) -> Any:
    template = f"--model.chat_template={folder / 'template.jinja'}"
    return {"report": _report(folder, f"--data.sources={folder / 'rows.jsonl'}", template)}


# Models.


def _load_folder(folder: Path, out: Path) -> Any:
    return _answer(folder / "model")


def _load_gguf(folder: Path, out: Path) -> Any:
    return _answer(folder / "model.gguf")


def _make_family(case: str) -> Callable[[Path, Path], None]:
    return lambda folder, shared: inputs.write_family(folder / "model.gguf", case)


def _gguf_weights(folder: Path) -> Mapping[str, Any]:
    """Returns digests of all tensors as read by the gguf package, with queries and keys in transformers' order."""
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(folder / "model.gguf")
    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    found = {}
    for tensor in reader.tensors:
        *layer, part, _ = tensor.name.split(".")
        rows = tensor.data
        if part in heads:
            count = reader.fields[f"llama.{heads[part]}"].contents()
            rows = rows.reshape(count, -1, 2, rows.shape[-1]).swapaxes(1, 2)
        module = _GGUF_MODULES[part] if not layer else f"model.layers.{layer[1]}.{_GGUF_MODULES[part]}"
        quantized = tensor.tensor_type == GGMLQuantizationType.Q8_0
        found[f"{module}.{'data' if quantized else 'weight'}"] = _sha(rows.tobytes())
    return {"weights": found}


_GGUF_MODULES = {
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
}


def _safetensors_weights(folder: Path) -> Mapping[str, Any]:
    """Returns digests of the tensors as read by the safetensors library, in float32."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted((folder / "model").glob("*.safetensors")):
        tensors |= load_file(file)
    wanted = _plain_names(folder / "model")
    return {"weights": {name: _bytes(tensors[name].float()) for name in wanted}}


def _plain_names(model: Path) -> list[str]:
    config = json.loads((model / "config.json").read_text())
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{n}.{part}.weight" for n in range(config["num_hidden_layers"]) for part in parts]
    return ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]


def _make_quantized(to: str) -> Callable[[Path, Path], None]:
    return lambda folder, shared: inputs.write_quantized(folder / "model", shared / "model", to)


# Adapters, importance matrices.


def _make_adapter(folder: Path, shared: Path) -> None:
    inputs.write_adapter(folder / "adapter", shared / "model")


def _load_adapter(folder: Path, out: Path) -> Any:
    return _answer(folder / "adapter")


def _adapter_factors(folder: Path) -> Mapping[str, Any]:
    """Returns rank, scale and digest of every adapter, as PEFT reads them."""
    from safetensors.torch import load_file

    settings = json.loads((folder / "adapter" / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    if settings["rank_pattern"] or settings["alpha_pattern"] or settings["modules_to_save"]:
        raise ValueError("no opinion")
    factors = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"])
            b = tensors[key.replace("lora_A", "lora_B")]
            factors[name] = [settings["r"], scale, _bytes(a.float(), b.float())]
    return {"adapter": factors}


def _load_imatrix(name: str) -> Callable[[Path, Path], Any]:
    def act(folder: Path, out: Path) -> Any:
        import torch

        from ingle import models
        from ingle.config.model import ModelConfig
        from ingle.models.interop.imatrix_names import load_importance

        model = models.meta_model(ModelConfig(id=str(folder / "model"), dtype="float32"), "cpu", torch.float32)
        found = load_importance(model, folder / name)
        return {"importance": {key: _bytes(value) for key, value in sorted(found.items())}}

    return act


def _make_imatrix(folder: Path, shared: Path) -> None:
    _copy("model")(folder, shared)
    inputs.write_imatrix_files(folder, shared / "model")


# Runs.


def _make_run(folder: Path, shared: Path) -> None:
    shutil.copytree(shared / "run", folder / "run")


def _make_checkpoint(folder: Path, shared: Path) -> None:
    _make_run(folder, shared)
    inputs.unfinish(folder / "run")


def _resume(folder: Path, out: Path) -> Any:
    """Resumes a copy of the run; returns digests of its files."""
    shutil.copytree(folder / "run", out)
    command("train", "--resume", out)
    weights = out / "adapter" / "adapter_model.safetensors"
    return {"adapter": _sha(weights.read_bytes()), "files": sorted(path.name for path in (out / "adapter").iterdir())}


def _use_run(folder: Path, out: Path) -> Any:
    """Opens a finished run, exports its adapter and resumes it."""
    from ingle.report.run_files import read_steps

    refused = []
    answer: dict[str, Any] = {"steps": [row["loss"] for row in read_steps(folder / "run" / "metrics.jsonl")]}
    try:
        answer["answer"] = _answer(folder / "run")
    except Exception as error:
        from ingle.cli.exit_status import as_user_error

        if as_user_error(error) is None:
            raise
        refused.append(str(error))
    shutil.copytree(folder / "run", out / "run")
    for words in (("export", out / "run", "--to", "peft", "--out", out / "peft"), ("train", "--resume", out / "run")):
        try:
            command(*words)
        except Refused as error:
            refused.append(str(error))
    if refused:
        raise Refused("\n".join(refused)[:4000])
    answer["adapter"] = _sha((out / "run" / "adapter" / "adapter_model.safetensors").read_bytes())
    return answer


_MODEL = "model/"

TARGETS = {
    target.name: target
    for target in (
        Target("config", _make_config, _show_config, {"run.yaml": "yaml", "words.json": "words"}),
        _data("jsonl", "rows.jsonl", "jsonl", _rows_jsonl),
        _data("preferences", "pairs.jsonl", "jsonl", None, "--objective.kind=dpo"),
        _data("json", "rows.json", "json"),
        _data("json-array", "array.json", "json", _rows_array),
        _data("csv", "rows.csv", "text"),
        _data("tsv", "rows.tsv", "text"),
        _data("parquet", "rows.parquet", "bytes", _rows_parquet),
        _data("text", "text.txt", "text"),
        Target("prompts", _copy("data/rows.jsonl"), _prompts, {"rows.jsonl": "jsonl"}),
        Target("template", _make_template, _render, {"template.jinja": "jinja"}, option="model.chat_template"),
        Target(
            "model-config",
            _copy("model"),
            _load_folder,
            {f"{_MODEL}config.json": "json", f"{_MODEL}generation_config.json": "json"},
        ),
        Target(
            "tokenizer",
            _copy("model"),
            _load_folder,
            {
                f"{_MODEL}tokenizer.json": "json",
                f"{_MODEL}tokenizer_config.json": "json",
                f"{_MODEL}chat_template.jinja": "jinja",
            },
        ),
        Target("gguf", _copy("model.gguf"), _load_gguf, {"model.gguf": "gguf"}, expect=_gguf_weights),
        *(
            Target(f"gguf-{case}", _make_family(case), _load_gguf, {"model.gguf": "gguf"})
            for case in ("gemma4_moe", "phi3", "nemotron_h_moe", "gpt2", "qwen3_5")
        ),
        Target(
            "safetensors",
            _copy("model"),
            _load_folder,
            {f"{_MODEL}model.safetensors": "safetensors"},
            expect=_safetensors_weights,
            strict=True,
        ),
        Target(
            "index",
            lambda folder, shared: inputs.write_sharded(folder / "model", shared / "model"),
            _load_folder,
            {
                f"{_MODEL}model.safetensors.index.json": "json",
                f"{_MODEL}model-00002-of-00002.safetensors": "safetensors",
            },
            expect=_safetensors_weights,
        ),
        *(
            Target(
                f"quantized-{to}",
                _make_quantized(to),
                _load_folder,
                {f"{_MODEL}model.safetensors": "safetensors", f"{_MODEL}config.json": "json"},
            )
            for to in ("nf4", "int8", "hqq-4")
        ),
        Target(
            "adapter",
            _make_adapter,
            _load_adapter,
            {"adapter/adapter_config.json": "json", "adapter/adapter_model.safetensors": "safetensors"},
            expect=_adapter_factors,
            strict=True,
        ),
        *(
            Target(f"imatrix-{kind}", _make_imatrix, _load_imatrix(f"imatrix.{kind}"), {f"imatrix.{kind}": kind_of})
            for kind, kind_of in (("gguf", "gguf"), ("dat", "bytes"))
        ),
        Target(
            "checkpoint",
            _make_checkpoint,
            _resume,
            {
                "run/checkpoints/step-1/state.json": "json",
                "run/checkpoints/step-1/optimizer.safetensors": "safetensors",
                "run/metrics.jsonl": "jsonl",
            },
            fixed=True,
        ),
        Target(
            "run",
            _make_run,
            _use_run,
            {"run/run.yaml": "yaml", "run/report.json": "json", "run/metrics.jsonl": "jsonl"},
        ),
        Target(
            "reward-frames",
            rewards.make_frames,
            rewards.read_frames,
            {"frames.bin": "bytes"},
            expect=rewards.expect_frames,
            strict=True,
        ),
        Target("reward", rewards.make_function, rewards.score, {"function.py": "text"}),
    )
}
