"""Finds the modules of a task's head: they are trained in full, and never quantized or adapted."""

from __future__ import annotations

from torch import nn

from ingle.planning.selection import is_inside


def task_heads(model: nn.Module) -> tuple[str, ...]:
    """Returns the paths of the modules that a pretrained model lacks, as it was built for; none in language models.

    :func:`ingle.models.meta_model` names them: only it knows the architecture.
    """
    found: tuple[str, ...] = getattr(model, "task_heads", ())
    return found


def is_in_head(model: nn.Module, name: str) -> bool:
    """Returns whether a module or parameter is a task's head or part of it."""
    return is_inside(name, task_heads(model))
