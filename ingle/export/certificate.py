"""The certificate of an export: another program reads what was written and must answer as Ingle does.

The other program is llama.cpp for GGUF, transformers (with PEFT for an adapter) for safetensors.  It is asked for the
tokens of rendered conversations and of awkward texts, for the tokens that end an answer, for the probabilities of every
next token along Ingle's own greedy answers, and for its own greedy answers.

Tokens must be equal.  Probabilities cannot be: llama.cpp rounds the inputs of every packed product to 8 bits, and sums
are made in another order.  So they may differ by what such rounding makes, and a greedy answer may part from Ingle's
where the two likeliest tokens are nearly tied, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ingle import __version__, models
from ingle.atomic import write_atomically
from ingle.data.types import Example
from ingle.errors import ExportError
from ingle.events import Progress, Sink

#: Texts on which tokenizers are known to differ.
PROBES = (
    "Hello, world! It's 3.14159 (approximately), isn't it?",
    "  two spaces,\ttab,\n\nblank line, trailing space ",
    "Naïve café — “quotes” … Größe, Ærøskøbing, Привет, 你好世界, こんにちは, مرحبا",
    "def f(x):\n    return {'a': [1, 22, 333, 4444], **x}  # 100%\n",
    "👩‍👩‍👧 emoji, soft­hyphen, \u00a0no-break\u00a0space",
)

#: Text with a combining accent: some tokenizers put it together first (NFC), which llama.cpp never does.
DECOMPOSED = "cafe\u0301"

#: Likeliest tokens whose probabilities are compared.
TOP_K = 10


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far the other program may be from Ingle.

    Attributes:
        mean_kl: Mean KL(Ingle || other) over all compared tokens, nats.
        tie: Largest difference of log-probability, as Ingle sees it, between its own choice and the other's.
    """

    mean_kl: float
    tie: float


#: Where every product is made in floating point.
PLAIN = Tolerance(mean_kl=2e-3, tie=0.15)
#: Where the other program rounds the inputs of products to 8 bits.
PACKED = Tolerance(mean_kl=1e-2, tie=0.5)


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


def certify(
    server: Server,
    engine: Any,
    examples: Sequence[Example],
    *,
    system: str | None,
    tolerance: Tolerance,
    max_new_tokens: int = 32,
    sink: Sink | None = None,
) -> dict[str, Any]:
    """Compares another program with Ingle.

    Args:
        server: The other program.
        engine: Ingle's, holding exactly the weights that were written, in float32.
        examples: Prompts, or texts to be continued.
        system: A system message put before conversations that have none.
        tolerance: How far they may be apart.
        max_new_tokens: Longest answer.
        sink: Is told of the progress.

    Returns:
        The certificate as plain data; ``passed`` says whether all is well, ``reasons`` what is not, ``notes`` what
        one should know.
    """
    tokenizer = engine.tokenizer
    prompts = [_prompt(example, engine, system) for example in examples]
    compared = []
    for done, (ids, messages, text) in enumerate(prompts, 1):
        theirs = server.prompt_ids(messages) if messages else server.text_ids(text)
        compared.append(_compare(server, engine, ids, theirs, text, max_new_tokens))
        if sink is not None:
            sink(Progress(f"asking {server.version}", done, len(prompts)))
    probes = [
        {"text": text, "equal": server.text_ids(text) == [int(i) for i in tokenizer(text)["input_ids"]]}
        for text in PROBES
    ]
    notes = []
    if server.text_ids(DECOMPOSED) != [int(i) for i in tokenizer(DECOMPOSED)["input_ids"]]:
        notes.append(f"{server.version} makes other tokens of text with combining accents; give it composed text (NFC)")
    ends = sorted(models.end_token_ids(engine.model, tokenizer))
    missed = [tokenizer.convert_ids_to_tokens(token) for token in ends if not server.is_end(token)]
    total = sum(each.num_tokens for each in compared)
    mean_kl = sum(each.mean_kl * each.num_tokens for each in compared) / total
    result: dict[str, Any] = {
        "mean_kl": mean_kl,
        "top1_agreement": sum(each.top1_agreement * each.num_tokens for each in compared) / total,
        "greedy_equal": sum(each.greedy_equal for each in compared),
        "num_prompts": len(compared),
        "num_tokens": total,
        "tolerance": asdict(tolerance),
        "tokenizer_probes": probes,
        "notes": notes,
        "end_tokens": {"ids": ends, "not_known_to_the_other": missed},
        "prompts": [asdict(each) for each in compared],
        "versions": {"ingle": __version__, "other": server.version, "python": platform.python_version()},
    }
    reasons = list(_reasons(result, compared, tolerance))
    return {"passed": not reasons, "reasons": reasons} | result


def write_certificate(path: Path, certificate: dict[str, Any], files: Sequence[Path]) -> None:
    """Writes ``certificate.json`` with the SHA-256 of what it speaks of."""
    certificate = certificate | {"files": {file.name: sha256(file) for file in files}}
    write_atomically(path, (json.dumps(certificate, indent=1, ensure_ascii=False) + "\n").encode())


def require_passed(certificate: dict[str, Any], where: Path) -> None:
    """Raises unless a certificate is passed.

    Raises:
        ExportError: It is not.
    """
    if not certificate["passed"]:
        raise ExportError(
            "what was written does not answer as what was trained.",
            where=str(where),
            why="\n".join(certificate["reasons"]),
            fix="do not serve it; certificate.json holds every compared figure",
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prompt(example: Example, engine: Any, system: str | None) -> tuple[list[int], list[dict[str, str]], str]:
    """Ingle's tokens of a prompt, its messages (none for plain text), and its text."""
    from ingle import data
    from ingle.data.template import has_template, read_conversation

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


def _reasons(result: dict[str, Any], compared: Sequence[Compared], tolerance: Tolerance) -> list[str]:
    reasons = []
    different = sum(not each.tokens_equal for each in compared)
    if different:
        reasons.append(f"{different} of {len(compared)} prompts become other tokens")
    failed = [probe["text"] for probe in result["tokenizer_probes"] if not probe["equal"]]
    if failed:
        reasons.append(f"{len(failed)} of {len(PROBES)} texts become other tokens, {failed[0][:40]!r} for one")
    missed = result["end_tokens"]["not_known_to_the_other"]
    if missed:
        reasons.append(f"answers do not end at {', '.join(missed)}")
    if not result["mean_kl"] <= tolerance.mean_kl:
        reasons.append(f"the mean KL divergence is {result['mean_kl']:.2g} nats, more than {tolerance.mean_kl:g}")
    far = [each for each in compared if each.gap > tolerance.tie]
    if far:
        reasons.append(
            f"{len(far)} greedy answers part where there is no tie: {far[0].gap:.2f} nats apart, more than "
            f"{tolerance.tie:g}"
        )
    return reasons
