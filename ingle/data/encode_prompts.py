"""Prompts without answers: tokenized as generation reads them, with room for the answer that is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ingle.data.control import ControlTokens
from ingle.data.encode_answers import PROMPTS_CUT
from ingle.data.encode_sources import source_ids
from ingle.data.encode_text_answers import write_prompt
from ingle.data.encoding import TextEncoder, make_document
from ingle.data.prompt import prompt_ids
from ingle.data.row_encoder import Counts, Piece, TokenOptions
from ingle.data.sandbox import Sandbox
from ingle.data.template import ANSWER, has_template
from ingle.data.types import Example, Ids, Message, Tokenizer
from ingle.errors import ConfigError

#: With less room than this, no prompt can be read.
_LEAST_ROOM = 8


class PromptEncoder:
    """Tokenizes prompts; no token carries loss.

    A prompt that leaves no room for the answer is dropped. With ``too_long: truncate`` it loses its oldest messages,
    and its first tokens if the last message is too long.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens.

    Raises:
        ConfigError: ``too_long: split``, or the answer takes all the room.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._control = ControlTokens(tokenizer, options.control_tokens)
        self._sandbox = Sandbox(tokenizer)
        self._room = options.max_seq_len - options.max_answer_len
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos: int | None = None if bos == eos else bos
        if options.too_long == "split":
            fix = "--data.too_long=drop or --data.too_long=truncate"
            raise ConfigError("A prompt cannot be split.", where="data.too_long = split", fix=fix)
        if self._room < _LEAST_ROOM:
            raise ConfigError(
                "The sampled answers leave no room for prompts.",
                where="data.max_seq_len",
                why=f"it has {options.max_seq_len:,} tokens, and an answer {options.max_answer_len:,}",
                fix=f"--data.max_seq_len={options.max_answer_len + options.max_seq_len}, or a smaller "
                "objective.rollout.max_new_tokens",
            )

    def encode(self, examples: Sequence[Example], counts: Counts) -> Iterator[tuple[Example, Sequence[Piece]]]:
        """Yields the tokens of each prompt that is kept; see :class:`~ingle.data.row_encoder.RowEncoder`.

        Raises:
            DataError: A conversation needs a chat template, or the template refuses it.
            ModelError: The chat template takes too much time or memory.
        """
        with self._sandbox:
            found = [(example, ids) for example in examples if (ids := self._fit(example, counts))]
        for example, ids in found:
            yield example, [Piece(np.array(ids, np.int32), np.zeros(len(ids), np.bool_))]

    def _fit(self, example: Example, counts: Counts) -> list[int]:
        """Returns the tokens of a prompt for which there is room; none if it is left out."""
        for remark in example.remarks:
            counts.remarks.add(remark, example.origin)
        ids = self._read(example) if _says_something(example) else []
        if not ids:
            counts.dropped.add("Empty prompt.", example.origin)
        if len(ids) <= self._room:
            return ids
        if self._options.too_long == "drop":
            counts.dropped.add(self._explain(), example.origin)
            return []
        kept = self._shorten(example, ids)
        counts.truncated_documents += 1
        counts.truncated_tokens += len(ids) - len(kept)
        counts.remarks.add(PROMPTS_CUT, example.origin)
        return kept

    def _read(self, example: Example) -> list[int]:
        """Returns the tokens that the sampler continues."""
        system = self._options.system
        if self._options.model_kind == "encoder_decoder":
            if example.messages:  # without an answer, the prompt of a conversation would end before its last question
                example = replace(example, messages=(*example.messages, Message("assistant", "")))
            return source_ids(self._tokenizer, [write_prompt(example, system)[0]])[0]
        return prompt_ids(self._tokenizer, example, system, control=self._control, sandbox=self._sandbox)

    def _explain(self) -> str:
        limit = f"Longer than data.max_seq_len = {self._options.max_seq_len}"
        if not self._options.max_answer_len:
            return f"{limit}."
        return f"{limit}, less {self._options.max_answer_len} tokens for the answer."

    def _shorten(self, example: Example, ids: list[int]) -> list[int]:
        """Returns the tokens without as many of the oldest messages, or of the first tokens, as needed.

        A system message stays, and what follows it begins with a question.
        """
        turns = example.messages
        head = int(bool(turns) and turns[0].role in ("system", "developer"))
        starts = [i for i in range(head + 1, len(turns)) if turns[i].role == "user"]
        low, high = 0, len(starts)
        while low < high:  # the first start from which the prompt is short enough
            middle = (low + high) // 2
            shorter = self._read(replace(example, messages=(*turns[:head], *turns[starts[middle] :])))
            ids, low, high = (shorter, low, middle) if len(shorter) <= self._room else (ids, middle + 1, high)
        if starts and low == len(starts):
            ids = self._read(replace(example, messages=(*turns[:head], *turns[starts[-1] :])))
        kept = int(ids[0] == self._bos)
        return ids if len(ids) <= self._room else ids[:kept] + ids[len(ids) - self._room + kept :]


def _says_something(example: Example) -> bool:
    texts = [message.written for message in example.messages if message.role != "system"] or [example.prompt or ""]
    return any(text.strip() for text in texts)


def answer_ending(tokenizer: Tokenizer) -> tuple[int, Ids]:
    """Returns the token that ends an answer, and the tokens that a chat template writes behind it.

    A document of training contains the latter, but nobody samples them.
    """
    turns = (Message("user", ANSWER), Message("assistant", ANSWER))
    chat = Example("answer_ending", messages=turns)
    example = chat if has_template(tokenizer) else Example("answer_ending", prompt=ANSWER, completion=ANSWER)
    document = make_document(example, tokenizer, train_on="last", system=None)
    assert not isinstance(document, str), document
    (found,) = TextEncoder(tokenizer).encode([document])
    last = int(np.flatnonzero(found.supervised)[-1])
    return int(found.ids[last]), found.ids[last + 1 :]
