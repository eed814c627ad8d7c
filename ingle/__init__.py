"""Ingle: fine-tune and evaluate large language models on the hardware you own.

    import ingle

    run = ingle.load_run("examples/demo/demo.yaml", ["train.num_steps=50"])
    report = ingle.finetune(run)
    answers = ingle.open_model(run.output).generate(["Hello"])

Importing the package does not import torch; using ``finetune``, ``resume`` or ``open_model`` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingle.flow import finetune as finetune
    from ingle.flow import resume as resume
    from ingle.inference import open_model as open_model
    from ingle.scoring import evaluate as evaluate

__version__ = "0.1.0"

_LAZY = {"finetune": "ingle.flow", "resume": "ingle.flow", "open_model": "ingle.inference", "evaluate": "ingle.scoring"}


def load_run(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Any:
    """Loads a config file.

    Args:
        path: The YAML file.
        overrides: ``a.b=value`` entries that override the file.

    Returns:
        The frozen :class:`ingle.config.Run`.

    Raises:
        ConfigError: An option is unknown, has an invalid value, or conflicts with another option.
    """
    from pathlib import Path

    from ingle.config.loader import load_run as load

    return load(Path(path), [entry if entry.startswith("--") else f"--{entry}" for entry in overrides]).run


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
