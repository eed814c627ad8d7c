"""What all ways of exporting share: the trained model as the yardstick, and the report of what was lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ingle import adapters, inference, models
from ingle.config.base import NoBase
from ingle.config.model import ModelConfig
from ingle.errors import AdapterError, ExportError
from ingle.evaluation.run.divergence import Divergence, Reference, compare, record_reference
from ingle.evaluation.run.windows import Window
from ingle.events import Progress, Sink, Warned
from ingle.export import certificate, wording
from ingle.export.card import make_card, read_licence
from ingle.export.comparison import Server
from ingle.export.fidelity import TensorFidelity, mean_correlation
from ingle.export.gguf_types import AS_TRAINED
from ingle.export.merging import Merger
from ingle.export.place import Place
from ingle.export.promotion import Promotion
from ingle.export.request import MIN_CORRELATION, Request, Subject
from ingle.export.tables import fidelity_page
from ingle.inference import Engine, Source
from ingle.wording import plural, size


@dataclass(frozen=True)
class Outcome:
    """An export that is written.

    Attributes:
        place: Where it lies.
        files: What a certificate speaks of.
        type: Of the weights.
        num_bytes: Of the weights.
        fidelity: The content of ``fidelity.json``; None where nothing was merged or packed.
        certify: Lets another program answer and compares.
    """

    place: Place
    files: tuple[Path, ...]
    type: str | None
    num_bytes: int
    fidelity: dict[str, Any] | None
    certify: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Yardstick:
    """The trained model on some text.

    Attributes:
        windows: The text; empty where there is none.
        reference: What the trained model thinks of it; None where it was not asked.
        adapter_effect: KL divergence of the trained model from its base, nats a token.
    """

    windows: Sequence[Window] = ()
    reference: Reference | None = None
    adapter_effect: float | None = None


@dataclass
class Work:
    """One export under way.

    Attributes:
        request: What is asked.
        subject: What is exported.
        tokenizer: Its tokenizer.
        sink: Gets the progress and warnings.
    """

    request: Request
    subject: Subject
    tokenizer: Any
    sink: Sink
    _opened: bool = field(default=False, init=False)

    def merger(self) -> Merger:
        """Base and adapter, to be read weight by weight; the base is checked on the way unless it was before."""
        return Merger(self.subject.source, checks_base=not self._opened, sink=self.sink)

    def check_base(self, merger: Merger) -> None:
        """Refuses another base than the adapter was trained on; to be called when all weights have passed.

        Raises:
            AdapterError: It is another, and that was not allowed.
        """
        difference = merger.explain_mismatch()
        if difference is None:
            return
        if not self.request.allow_mismatch:
            raise AdapterError(
                "This adapter was trained on another base.",
                where=str(self.subject.source.adapter),
                why=difference,
                fix="export it with the base it was trained on, or accept the difference with --allow-mismatch",
            )
        self.sink(Warned(f"The adapter was trained on another base: {difference}."))

    def open_trained(self, *, dtype: str | None = None) -> Engine:
        """The trained model as training held it."""
        source = self.subject.source
        if dtype is not None:
            source = Source(source.model.model_copy(update={"dtype": dtype}), source.base, source.adapter)
        engine = inference.open_source(source, allow_mismatch=self.request.allow_mismatch, sink=self.sink)
        self._opened = True
        return engine

    def measure_trained(self) -> Yardstick:
        """Asks the trained model about the text, and then its base, and lets it go."""
        if self.request.data is None and self.subject.run is None:
            return Yardstick()
        engine = self.open_trained()
        windows = self.subject.windows(self.tokenizer, engine.model, self.request.data)
        self.sink(Progress("measuring the trained model", 0))
        reference = record_reference(engine.model, windows)
        effect = None
        if engine.adapted:
            with adapters.disabled(engine.model):
                # From the trained model to its base, as what is written is measured.
                effect = compare(engine.model, reference, windows).divergence().kl
        return Yardstick(windows, reference, effect)

    def measure_written(self, yardstick: Yardstick, source: Source, num_weights: int) -> Divergence | None:
        """Asks what was written about the same text; None where there is none, or no room for the model."""
        if yardstick.reference is None:
            return None
        dtype = models.compute_dtype(source.model.dtype, "cpu")
        needed, free = num_weights * dtype.itemsize * 1.2, psutil.virtual_memory().available
        if needed > free and isinstance(source.base, NoBase) and not source.model.id.endswith(".gguf"):
            self.sink(
                Warned(
                    f"The export is not measured on text: opening it takes {size(needed)} of memory; "
                    f"{size(free)} are free."
                )
            )
            return None
        self.sink(Progress("measuring the exported model", 0))
        engine = inference.open_source(source)
        return compare(engine.model, yardstick.reference, yardstick.windows).divergence()

    def certify(
        self, server: Server, open_written: Callable[[], Engine], divergence: Divergence | None, *, packed: bool
    ) -> dict[str, Any]:
        """Lets another program answer with a merged model, and compares it with what is written and what was trained.

        Args:
            server: The other program.
            open_written: Opens what was written in float32; let go before what was trained is opened.
            divergence: As :meth:`measure_written` found it.
            packed: Whether any weight was packed.
        """
        asked: dict[str, Any] = {
            "examples": self.subject.prompts(self.request.data),
            "system": self.subject.system,
            "sink": self.sink,
        }
        tolerance = certificate.PACKED if packed and self.request.to == "gguf" else certificate.PLAIN
        made = certificate.certify(server, open_written(), tolerance=tolerance, **asked)
        limit: float | None = certificate.LIMIT
        if divergence is not None:
            limit = certificate.LIMIT + certificate.SLACK * divergence.kl
        elif packed:
            limit = None if self.request.allow_loss else self.request.max_kl
        trained = self.open_trained(dtype="float32")
        return certificate.hold_against_trained(made, server, trained, limit=limit, **asked)

    def report(
        self,
        type_name: str,
        found: Sequence[TensorFidelity],
        divergence: Divergence | None,
        yardstick: Yardstick,
        *,
        num_tensors: int,
        num_copied: int,
        promotion: Promotion | None = None,
    ) -> dict[str, Any]:
        """The content of ``fidelity.json``."""
        report: dict[str, Any] = {
            "type": type_name,
            "num_tensors": num_tensors,
            "num_copied": num_copied,
            "num_merged": len(found),
            "mean_correlation": mean_correlation(found),
            "divergence": None if divergence is None else asdict(divergence),
            "adapter_effect": yardstick.adapter_effect,
            "limits": {"max_kl": self.request.max_kl, "min_correlation_without_text": MIN_CORRELATION},
            "promotion": None if promotion is None else asdict(promotion),
            "tensors": [each.to_dict() for each in found],
        }
        aware = self._rounded_in_training(report)
        trained = self._is_trained(found)
        report["warnings"] = wording.doubts(report, self._remedies(), rounded_in_training=aware) if trained else []
        return report

    def accept(self, report: dict[str, Any], found: Sequence[TensorFidelity]) -> None:
        """Refuses an export that loses too much of what was trained, and warns of one that is doubtful.

        Raises:
            ExportError: Too much would be lost, and that was not allowed.
        """
        why = None if self.request.allow_loss or not self._is_trained(found) else self._why_refused(report)
        if why is None:
            for warning in report["warnings"]:
                self.sink(Warned(warning))
            return
        if found:
            worst = max(found, key=lambda each: each.lost_energy)
            why += f"\nmost is lost in {worst.name}: correlation {worst.correlation:.2f}; the change is "
            why += f"{worst.delta_per_step:.2f} quantization steps"
        raise ExportError(
            f"Written as {report['type']}, this model would lose too much of what was trained.",
            where=f"--type {report['type']}",
            why=why,
            fix=f"{self._remedies()}, or --allow-loss (write it anyway)",
        )

    def _is_trained(self, found: Sequence[TensorFidelity]) -> bool:
        return bool(found) or self.subject.run is not None

    def _why_refused(self, report: dict[str, Any]) -> str | None:
        """Why an export loses too much; None where it does not."""
        divergence, correlation = report["divergence"], report["mean_correlation"]
        if divergence is not None:
            if divergence["kl"] <= self.request.max_kl:
                return None
            effect = report["adapter_effect"]
            why = f"the KL divergence from the trained model is {divergence['kl']:.3f} nats a token, measured on "
            why += f"{plural(divergence['num_tokens'], 'token')}; at most {self.request.max_kl:g} is accepted"
            why += f"\nboth find the same token most likely in {divergence['top1_agreement']:.1%}"
            return why + (f"\ntraining moved the base by {effect:.3f} nats a token" if effect is not None else "")
        if correlation is None or correlation >= MIN_CORRELATION or self._rounded_in_training(report):
            return None
        return (
            f"after rounding, the trained change has a correlation of {correlation:.2f} with itself before; at least "
            f"{MIN_CORRELATION:g} is accepted where there is no text to measure on (--data FILE)"
        )

    def _rounded_in_training(self, report: dict[str, Any]) -> bool:
        """Whether the weights were trained through the very rounding that writes them: then nothing more is lost."""
        adapter, base = self.subject.source.adapter, self.subject.source.base
        aware = None if adapter is None else adapters.read_record(adapter).adapter.get("merge_aware")
        if aware is None:
            return False
        if aware["format"] is None and report["type"] in (AS_TRAINED, base.format):
            return True
        target = aware["format"] or base.format
        return report["type"] == target or all(tensor["type"] == target for tensor in report["tensors"])

    def _remedies(self) -> str:
        if self.request.to == "gguf":
            promote = "" if self.request.promote else "--promote (wider types where it matters), "
            return f"{promote}a wider --type, or --to gguf-adapter (loses nothing)"
        return "--type bf16, or --to peft (loses nothing)"

    def write_companions(
        self,
        folder: Path,
        place: Place,
        *,
        type_name: str | None,
        usage: str,
        found: Sequence[TensorFidelity] = (),
        report: dict[str, Any] | None = None,
    ) -> None:
        """Writes the card, and the fidelity report where there is one, into ``folder`` under the names of ``place``."""
        if report is not None:
            text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
            (folder / place.name("fidelity")).write_text(text + "\n", encoding="utf-8")
            (folder / place.name("fidelity_page")).write_text(fidelity_page(report, found), encoding="utf-8")
        card = make_card(
            to=self.request.to,
            type_name=type_name,
            base_model=self.base_model,
            licence=read_licence(Path(self.base_model)),
            run=self.subject.run,
            run_folder=self.subject.run_folder,
            usage=usage,
            report=report,
            report_name=place.name("fidelity"),
        )
        (folder / place.name("card")).write_text(card, encoding="utf-8")

    @property
    def base_model(self) -> str:
        """Id of the model that everything began with."""
        source = self.subject.source
        return (source.original or source.model).id

    @property
    def name(self) -> str:
        """A name for the result."""
        folder = self.subject.run_folder
        return (folder or Path(self.base_model.removesuffix(".gguf"))).resolve().name


def plain_source(path: Path, dtype: str) -> Source:
    """An exported model as a source to be opened."""
    return Source(ModelConfig(id=str(path), dtype=dtype), NoBase())  # type: ignore[arg-type]
