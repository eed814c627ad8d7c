"""Runs transformers and PEFT on files that Ingle wrote, independently of Ingle's own loader."""

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

from ingle.data import Message, render
from ingle.errors import DependencyError
from ingle.models.interop.saving import quiet
from ingle.models.kinds import reader_class
from ingle.models.text_part import is_wrapper, wrapper_class

#: What reads an export besides transformers, by package name.
_NAMES = {"peft": "PEFT", "bitsandbytes": "bitsandbytes", "hqq": "the hqq package"}


class TransformersServer:
    """A model folder as transformers reads it, with an adapter that PEFT attaches.

    Args:
        folder: A model in the hub's layout.
        adapter: An adapter folder.

    Attributes:
        version: Names and versions of the libraries.

    Raises:
        DependencyError: PEFT, or a library that the quantized weights need, is not installed.
    """

    def __init__(self, folder: Path, *, adapter: Path | None = None) -> None:
        self.version = f"transformers {transformers.__version__}"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # The libraries' warnings concern their callers' code, not the user's model.
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
            kind: Any = getattr(transformers, reader_class(config))
            model: Any = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except ImportError as error:
            raise DependencyError(
                "A library that transformers needs for these weights is not installed.", why=str(error)
            ) from error
        if adapter is None:
            return model
        require_readers("peft")
        import peft

        self.version += f", peft {peft.__version__}"
        return peft.PeftModel.from_pretrained(model, str(adapter))

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation with the generation prompt.

        Raises:
            DataError: The chat template refuses the conversation.
            ModelError: The chat template exceeds its limits.
        """
        conversation = [Message(message["role"], message["content"]) for message in messages]
        text = render(self._tokenizer, conversation, add_generation_prompt=True)
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def text_ids(self, text: str) -> list[int]:
        """Returns the tokens of a plain text, with the special tokens that begin every text."""
        return [int(i) for i in self._tokenizer(text)["input_ids"]]

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return token in self._ends

    @property
    def declared_end(self) -> int | None:
        """The tokenizer's end-of-text token."""
        number: int | None = self._tokenizer.eos_token_id
        return number

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Returns the logits after each token, ``[T, V]``."""
        output: NDArray[np.float32] = self._model(input_ids=torch.tensor([list(ids)])).logits[0].float().numpy()
        return output

    def continue_greedily(self, ids: Sequence[int], num_tokens: int, ends: frozenset[int]) -> list[int]:
        """Returns the most likely tokens after a prompt, up to one that ends an answer."""
        answer: list[int] = []
        while len(answer) < num_tokens:
            token = int(self.logits([*ids, *answer])[-1].argmax())
            if token in ends:
                break
            answer.append(token)
        return answer


def _read_hqq(folder: Path, config: Any) -> Any:
    """Returns a model with the hqq package's layers; transformers 5 would ignore them and use random weights."""
    require_readers("hqq")
    from hqq.core.quantize import HQQLinear

    del config.quantization_config
    kind: Any = wrapper_class(config) if is_wrapper(config) else None
    model: Any = (
        AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if kind is None
        else kind._from_config(config, dtype=torch.float32)
    )
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
    """Raises an error unless all libraries that read an export are installed.

    Raises:
        DependencyError: One of them is not installed.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise DependencyError(
                f"--verify needs {_NAMES[library]}, which is not installed.",
                fix=f"pip install {library}, or omit --verify",
            )
