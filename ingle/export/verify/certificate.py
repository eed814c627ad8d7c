"""The certificate of an export: another program reads the files and must answer like Ingle.

The other program is llama.cpp for GGUF, and transformers (with PEFT for an adapter) for safetensors.  The comparison
covers the tokens of conversations and of difficult texts, the tokens that end an answer, the probabilities of every
next token along Ingle's greedy answers, and the program's own greedy answers.

The program is compared with two models.  It must equal the model that Ingle reads from the export.  It may differ from
the trained model by the loss that was accepted; this comparison finds mistakes that Ingle's reader and writer share.

Tokens must be equal.  Probabilities cannot be: llama.cpp rounds the inputs of every quantized product to 8 bits, and
sums are computed in another order.  So they may differ by the effect of such rounding, and greedy answers may diverge
only where the two most likely tokens are nearly tied.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ingle import __version__, models
from ingle.atomic import sha256, write_atomically
from ingle.data.types import Example
from ingle.errors import ExportError
from ingle.events import Sink
from ingle.export.verify.server_comparison import Agreement, PromptComparison, Server, compare_answers
from ingle.inference import Engine

#: Texts on which tokenizers are known to differ.
PROBES = (
    "Hello, world! It's 3.14159 (approximately), isn't it?",
    "  two spaces,\ttab,\n\nblank line, trailing space ",
    "Naïve café — “quotes” … Größe, Ærøskøbing, Привет, 你好世界, こんにちは, مرحبا",
    "def f(x):\n    return {'a': [1, 22, 333, 4444], **x}  # 100%\n",
    "👩‍👩‍👧 emoji, soft­hyphen, \u00a0no-break\u00a0space",
)

#: Text with a combining accent: some tokenizers compose it first (NFC), which llama.cpp never does.
DECOMPOSED = "cafe\u0301"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Accepted difference between the other program and Ingle.

    Attributes:
        mean_kl: Mean KL(Ingle || other) over all compared tokens, nats.
        tie: Largest difference between Ingle's log-probabilities of its own choice and of the other program's, nats.
    """

    mean_kl: float
    tie: float


#: For products in floating point.
PLAIN = Tolerance(mean_kl=2e-3, tie=0.15)
#: For a program that rounds the inputs of products to 8 bits.
QUANTIZED = Tolerance(mean_kl=1e-2, tie=0.5)
#: Largest KL divergence from the trained model, nats per token: more than bfloat16 or 8-bit inputs cost,
LIMIT = 1e-2
#: plus this multiple of the divergence that was measured on text, because other texts differ.
SLACK = 5.0


