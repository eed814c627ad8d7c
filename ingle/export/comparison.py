"""Another program and Ingle answer the same prompts: their tokens, their probabilities and their greedy answers."""

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

#: Likeliest tokens whose probabilities are compared.
TOP_K = 10


class Server(Protocol):
    """Another program that has read the export."""

    @property
    def version(self) -> str:
        """Name and version."""
        ...

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation whose answer is about to begin."""
        ...

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a plain text, with what is put before every text."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether an answer ends at a token."""
        ...

    @property
    def declared_end(self) -> int | None:
        """The token that the export itself names as the end of an answer."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """``[T, V]``: the logits after each token."""
        ...

    def continue_greedily(self, ids: Sequence[int], num_tokens: int, ends: frozenset[int]) -> list[int]:
        """The likeliest tokens after a prompt, up to one that ends an answer."""
        ...


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt, answered by both.

    Attributes:
        prompt: Its last message, or its text.
        tokens_equal: Whether both make the same tokens of it.
        ingle: Ingle's greedy answer.
        other: The other's.
        greedy_equal: Whether the answers are the same tokens.
        parted_at: Token at which they part; None where they do not.
        gap: How much less likely Ingle finds the other's choice there, nats.
        mean_kl: Mean KL(Ingle || other) along Ingle's answer.
        max_kl: The largest of them.
        top1_agreement: Share of tokens where both find the same one likeliest.
        top_k_difference: Largest difference of log-probability among Ingle's ten likeliest tokens.
        num_tokens: Tokens compared.
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


def ask(
    server: Server, engine: Any, examples: Sequence[Example], system: str | None, max_new_tokens: int, sink: Sink | None
) -> list[Compared]:
    """Both answer every prompt."""
    compared = []
    for done, example in enumerate(examples, 1):
        ids, messages, text = _prompt(example, engine, system)
        theirs = server.prompt_ids(messages) if messages else server.text_ids(text)
        compared.append(_compare(server, engine, ids, theirs, text, max_new_tokens))
        if sink is not None:
            sink(Progress(f"asking {server.version}", done, len(examples)))
    return compared


def summarize(compared: Sequence[Compared]) -> dict[str, Any]:
    """The figures of all prompts together."""
    total = sum(each.num_tokens for each in compared)
    return {
        "mean_kl": sum(each.mean_kl * each.num_tokens for each in compared) / total,
        "top1_agreement": sum(each.top1_agreement * each.num_tokens for each in compared) / total,
        "greedy_equal": sum(each.greedy_equal for each in compared),
        "num_prompts": len(compared),
        "num_tokens": total,
    }


def _prompt(example: Example, engine: Any, system: str | None) -> tuple[list[int], list[dict[str, str]], str]:
    """Ingle's tokens of a prompt, its messages (none for plain text), and its text."""
    if example.text is None and (example.messages or has_template(engine.tokenizer)):
        messages = list(read_conversation(example, system))
        while messages and messages[-1].role == "assistant":
            messages.pop()
        ids = data.prompt_ids(engine.tokenizer, example, system)
        return ids, [{"role": m.role, "content": m.content} for m in messages], messages[-1].content
    text = example.text[:200] if example.text is not None else str(example.prompt)
    return [int(i) for i in engine.tokenizer(text)["input_ids"]], [], text


def _compare(
    server: Server, engine: Any, ids: list[int], theirs: list[int], text: str, max_new_tokens: int
) -> Compared:
    tokenizer, model = engine.tokenizer, engine.model
    answer = list(models.generate(model, tokenizer, [ids], max_new_tokens=max_new_tokens)[0].token_ids)
    ends = models.end_token_ids(model, tokenizer)
    other = server.continue_greedily(ids, max_new_tokens, ends)
    whole = [*ids, *answer]
    ours_TV, theirs_TV = _logps(model, whole), torch.from_numpy(server.logits(whole)).log_softmax(-1)
    theirs_TV = theirs_TV[:, : ours_TV.shape[1]]
    kl_T = (ours_TV.exp() * (ours_TV - theirs_TV)).sum(-1)
    top = ours_TV.topk(min(TOP_K, ours_TV.shape[1]), dim=-1)
    parted = next((i for i, (a, b) in enumerate(zip([*answer, -1], [*other, -1], strict=False)) if a != b), None)
    gap = 0.0
    if parted is not None:
        row = ours_TV[len(ids) + parted - 1]
        chosen = other[parted] if parted < len(other) else max(ends, key=lambda token: float(row[token]), default=0)
        gap = float(row.max() - row[chosen])
    return Compared(
        prompt=text[:200],
        tokens_equal=ids == theirs,
        ingle=tokenizer.decode(answer),
        other=tokenizer.decode(other),
        greedy_equal=parted is None,
        parted_at=parted,
        gap=gap,
        mean_kl=float(kl_T.mean()),
        max_kl=float(kl_T.max()),
        top1_agreement=float((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).double().mean()),
        top_k_difference=float((theirs_TV.gather(-1, top.indices) - top.values).abs().max()),
        num_tokens=len(whole),
    )


@torch.no_grad()
def _logps(model: Any, ids: Sequence[int]) -> Tensor:
    device = models.head(model).weight.device
    logits: Tensor = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1).cpu()
