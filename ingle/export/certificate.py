"""The certificate of an export: another program reads what was written and must answer as Ingle does.

The other program is llama.cpp for GGUF, transformers (with PEFT for an adapter) for safetensors.  It is asked for the
tokens of rendered conversations and of awkward texts, for the tokens that end an answer, for the probabilities of every
next token along Ingle's own greedy answers, and for its own greedy answers.

It is held against two models: what Ingle reads in the export, which it must equal, and what was trained, from which it
may be as far as the export was allowed to be.  The second finds what a reader and a writer do wrong together.

Tokens must be equal.  Probabilities cannot be: llama.cpp rounds the inputs of every packed product to 8 bits, and sums
are made in another order.  So they may differ by what such rounding makes, and a greedy answer may part from Ingle's
where the two likeliest tokens are nearly tied, and nowhere else.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ingle import __version__, models
from ingle.atomic import sha256, write_atomically
from ingle.data.types import Example
from ingle.errors import ExportError
from ingle.events import Sink
from ingle.export.comparison import Compared, Server, ask, summarize

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
#: How far an export may be from what was trained, nats a token: more than bfloat16 or 8-bit inputs cost, and
LIMIT = 1e-2
#: so many times what it was on the text that it was measured on, other texts being other texts.
SLACK = 5.0


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
        sink: Gets the progress.

    Returns:
        The certificate as plain data; ``passed`` says whether all is well, ``reasons`` what is not, ``notes`` what
        one should know.
    """
    tokenizer = engine.tokenizer
    compared = ask(server, engine, examples, system, max_new_tokens, sink)
    probes = [
        {"text": text, "equal": server.text_ids(text) == [int(i) for i in tokenizer(text)["input_ids"]]}
        for text in PROBES
    ]
    notes = []
    if server.text_ids(DECOMPOSED) != [int(i) for i in tokenizer(DECOMPOSED)["input_ids"]]:
        notes.append(f"{server.version} makes other tokens of text with combining accents; give it composed text (NFC)")
    ends = sorted(models.end_token_ids(engine.model, tokenizer))
    missed = [tokenizer.convert_ids_to_tokens(token) for token in ends if not server.is_end(token)]
    result = summarize(compared) | {
        "tolerance": asdict(tolerance),
        "tokenizer_probes": probes,
        "notes": notes,
        "end_tokens": {"ids": ends, "not_known_to_the_other": missed},
        "prompts": [asdict(each) for each in compared],
        "versions": {"ingle": __version__, "other": server.version, "python": platform.python_version()},
    }
    reasons = list(_reasons(result, compared, tolerance))
    return {"passed": not reasons, "reasons": reasons} | result


def hold_against_trained(
    certificate: dict[str, Any],
    server: Server,
    engine: Any,
    examples: Sequence[Example],
    *,
    system: str | None,
    limit: float | None,
    max_new_tokens: int = 32,
    sink: Sink | None = None,
) -> dict[str, Any]:
    """Compares another program with what was trained.

    Args:
        certificate: As :func:`certify` makes it.
        server: The other program.
        engine: What was trained, in float32.
        examples: Prompts, or texts to be continued.
        system: A system message put before conversations that have none.
        limit: Largest mean KL(trained || other), nats a token; None for any.
        max_new_tokens: Longest answer.
        sink: Gets the progress.

    Returns:
        The certificate with ``trained``, and what it adds to ``reasons``.
    """
    found = summarize(ask(server, engine, examples, system, max_new_tokens, sink)) | {"limit": limit}
    reasons = list(certificate["reasons"])
    if limit is not None and not found["mean_kl"] <= limit:
        reasons.append(
            f"the mean KL divergence from what was trained is {found['mean_kl']:.2g} nats, more than {limit:g}"
        )
    end = server.declared_end
    if end is not None and end not in models.end_token_ids(engine.model, engine.tokenizer):
        reasons.append(f"answers end at token {end}, which ended none in training")
    return certificate | {"passed": not reasons, "reasons": reasons, "trained": found}


def write_certificate(path: Path, certificate: dict[str, Any], files: Sequence[Path]) -> None:
    """Writes the certificate with the SHA-256 of the files it describes."""
    certificate = certificate | {"files": {file.name: sha256(file) for file in files}}
    write_atomically(path, (json.dumps(certificate, indent=1, ensure_ascii=False) + "\n").encode())


def require_passed(certificate: dict[str, Any], where: Path) -> None:
    """Raises unless a certificate is passed.

    Raises:
        ExportError: It is not.
    """
    if not certificate["passed"]:
        raise ExportError(
            "The export does not answer as the trained model.",
            where=str(where),
            why="\n".join(certificate["reasons"]),
            fix="do not serve it; the certificate holds every compared figure",
        )


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