@dataclass(frozen=True)
class Certificate:
    """Result of a verification.

    Attributes:
        agreement: Comparison with the model that Ingle reads from the export.
        tolerance: Accepted difference.
        probes: Whether both programs tokenize a probe alike, by text.
        notes: Remarks that do not fail the verification.
        end_ids: Tokens that end an answer in Ingle.
        unknown_ends: Tokens among ``end_ids`` that do not end an answer in the other program.
        prompts: Comparison on every prompt.
        versions: Versions of Ingle, the other program and Python.
        reasons: Why the verification failed; empty if it passed.
        trained: Comparison with the trained model; None if Ingle reads the export as exactly that model.
        trained_limit: Largest mean KL divergence from the trained model; None for no limit.
    """

    agreement: Agreement
    tolerance: Tolerance
    probes: dict[str, bool]
    notes: tuple[str, ...]
    end_ids: tuple[int, ...]
    unknown_ends: tuple[str, ...]
    prompts: tuple[PromptComparison, ...]
    versions: dict[str, str]
    reasons: tuple[str, ...] = ()
    trained: Agreement | None = None
    trained_limit: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the verification found no faults."""
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        values = {
            "passed": self.passed,
            "reasons": list(self.reasons),
            **asdict(self.agreement),
            "tolerance": asdict(self.tolerance),
            "tokenizer_probes": [{"text": text, "equal": equal} for text, equal in self.probes.items()],
            "notes": list(self.notes),
            "end_tokens": {"ids": list(self.end_ids), "not_known_to_the_other": list(self.unknown_ends)},
            "prompts": [asdict(each) for each in self.prompts],
            "versions": self.versions,
        }
        if self.trained is not None:
            values["trained"] = asdict(self.trained) | {"limit": self.trained_limit}
        return values

    def write(self, path: Path, files: Sequence[Path]) -> None:
        """Writes the certificate with the SHA-256 of the files that it describes."""
        values = self.to_dict() | {"files": {file.name: sha256(file) for file in files}}
        write_atomically(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())

    def require_passed(self, path: Path) -> None:
        """Checks that the verification passed.

        Raises:
            ExportError: It failed.
        """
        if not self.passed:
            raise ExportError(
                "The export does not answer like the trained model.",
                where=str(path),
                why="\n".join(self.reasons),
                fix="do not serve it; the certificate contains every compared figure",
            )


def certify(
    server: Server,
    engine: Engine,
    examples: Sequence[Example],
    *,
    system: str | None,
    tolerance: Tolerance,
    max_new_tokens: int = 32,
    sink: Sink = lambda event: None,
) -> Certificate:
    """Compares another program with Ingle.

    Args:
        server: The other program.
        engine: Ingle with exactly the weights of the export, in float32.
        examples: Prompts, or texts to continue.
        system: System message for conversations that have none.
        tolerance: Accepted difference.
        max_new_tokens: Length of the longest answer.
        sink: Receives progress events.
    """
    tokenizer = engine.tokenizer
    prompts = compare_answers(server, engine, examples, system, max_new_tokens, sink)
    probes = {text: _tokenizes_alike(server, tokenizer, text) for text in PROBES}
    notes = []
    if not _tokenizes_alike(server, tokenizer, DECOMPOSED):
        notes.append(f"{server.version} tokenizes combining accents differently; use composed characters (NFC)")
    ends = sorted(models.end_token_ids(engine.model, tokenizer))
    certificate = Certificate(
        agreement=Agreement.over(prompts),
        tolerance=tolerance,
        probes=probes,
        notes=tuple(notes),
        end_ids=tuple(ends),
        unknown_ends=tuple(tokenizer.convert_ids_to_tokens(token) for token in ends if not server.is_end(token)),
        prompts=tuple(prompts),
        versions={"ingle": __version__, "other": server.version, "python": platform.python_version()},
    )
    return replace(certificate, reasons=tuple(_find_faults(certificate)))


def compare_with_trained(
    certificate: Certificate,
    server: Server,
    engine: Engine,
    examples: Sequence[Example],
    *,
    system: str | None,
    limit: float | None,
    max_new_tokens: int = 32,
    sink: Sink = lambda event: None,
) -> Certificate:
    """Returns the certificate with the comparison of another program with the trained model.

    Args:
        certificate: Result of :func:`certify`.
        server: The other program.
        engine: The trained model in float32.
        examples: Prompts, or texts to continue.
        system: System message for conversations that have none.
        limit: Largest mean KL(trained || other), nats per token; None for no limit.
        max_new_tokens: Length of the longest answer.
        sink: Receives progress events.
    """
    found = Agreement.over(compare_answers(server, engine, examples, system, max_new_tokens, sink))
    reasons = list(certificate.reasons)
    if limit is not None and not found.mean_kl <= limit:
        reasons.append(f"the mean KL divergence from the trained model is {found.mean_kl:.2g} nats, above {limit:g}")
    end = server.declared_end
    if end is not None and end not in models.end_token_ids(engine.model, engine.tokenizer):
        reasons.append(f"answers end at token {end}, which did not end answers in training")
    return replace(certificate, reasons=tuple(reasons), trained=found, trained_limit=limit)


def _tokenizes_alike(server: Server, tokenizer: Any, text: str) -> bool:
    return server.text_ids(text) == [int(i) for i in tokenizer(text)["input_ids"]]


def _find_faults(certificate: Certificate) -> list[str]:
    reasons, tolerance, prompts = [], certificate.tolerance, certificate.prompts
    different = sum(not each.tokens_equal for each in prompts)
    if different:
        reasons.append(f"{different} of {len(prompts)} prompts are tokenized differently")
    failed = [text for text, equal in certificate.probes.items() if not equal]
    if failed:
        reasons.append(
            f"{len(failed)} of {len(PROBES)} texts are tokenized differently, for example {failed[0][:40]!r}"
        )
    if certificate.unknown_ends:
        reasons.append(f"answers do not end at {', '.join(certificate.unknown_ends)}")
    mean_kl = certificate.agreement.mean_kl
    if not mean_kl <= tolerance.mean_kl:
        reasons.append(f"the mean KL divergence is {mean_kl:.2g} nats, above {tolerance.mean_kl:g}")
    far = [each for each in prompts if each.gap > tolerance.tie]
    if far:
        reasons.append(
            f"{len(far)} greedy answers diverge at tokens that are not tied: the difference is {far[0].gap:.2f} nats, "
            f"above {tolerance.tie:g}"
        )
    return reasons
