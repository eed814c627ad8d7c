"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ingle.config.model_names import nearest_path
from ingle.errors import ConfigError
from ingle.export.fidelity.fidelity_report import MAX_KL
from ingle.wording import either

Target = Literal["peft", "safetensors", "gguf", "gguf-adapter"]
TARGETS: tuple[Target, ...] = get_args(Target)

#: Largest additional size for promotion, as a share of the file.
SIZE_BUDGET = 0.15


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """The arguments of :func:`ingle.export.export`."""

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
        """Checks that the options can be combined and that files exist.

        Raises:
            ConfigError: Options contradict each other, or a file does not exist.
        """
        if self.to not in TARGETS:
            raise ConfigError(
                f"There is no export target {self.to!r}.", where=f"--to {self.to}", fix=f"--to {either(TARGETS)}"
            )
        gguf_only = {"--promote": self.promote, "--imatrix": self.imatrix is not None}
        for option, given in gguf_only.items():
            if given and self.to != "gguf":
                raise ConfigError(
                    f"{option} works only with --to gguf.", where=f"{option} --to {self.to}", fix=f"remove {option}"
                )
        if self.type is not None and self.to == "peft":
            raise ConfigError(
                "--type does not work with --to peft, which copies the adapter unchanged.",
                where=f"--type {self.type}",
                fix="remove --type, or use --to safetensors or --to gguf to write the merged model",
            )
        for option, path in {"--data": self.data, "--imatrix": self.imatrix}.items():
            if path is not None:
                require_file(path, option)


def require_file(path: Path, option: str) -> None:
    """Checks that the file of an option exists.

    Raises:
        ConfigError: The file does not exist; the error suggests the closest name in its folder.
    """
    if not path.exists():
        near = nearest_path(path)
        raise ConfigError(
            "There is no such file.", where=f"{option} {path}", fix=None if near is None else f"did you mean {near}?"
        )
