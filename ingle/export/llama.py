"""The door to llama.cpp: its Python binding, asked the few things that a certificate needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from ingle.env import install_command
from ingle.errors import DependencyError, ExportError


class LlamaCpp:
    """A GGUF file as llama.cpp serves it.

    Args:
        path: The model.
        adapter: A LoRA GGUF to put on it.
        context: Most tokens in one text.

    Raises:
        DependencyError: The binding is not installed.
        ExportError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, *, adapter: Path | None = None, context: int) -> None:
        binding = require()
        self.version = f"llama.cpp (llama-cpp-python {binding.__version__})"
        try:
            self._llama = _plain(binding.Llama)(
                str(path),
                lora_path=None if adapter is None else str(adapter),
                n_ctx=context,
                n_batch=context,
                n_ubatch=context,
                n_threads=_threads(),
                n_threads_batch=_threads(),
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

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llama.close()

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation as ``llama-server`` makes them: the file's template, one BOS where it asks.

        Raises:
            ExportError: The file holds no template.
        """
        template = self._llama.metadata.get("tokenizer.chat_template")
        if template is None:
            raise ExportError("The file holds no chat template.", where="tokenizer.chat_template")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        bos = self._token_text("bos")
        text: str = environment.from_string(template).render(
            messages=list(messages),
            bos_token=bos,
            eos_token=self._token_text("eos"),
            add_generation_prompt=True,
            raise_exception=_raise,
        )
        if self.adds_bos and bos:
            text = text.removeprefix(bos)
        return self.text_ids(text)

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp puts a BOS before every text."""
        return bool(self._llama.metadata.get("tokenizer.ggml.add_bos_token") == "true")

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a text, special ones recognised, with the BOS that the file asks for."""
        return [int(i) for i in self._llama.tokenize(text.encode(), add_bos=True, special=True)]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """``[T, V]``: the logits after each token."""
        self._llama.reset()
        self._llama.eval(list(ids))
        return np.array(self._llama.scores[: len(ids)], dtype=np.float32)

    def continue_greedily(self, ids: Sequence[int], num_tokens: int, ends: frozenset[int]) -> list[int]:
        """The likeliest tokens after a prompt, up to one that ends an answer."""
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
        """Whether llama.cpp ends an answer at a token."""
        binding = require()
        vocab = binding.llama_model_get_vocab(self._llama.model)
        return bool(binding.llama_vocab_is_eog(vocab, token))

    @property
    def declared_end(self) -> int | None:
        """The file's own ``eos_token_id``."""
        number = int(self._llama.token_eos())
        return number if number >= 0 else None

    def _token_text(self, kind: str) -> str:
        binding = require()
        number = getattr(self._llama, f"token_{kind}")()
        if number < 0:
            return ""
        vocab = binding.llama_model_get_vocab(self._llama.model)
        return str(binding.llama_vocab_get_text(vocab, number).decode("utf-8"))


def require() -> Any:
    """The binding.

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


def _plain(engine: Any) -> Any:
    """The binding's class, reading matrices as they lie in the file.

    llama.cpp lays them out anew for the processor's own matrix instructions, which its class has no option against;
    where these are AMX, it crashes (llama.cpp pull request 26954).
    """

    class Plain(engine):  # type: ignore[misc]
        @property
        def model_params(self) -> Any:
            return self._model_params

        @model_params.setter
        def model_params(self, params: Any) -> None:
            params.use_extra_bufts = False
            self._model_params = params

    return Plain


def _threads() -> int:
    """As many as torch takes: more than there are free cores wait for one another."""
    return torch.get_num_threads()


def _raise(message: str) -> None:
    raise ValueError(message)
