"""transformers and PEFT by themselves, reading what Ingle wrote, with nothing of Ingle's between them and the files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ingle.errors import DependencyError
from ingle.models.interop.saving import quiet

#: What reads an export besides transformers, by the name of its package.
_NAMES = {"peft": "PEFT", "bitsandbytes": "bitsandbytes", "hqq": "the hqq package"}


class TransformersServer:
    """A model folder as ``AutoModelForCausalLM`` reads it, with an adapter that PEFT puts on it.

    Args:
        folder: A model in the hub's layout.
        adapter: An adapter folder.

    Attributes:
        version: Names and versions.

    Raises:
        DependencyError: PEFT, or what the packed weights need, is not installed.
    """

    def __init__(self, folder: Path, *, adapter: Path | None = None) -> None:
        self.version = f"transformers {transformers.__version__}"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # What these libraries warn of concerns their callers' code, not the user's model.
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model: Any = self._read(folder, adapter).eval()
        declared = self._model.generation_config.eos_token_id
        self._ends = set(declared if isinstance(declared, list) else [declared]) | {self._tokenizer.eos_token_id}

    def _read(self, folder: Path, adapter: Path | None) -> Any:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "hqq":
            return _read_hqq(folder, config)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except ImportError as error:
            raise DependencyError("transformers lacks a library for these weights.", why=str(error)) from error
        if adapter is None:
            return model
        require_readers("peft")
        import peft

        self.version += f", peft {peft.__version__}"
        return peft.PeftModel.from_pretrained(model, str(adapter))

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation whose answer is about to begin."""
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a plain text, with what is put before every text."""
        return [int(i) for i in self._tokenizer(text)["input_ids"]]

    def is_end(self, token: int) -> bool:
        """Whether an answer ends at a token."""
        return token in self._ends

    @property
    def declared_end(self) -> int | None:
        """The tokenizer's own end of a text."""
        number: int | None = self._tokenizer.eos_token_id
        return number

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """``[T, V]``: the logits after each token."""
        output: NDArray[np.float32] = self._model(input_ids=torch.tensor([list(ids)])).logits[0].float().numpy()
        return output

    def continue_greedily(self, ids: Sequence[int], num_tokens: int, ends: frozenset[int]) -> list[int]:
        """The likeliest tokens after a prompt, up to one that ends an answer."""
        answer: list[int] = []
        while len(answer) < num_tokens:
            token = int(self.logits([*ids, *answer])[-1].argmax())
            if token in ends:
                break
            answer.append(token)
        return answer


def _read_hqq(folder: Path, config: Any) -> Any:
    """A model with the hqq package's own layers: transformers 5 does not read them, and takes fresh weights instead."""
    require_readers("hqq")
    from hqq.core.quantize import HQQLinear

    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for path in [key.removesuffix(".W_q") for key in tensors if key.endswith(".W_q")]:
        keys = [key for key in tensors if key.startswith(f"{path}.")]
        layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
        layer.load_state_dict({key.removeprefix(f"{path}."): tensors.pop(key) for key in keys})
        model.set_submodule(path, layer)
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def require_readers(*libraries: str) -> None:
    """Raises unless what another program needs to read an export is there.

    Raises:
        DependencyError: It is not installed.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise DependencyError(
                f"--verify asks {_NAMES[library]} itself, and it is not installed.",
                fix=f"pip install {library}, or leave --verify out",
            )
