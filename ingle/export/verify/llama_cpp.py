"""Runs GGUF files in llama.cpp through its Python binding."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from ingle.env import install_command
from ingle.errors import DependencyError, ExportError


class LlamaCpp(AbstractContextManager["LlamaCpp"]):
    """A GGUF file loaded in llama.cpp.

    Args:
        path: Model file.
        adapter: LoRA file to apply to the model.
        context: Largest number of tokens in one text.

    Raises:
        DependencyError: The binding is not installed.
        ExportError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, *, adapter: Path | None = None, context: int) -> None:
        self._binding = import_binding()
        self.version = f"llama.cpp (llama-cpp-python {self._binding.__version__})"
        num_threads = torch.get_num_threads()  # more threads than free cores would wait for each other
        try:
            self._llama = _without_repacking(self._binding.Llama)(
                str(path),
                lora_path=None if adapter is None else str(adapter),
                n_ctx=context,
                n_batch=context,
                n_ubatch=context,
                n_threads=num_threads,
                n_threads_batch=num_threads,
                logits_all=True,
                use_mmap=True,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise ExportError(
                "llama.cpp cannot load the export.",
                where=str(adapter or path),
                why=str(error),
                fix="this is a bug in Ingle: please report it with the model's config.json",
            ) from error

    def __exit__(self, *error: object) -> None:
        self._llama.close()

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation as in ``llama-server``: rendered by the file's template, with one BOS.

        Raises:
            ExportError: The file contains no chat template.
        """
        template = self._llama.metadata.get("tokenizer.chat_template")
        if template is None:
            raise ExportError("The file contains no chat template.", where="tokenizer.chat_template")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        bos = self._token_text("bos")
        text: str = environment.from_string(template).render(
            messages=list(messages),
            bos_token=bos,
            eos_token=self._token_text("eos"),
            add_generation_prompt=True,
            raise_exception=_raise,
        )
        if bos and self._llama.metadata.get("tokenizer.ggml.add_bos_token") == "true":
            text = text.removeprefix(bos)
        return self.text_ids(text)

    def text_ids(self, text: str) -> list[int]:
        """Returns the tokens of a text, with special tokens parsed, and with BOS if the file requests it."""
        return [int(i) for i in self._llama.tokenize(text.encode(), add_bos=True, special=True)]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Returns the logits after each token, ``[T, V]``."""
        self._llama.reset()
        self._llama.eval(list(ids))
        return np.array(self._llama.scores[: len(ids)], dtype=np.float32)

    def continue_greedily(self, ids: Sequence[int], num_tokens: int, ends: frozenset[int]) -> list[int]:
        """Returns the greedy continuation of a prompt, up to a token that ends an answer."""
        self._llama.reset()
        self._llama.eval(list(ids))
        answer: list[int] = []
        while len(answer) < num_tokens:
            token = int(np.argmax(self._llama.scores[self._llama.n_tokens - 1]))
            if token in ends:
                break
            answer.append(token)
            self._llama.eval([token])
        return answer

    def is_end(self, token: int) -> bool:
        """Returns whether llama.cpp ends an answer at a token."""
        vocab = self._binding.llama_model_get_vocab(self._llama.model)
        return bool(self._binding.llama_vocab_is_eog(vocab, token))

    @property
    def declared_end(self) -> int | None:
        """The ``eos_token_id`` of the file."""
        number = int(self._llama.token_eos())
        return number if number >= 0 else None

    def _token_text(self, kind: str) -> str:
        number = getattr(self._llama, f"token_{kind}")()
        if number < 0:
            return ""
        vocab = self._binding.llama_model_get_vocab(self._llama.model)
        return str(self._binding.llama_vocab_get_text(vocab, number).decode("utf-8"))


def import_binding() -> Any:
    """Imports llama.cpp's Python binding.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise DependencyError(
            "--verify needs llama.cpp's Python binding, which is not installed.",
            why=str(error),
            fix=f"`{install_command('llama')}` (compiles for some minutes; needs a C++ compiler and CMake)",
        ) from error
    return llama_cpp


def _without_repacking(engine: Any) -> Any:
    """Returns the binding's class with llama.cpp's repacking of matrices disabled, for which it has no option.

    llama.cpp repacks matrices for the processor's matrix instructions and crashes with AMX (llama.cpp pull request
    26954).
    """

    class WithoutRepacking(engine):  # type: ignore[misc]
        @property
        def model_params(self) -> Any:
            return self._model_params

        @model_params.setter
        def model_params(self, params: Any) -> None:
            params.use_extra_bufts = False
            self._model_params = params

    return WithoutRepacking


def _raise(message: str) -> None:
    raise ValueError(message)
