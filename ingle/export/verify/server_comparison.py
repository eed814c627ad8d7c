"""Compares the tokens, probabilities and greedy answers of another program with Ingle's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ingle import data, models
from ingle.data.template import has_template, read_conversation
from ingle.data.types import Example
from ingle.events import Progress, Sink
from ingle.inference import Engine

#: Number of most likely tokens whose log-probabilities are compared.
TOP_K = 10


class Server(Protocol):
    """Another program that has loaded the export."""

    @property
    def version(self) -> str:
        """Name and version."""

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation up to the beginning of the answer."""

    def text_ids(self, text: str) -> list[int]:
        """Returns the tokens of a plain text, including those that precede every text."""

    def is_end(self, token: int) -> bool:
        """Returns whether a token ends an answer."""

    @property
    def declared_end(self) -> int | None:
        """Token that the export declares as the end of an answer."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Returns the logits after each token, ``[T, V]``."""

    def continue_greedily(self, ids: Sequence[int], num_tokens: int, ends: frozenset[int]) -> list[int]:
        """Returns the greedy continuation of a prompt, up to a token that ends an answer."""


@dataclass(frozen=True, slots=True)
class PromptComparison:
    """Comparison on one prompt.

    Attributes:
        prompt: Text of the last message, or the plain text.
        tokens_equal: Whether both programs tokenize the prompt alike.
        ingle: Ingle's greedy answer.
        other: The other program's greedy answer.
        greedy_equal: Whether the answers have the same tokens.
        parted_at: Index of the first token at which the answers differ; None if they are equal.
        gap: Difference in Ingle's log-probability between the two choices at that token, nats.
        mean_kl: Mean KL(Ingle || other) over the prompt and Ingle's answer.
        max_kl: Largest KL of a token.
        top1_agreement: Share of tokens with the same most likely next token.
        top_k_difference: Largest difference of log-probability among Ingle's ten most likely tokens.
        num_tokens: Number of compared tokens.
    """

    prompt: str
    tokens_equal: bool
    ingle: str
    other: str
    greedy_equal: bool
    parted_at: int | None
    gap: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    top_k_difference: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """Comparison over all prompts.

    Attributes:
        mean_kl: Mean KL(Ingle || other), nats per token.
        top1_agreement: Share of tokens with the same most likely next token.
        greedy_equal: Number of equal greedy answers.
        num_prompts: Number of prompts.
        num_tokens: Number of compared tokens.
    """

    mean_kl: float
    top1_agreement: float
    greedy_equal: int
    num_prompts: int
    num_tokens: int

    @classmethod
    def over(cls, prompts: Sequence[PromptComparison]) -> Agreement:
        """Aggregates the comparisons of prompts."""
        total = sum(each.num_tokens for each in prompts)
        return cls(
            mean_kl=sum(each.mean_kl * each.num_tokens for each in prompts) / total,
            top1_agreement=sum(each.top1_agreement * each.num_tokens for each in prompts) / total,
            greedy_equal=sum(each.greedy_equal for each in prompts),
            num_prompts=len(prompts),
            num_tokens=total,
        )


def compare_answers(
    server: Server,
    engine: Engine,
    examples: Sequence[Example],
    system: str | None,
    max_new_tokens: int,
    sink: Sink,
) -> list[PromptComparison]:
    """Compares the tokens, probabilities and greedy answers of both programs on every prompt."""
    compared = []
    for done, example in enumerate(examples, 1):
        ids, messages, text = _prompt(example, engine, system)
        other_ids = server.prompt_ids(messages) if messages else server.text_ids(text)
        compared.append(_compare(server, engine, ids, other_ids, text, max_new_tokens))
        sink(Progress(f"Comparing with {server.version}", done, len(examples)))
    return compared


def _prompt(example: Example, engine: Engine, system: str | None) -> tuple[list[int], list[dict[str, str]], str]:
    """Returns Ingle's tokens of a prompt, its messages (none for plain text), and its text."""
    if example.text is None and (example.messages or has_template(engine.tokenizer)):
        messages = list(read_conversation(example, system))
        while messages and messages[-1].role == "assistant":
            messages.pop()
        ids = data.prompt_ids(engine.tokenizer, example, system)
        return ids, [{"role": m.role, "content": m.content} for m in messages], messages[-1].content
    text = example.text[:200] if example.text is not None else str(example.prompt)
    return [int(i) for i in engine.tokenizer(text)["input_ids"]], [], text


def _compare(
    server: Server, engine: Engine, ids: list[int], other_ids: list[int], text: str, max_new_tokens: int
) -> PromptComparison:
    tokenizer, model = engine.tokenizer, engine.model
    answer = list(models.generate(model, tokenizer, [ids], max_new_tokens=max_new_tokens)[0].token_ids)
    ends = models.end_token_ids(model, tokenizer)
    other = server.continue_greedily(ids, max_new_tokens, ends)
    tokens = [*ids, *answer]
    ours_TV, theirs_TV = _logps(model, tokens), torch.from_numpy(server.logits(tokens)).log_softmax(-1)
    theirs_TV = theirs_TV[:, : ours_TV.shape[1]]
    kl_T = (ours_TV.exp() * (ours_TV - theirs_TV)).sum(-1)
    top = ours_TV.topk(min(TOP_K, ours_TV.shape[1]), dim=-1)
    parted = next((i for i, (a, b) in enumerate(zip([*answer, -1], [*other, -1], strict=False)) if a != b), None)
    gap = 0.0
    if parted is not None:
        row = ours_TV[len(ids) + parted - 1]
        chosen = other[parted] if parted < len(other) else max(ends, key=lambda token: float(row[token]), default=0)
        gap = float(row.max() - row[chosen])
    return PromptComparison(
        prompt=text[:200],
        tokens_equal=ids == other_ids,
        ingle=tokenizer.decode(answer),
        other=tokenizer.decode(other),
        greedy_equal=parted is None,
        parted_at=parted,
        gap=gap,
        mean_kl=float(kl_T.mean()),
        max_kl=float(kl_T.max()),
        top1_agreement=float((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).double().mean()),
        top_k_difference=float((theirs_TV.gather(-1, top.indices) - top.values).abs().max()),
        num_tokens=len(tokens),
    )


@torch.no_grad()
def _logps(model: Any, ids: Sequence[int]) -> Tensor:
    device = models.device_of(model)
    logits: Tensor = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1).cpu()
