"""What an export is asked to do, and what it found out about the model before it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ingle import data
from ingle.config.data import DataConfig
from ingle.config.data import Source as DataSource
from ingle.config.named import nearest_path
from ingle.config.paths import locate_paths
from ingle.config.run import Run
from ingle.data import Example
from ingle.errors import ConfigError
from ingle.evaluation.run.windows import Window, window_size
from ingle.inference import Source
from ingle.training.folder import RunFolder
from ingle.wording import either

Target = Literal["peft", "safetensors", "gguf", "gguf-adapter"]
TARGETS: tuple[Target, ...] = get_args(Target)

#: Largest KL divergence of the written model from the trained one, nats a token: beyond what Q3_K_M costs a model of
#: eight billion weights (0.10), well below what Q2_K does (0.45).
MAX_KL = 0.15
#: Least correlation of what survived with what was trained, where there is no text to measure on.
MIN_CORRELATION = 0.5
#: What promotion may add, as a share of the file.
SIZE_BUDGET = 0.15

#: Tokens, and rows of each source, that the trained model and what is written are compared on at most; the longest
#: document among them, longer ones are cut.
MAX_TOKENS, MAX_ROWS, MAX_LENGTH = 8192, 512, 1024

#: Prompts that a certificate asks.
NUM_PROMPTS = 6

#: Asked where neither a run nor the user names any text.
_PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Count from one to ten.",
    "Explain in one sentence why the sky is blue.",
)


@dataclass(frozen=True, slots=True)
class Request:
    """An export.

    Attributes:
        to: What to write.
        out: Where.
        type: The type of the weights as typed; None for the default.
        verify: Let another program read it and compare.
        promote: Give weights that lose too much a wider type.
        size_budget: What that may cost, as a share of the file.
        max_kl: Largest loss that is accepted, nats a token.
        allow_loss: Write it however much is lost.
        allow_mismatch: Put the adapter on another base than it was trained on.
        data: Text to measure on; the run's held-out rows, or its training rows, when None.
        imatrix: Importance matrix for the quantizer.
    """

    to: Target
    out: Path
    type: str | None = None
    verify: bool = False
    promote: bool = False
    size_budget: float = SIZE_BUDGET
    max_kl: float = MAX_KL
    allow_loss: bool = False
    allow_mismatch: bool = False
    data: Path | None = None
    imatrix: Path | None = None

    def check(self) -> None:
        """Raises for options that make no sense together.

        Raises:
            ConfigError: They do not.
        """
        if self.to not in TARGETS:
            raise ConfigError(
                f"There is no export {self.to!r}.", where=f"--to {self.to}", fix=f"--to {either(TARGETS)}"
            )
        misplaced = {"--promote": self.promote, "--imatrix": self.imatrix is not None}
        for option, given in misplaced.items():
            if given and self.to != "gguf":
                raise ConfigError(
                    f"{option} works only with --to gguf.", where=f"{option} --to {self.to}", fix=f"leave {option} out"
                )
        if self.type is not None and self.to == "peft":
            raise ConfigError(
                "--type does not work with --to peft: the adapter is copied as it is.",
                where=f"--type {self.type}",
                fix="leave --type out; --to safetensors or --to gguf writes the merged model in a type",
            )
        for option, path in {"--data": self.data, "--imatrix": self.imatrix}.items():
            if path is not None:
                require_file(path, option)


def require_file(path: Path, option: str) -> None:
    """Raises unless a file exists.

    Raises:
        ConfigError: It does not; names the closest one in its folder.
    """
    if not path.exists():
        near = nearest_path(path)
        raise ConfigError(
            "There is no such file.", where=f"{option} {path}", fix=None if near is None else f"did you mean {near}?"
        )


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        source: The model and its adapter.
        run: The config it was trained with; None where no run made it.
        run_folder: Where that run lies.
    """

    source: Source
    run: Run | None
    run_folder: Path | None

    @classmethod
    def find(cls, path_or_id: str, source: Source) -> Subject:
        """The run that a path names or belongs to, if any."""
        folder = Path(path_or_id)
        for candidate in (folder, folder.parent):
            if (candidate / "run.yaml").is_file():
                run = locate_paths(RunFolder(candidate).load_run())
                if candidate == folder or source.adapter == folder:
                    return cls(source, run, candidate)
        return cls(source, None, None)

    def windows(self, tokenizer: Any, model: Any, file: Path | None) -> list[Window]:
        """The first documents to measure on, tokenized as training does; empty where there are none."""
        config = self._text_config(file)
        if config is None:
            return []
        objective = self.run.objective.kind if self.run is not None and file is None else "sft"
        sources = (
            source.model_copy(update={"limit": min(source.limit or MAX_ROWS, MAX_ROWS)}) for source in config.sources
        )
        length = min(window_size(model), MAX_LENGTH)
        limited = config.model_copy(update={"max_seq_len": length, "sources": tuple(sources)})
        dataset = data.build_dataset(limited, tokenizer, objective=objective)
        windows: list[Window] = []
        num_tokens = 0
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            num_tokens += len(sample.input_ids)
            if windows and num_tokens > MAX_TOKENS:
                break
            windows.append(Window(index, sample))
        return windows

    def prompts(self, file: Path | None) -> Sequence[Example]:
        """The prompts of a certificate."""
        config = self._text_config(file)
        if config is None:
            return [Example(f"prompt {i}", prompt=text, completion="") for i, text in enumerate(_PROMPTS, 1)]
        found: list[Example] = []
        for example in data.read_examples(config.sources):
            found.append(example)
            if len(found) == NUM_PROMPTS:
                break
        return found

    @property
    def system(self) -> str | None:
        """The system message that the run puts before conversations that have none."""
        return self.run.data.system if self.run is not None else None

    def _text_config(self, file: Path | None) -> DataConfig | None:
        if file is not None:
            base = self.run.data if self.run is not None else DataConfig(sources=(DataSource(path=str(file)),))
            return base.model_copy(update={"sources": (DataSource(path=str(file)),)})
        if self.run is None:
            return None
        sources = self.run.evaluate.sources if self.run.evaluate is not None else self.run.data.sources
        return self.run.data.model_copy(update={"sources": sources})
