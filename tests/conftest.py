"""Fixtures every test may use: development data when it is there, and a tiny real tokenizer."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

#: ChatML, as Qwen and many others use it.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "question answer hello world how are you today",
    "user assistant system model name area price food rating",
    "what is two plus two? it is four. yes, no, perhaps!",
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with development data; the test is skipped where there is none."""
    named = os.environ.get("INGLE_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no development data; name its folder with INGLE_TEST_DATA")
    return folder


def make_tokenizer(
    *,
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
    bos: str | None = None,
    eos: str | None = "<|endoftext|>",
    pad: str | None = "<|pad|>",
    chat_template: str | None = CHATML,
    add_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few hundred tokens, trained in memory."""
    # Imported here, so that tests without a tokenizer start fast.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokens = list(dict.fromkeys([*(token for token in named.values() if token), *special]))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS * 4, trainer)
    if add_bos and bos is not None:
        core.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]),
            ]
        )
    given = {key: token for key, token in named.items() if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=list(special), **given)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., PreTrainedTokenizerFast]:
    """:func:`make_tokenizer`, for tests that need their own special tokens or template."""
    return make_tokenizer


@pytest.fixture()
def tokenizer() -> PreTrainedTokenizerFast:
    """A tiny byte-level BPE tokenizer with a ChatML template; pad, end of turn and end of text all differ."""
    return make_tokenizer()


def write_model(folder: Path, path: Path, file_type: str) -> Path:
    """Writes the model in a folder as a GGUF file, tensor by tensor as llama.cpp's converter and quantizer would."""
    # Imported here, so that tests without a model start fast.
    import torch
    from safetensors.torch import load_file

    from ingle.gguf import TensorToWrite, vocabulary, write_gguf
    from ingle.gguf.architecture import to_metadata
    from ingle.gguf.mixes import file_type_number, mix_of
    from ingle.gguf.names import names_of
    from ingle.quant import GgufFormats

    def read(name: str) -> dict[str, Any]:
        file = folder / name
        return json.loads(file.read_text()) if file.is_file() else {}

    config, settings = read("config.json"), read("tokenizer_config.json")
    ends = read("generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    template = folder / "chat_template.jinja"
    metadata = to_metadata(config)
    names = names_of(config)
    metadata |= vocabulary.to_metadata(
        read("tokenizer.json"),
        vocab_size=config["vocab_size"],
        special={key: settings.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")},
        end_token_ids=ends if isinstance(ends, list) else [ends],
        chat_template=template.read_text() if template.is_file() else None,
    )
    metadata["general.file_type"] = file_type_number(file_type)
    mix, make = mix_of(file_type, metadata, tied=config["tie_word_embeddings"]), GgufFormats()
    tensors = []
    for name, weight in load_file(folder / "model.safetensors").items():
        rule = names.rule(name, tuple(weight.shape))
        assert rule is not None, name
        parts = rule.values_in_file(weight.float().numpy())
        for gguf_name, shape, values in zip(rule.tensors, rule.file_shapes, parts, strict=True):
            kind = mix.tensor_type(gguf_name, shape)

            def data(values: NDArray[Any] = values, kind: str = kind, shape: Any = shape) -> NDArray[Any]:
                format = make(kind)
                dtype = {"f32": np.float32, "f16": np.float16}.get(kind, np.float32)
                if format is None:
                    return values.astype(dtype)
                return format.encode(torch.from_numpy(values).view(-1, shape[-1]))["data"].numpy()

            tensors.append(TensorToWrite(gguf_name, kind, shape, data))
    write_gguf(path, metadata, tensors)
    return path


@pytest.fixture(scope="session")
def llama_cpp() -> Any:
    """llama.cpp's Python binding, the oracle of GGUF files; the test is skipped where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed here")
    return importlib.import_module("llama_cpp")


@pytest.fixture(scope="session")
def gguf_of() -> Callable[[Path, Path, str], Path]:
    """:func:`write_model`: a model folder, the file to write, and its file type."""
    return write_model
