"""An export in progress: what is exported, the texts it is measured on, and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from ingle import adapters, data, inference, models
from ingle.config.base import NoBase
from ingle.config.data import DataConfig
from ingle.config.data import Source as DataSource
from ingle.config.model import ModelConfig
from ingle.config.objective import ObjectiveConfig, ObjectiveKind
from ingle.config.paths import locate_paths
from ingle.config.run import Run
from ingle.data import Example
from ingle.errors import AdapterError, ExportError
from ingle.evaluation.run.divergence import Divergence, Reference, compare, record_reference
from ingle.evaluation.run.windows import Window, window_size
from ingle.events import Progress, Sink, Warned
from ingle.export.fidelity.fidelity_report import FidelityReport
from ingle.export.output_paths import OutputPaths
from ingle.export.request import ExportRequest
from ingle.export.verify import certificate
from ingle.export.verify.certificate import Certificate, Tolerance
from ingle.export.verify.server_comparison import Server
from ingle.export.writers.gguf_types import AS_TRAINED
from ingle.export.writers.merged_model import MergedModel
from ingle.inference import Engine, Source
from ingle.training.folder import RunFolder
from ingle.wording import size

#: Limits of the text that models are compared on: total tokens, rows per source, tokens per document.
MAX_TOKENS, MAX_ROWS, MAX_LENGTH = 8192, 512, 1024

#: Number of prompts in a certificate.
NUM_PROMPTS = 6

#: Prompts for models without a run if the user names no text.
_PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Count from one to ten.",
    "Explain in one sentence why the sky is blue.",
)


@dataclass(frozen=True)
class WrittenExport:
    """An export that is written but not verified.

    Attributes:
        paths: Paths of the files.
        files: Files that the certificate describes.
        type: Type of the weights.
        fidelity: Fidelity report; None if nothing was merged or quantized.
        certify: Verifies the export.
    """

    paths: OutputPaths
    files: tuple[Path, ...]
    type: str | None
    fidelity: FidelityReport | None
    certify: Callable[[], Certificate]

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(file.stat().st_size for file in self.files if file.suffix != ".json")


@dataclass(frozen=True)
class TrainedPredictions:
    """Predictions of the trained model on the text that the export is measured on.

    Attributes:
        windows: The text; empty if there is none.
        reference: The predictions; None if there is no text.
        adapter_effect: KL divergence of the base from the trained model, nats per token.
    """

    windows: Sequence[Window] = ()
    reference: Reference | None = None
    adapter_effect: float | None = None


@dataclass
class ExportJob:
    """An export in progress.

    Attributes:
        request: Options.
        source: The model and its adapter.
        tokenizer: Tokenizer of the model.
        sink: Receives progress and warnings.
        run: Config of the run that trained the model; None if there is none.
        run_folder: Folder of that run.
    """

    request: ExportRequest
    source: Source
    tokenizer: Any
    sink: Sink
    run: Run | None = None
    run_folder: Path | None = None
    _base_checked: bool = field(default=False, init=False)

    def find_run(self, path_or_id: str) -> None:
        """Sets :attr:`run` if a path names a run or its adapter."""
        folder = Path(path_or_id)
        for candidate in (folder, folder.parent):
            if (candidate / "run.yaml").is_file() and (candidate == folder or self.source.adapter == folder):
                self.run, self.run_folder = locate_paths(RunFolder(candidate).load_run()), candidate
                return

    @property
    def base_model(self) -> str:
        """Id of the original model."""
        return (self.source.original or self.source.model).id

    @property
    def name(self) -> str:
        """Name for the result."""
        return (self.run_folder or Path(self.base_model.removesuffix(".gguf"))).resolve().name

    def open_merged(self) -> MergedModel:
        """Opens base and adapter weight by weight; checks the base while it is read, unless that was done before."""
        return MergedModel(self.source, checks_base=not self._base_checked, sink=self.sink)

    def check_base(self, merged: MergedModel) -> None:
        """Refuses a base that the adapter was not trained on.  Call it after all weights were read.

        Raises:
            AdapterError: The base differs, and the request does not allow that.
        """
        difference = merged.explain_mismatch()
        if difference is None:
            return
        if not self.request.allow_mismatch:
            raise AdapterError(
                "This adapter was trained on another base.",
                where=str(self.source.adapter),
                why=difference,
                fix="export it with the base it was trained on, or accept the difference with --allow-mismatch",
            )
        self.sink(Warned(f"The adapter was trained on another base: {difference}."))

    def open_trained(self, *, dtype: str | None = None) -> Engine:
        """Opens the trained model on the base format that it was trained on."""
        source = self.source
        if dtype is not None:
            source = Source(source.model.model_copy(update={"dtype": dtype}), source.base, source.adapter)
        engine = inference.open_source(source, allow_mismatch=self.request.allow_mismatch, sink=self.sink)
        self._base_checked = True
        return engine

    def measure_trained(self) -> TrainedPredictions:
        """Runs the trained model and its base on the text, and frees their memory; only if they are causal."""
        is_causal = models.stored_kind(self.source.model) == "causal"
        generates = is_causal and self.source.objective().kind not in inference.NOT_TEXT
        if not generates or (self.request.data is None and self.run is None):
            return TrainedPredictions()
        engine = self.open_trained()
        windows = self._read_windows(engine.model)
        self.sink(Progress("Measuring the trained model", 0))
        reference = record_reference(engine.model, windows)
        effect = None
        if engine.adapted:
            with adapters.disabled(engine.model):
                effect = compare(engine.model, reference, windows).divergence().kl
        return TrainedPredictions(windows, reference, effect)

    def measure_written(self, trained: TrainedPredictions, source: Source, num_weights: int) -> Divergence | None:
        """Runs the exported model on the same text; returns None if there is none, or too little memory."""
        if trained.reference is None:
            return None
        dtype = models.compute_dtype(source.model.dtype, "cpu")
        needed, free = num_weights * dtype.itemsize * 1.2, psutil.virtual_memory().available
        if needed > free and isinstance(source.base, NoBase) and not source.model.id.endswith(".gguf"):
            self.sink(
                Warned(
                    f"The export is not measured on text, because loading it takes {size(needed)} of memory and only "
                    f"{size(free)} are free."
                )
            )
            return None
        self.sink(Progress("Measuring the exported model", 0))
        return compare(inference.open_source(source).model, trained.reference, trained.windows).divergence()

    def accept(self, report: FidelityReport) -> FidelityReport:
        """Returns the report with its warnings.

        Raises:
            ExportError: Too much of the training would be lost, and the request does not allow that.
        """
        if not report.tensors and self.run is None:
            return report
        aware, remedies = self._rounded_in_training(report), self._remedies()
        why = None if self.request.allow_loss else report.explain_refusal(rounded_in_training=aware)
        if why is not None:
            raise ExportError(
                f"Written as {report.type}, this model would lose too much of what was trained.",
                where=f"--type {report.type}",
                why=why,
                fix=f"{remedies}, or --allow-loss (write it anyway)",
            )
        warnings = report.find_doubts(remedies, rounded_in_training=aware)
        for warning in warnings:
            self.sink(Warned(warning))
        return replace(report, warnings=tuple(warnings))

    def certify(self, server: Server, engine: Engine, tolerance: Tolerance) -> Certificate:
        """Compares another program with Ingle on the prompts."""
        return certificate.certify(
            server, engine, self._read_prompts(), system=self._system, tolerance=tolerance, sink=self.sink
        )

    def certify_merged(
        self, server: Server, open_written: Callable[[], Engine], divergence: Divergence | None, *, quantized: bool
    ) -> Certificate:
        """Compares another program with the exported and with the trained model.

        Args:
            server: The other program.
            open_written: Opens the exported model in float32; it is released before the trained model is opened.
            divergence: Result of :meth:`measure_written`.
            quantized: Whether any weight is quantized.
        """
        in_llama = quantized and self.request.to == "gguf"
        made = self.certify(server, open_written(), certificate.QUANTIZED if in_llama else certificate.PLAIN)
        limit: float | None = certificate.LIMIT
        if divergence is not None:
            limit = certificate.LIMIT + certificate.SLACK * divergence.kl
        elif quantized:
            limit = None if self.request.allow_loss else self.request.max_kl
        return certificate.compare_with_trained(
            made,
            server,
            self.open_trained(dtype="float32"),
            self._read_prompts(),
            system=self._system,
            limit=limit,
            sink=self.sink,
        )

    def _rounded_in_training(self, report: FidelityReport) -> bool:
        """Returns whether training already used the rounding of the export, so that it loses nothing more."""
        adapter, base = self.source.adapter, self.source.base
        aware = None if adapter is None else adapters.read_record(adapter).adapter.merge_aware
        if aware is None:
            return False
        if aware.format is None and report.type in (AS_TRAINED, base.format):
            return True
        target = aware.format or base.format
        return report.type == target or all(tensor.type == target for tensor in report.tensors)

    def _remedies(self) -> str:
        if self.request.to == "gguf":
            promote = "" if self.request.promote else "--promote (wider types where it matters), "
            return f"{promote}a wider --type, or --to gguf-adapter (loses nothing)"
        return "--type bf16, or --to peft (loses nothing)"

    def _text_config(self) -> DataConfig | None:
        """Returns the data section of the text: ``--data``, or else the run's held-out or training rows."""
        run, file = self.run, self.request.data
        own = None if file is None else (DataSource(path=str(file)),)
        if run is None:
            return None if own is None else DataConfig(sources=own)
        held_out = run.data.sources if run.task is None else run.task.sources
        return run.data.model_copy(update={"sources": own or held_out})

    def _read_windows(self, model: Any) -> list[Window]:
        """Returns the first documents of the text, tokenized as in training."""
        config = self._text_config()
        assert config is not None
        own = self.run.objective if self.run is not None and self.request.data is None else None
        objective: ObjectiveConfig | ObjectiveKind = "sft" if own is None else data.name_labels(config, own)
        sources = tuple(
            source.model_copy(update={"limit": min(source.limit or MAX_ROWS, MAX_ROWS)}) for source in config.sources
        )
        length = min(window_size(model), MAX_LENGTH)
        limited = config.model_copy(update={"max_seq_len": length, "sources": sources, "validation": None})
        dataset = data.build_dataset(limited, self.tokenizer, objective=objective)
        windows: list[Window] = []
        num_tokens = 0
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            num_tokens += len(sample.input_ids)
            if windows and num_tokens > MAX_TOKENS:
                break
            windows.append(Window(index, sample))
        return windows

    def _read_prompts(self) -> list[Example]:
        config = self._text_config()
        if config is None:
            return [Example(f"prompt {i}", prompt=text, completion="") for i, text in enumerate(_PROMPTS, 1)]
        return list(islice(data.read_examples(config.sources), NUM_PROMPTS))

    @property
    def _system(self) -> str | None:
        return None if self.run is None else self.run.data.system


def plain_source(path: Path, dtype: str) -> Source:
    """Returns the source of an exported model."""
    return Source(ModelConfig(id=str(path), dtype=dtype), NoBase())  # type: ignore[arg-type]
