"""What an objective keeps next to the policy: a value function, reward models, a teacher, and the initial adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ingle.config.adapter import LowRankAdapter, NoAdapter
from ingle.config.base import BaseConfig, NoBase
from ingle.config.document import read_config
from ingle.config.loader import run_from_yaml
from ingle.config.model import ModelConfig
from ingle.config.paths import locate_paths, move_paths
from ingle.config.policy import Distill, Ppo, Rewarded
from ingle.config.policy_rules import reads_reference
from ingle.config.preference_rules import has_reference
from ingle.config.rewards import ModelReward
from ingle.config.run import Run
from ingle.errors import IngleError, ModelError
from ingle.planning.architecture import read_architecture
from ingle.planning.model_files import find_config
from ingle.planning.shape import Companion, ModelShape


def value_rank(run: Run) -> int:
    """Returns the rank of the value function's adapter; 0 if it has none."""
    if not isinstance(run.objective, Ppo) or run.objective.value.trunk != "adapter":
        return 0
    value = run.objective.value
    stored = 0 if value.path is None else int(_adapter_config(value.path).get("r", 0))
    own = run.adapter.rank if isinstance(run.adapter, LowRankAdapter) else 0
    return stored or value.rank or own


def value_head_parameters(run: Run, model: ModelShape) -> int:
    """Counts the parameters of the value function's head."""
    return model.hidden_size + 1 if isinstance(run.objective, Ppo) else 0


def reward_rank(run: Run) -> int:
    """Returns the summed ranks of the reward models that are adapters on the policy's base."""
    return sum(int(_adapter_config(path)["r"]) for path in _reward_paths(run) if _is_role(path, run))


def keeps_initial(run: Run) -> bool:
    """Returns whether a copy of the initial adapter is kept as the reference: those that continue another one."""
    continues = run.adapter.kind != "none" and getattr(run.adapter, "path", None) is not None
    return continues and (has_reference(run) or reads_reference(run))


def subtracts(run: Run) -> bool:
    """Returns whether the A and B that training begins with are kept."""
    return isinstance(run.adapter, LowRankAdapter) and run.adapter.subtracts


def find_companions(run: Run, auto_bytes: int) -> tuple[tuple[Companion, ...], list[str]]:
    """Returns the models that are opened next to the policy, and notes on those that cannot be read.

    Args:
        run: The run.
        auto_bytes: Bytes of the dtype that ``dtype: auto`` computes in.
    """
    found, notes = [], []
    for path, is_teacher in _opened_paths(run):
        try:
            found.append(_read(path, auto_bytes, is_teacher))
        except (IngleError, OSError) as error:
            notes.append(f"The memory of {path} is not counted: {error}")
    return tuple(found), notes


def _opened_paths(run: Run) -> Iterator[tuple[str, bool]]:
    """Yields what is opened as a model of its own, and whether it is a teacher."""
    if isinstance(run.objective, Distill):
        yield run.objective.teacher, True
    yield from ((path, False) for path in _reward_paths(run) if not _is_role(path, run))


def _reward_paths(run: Run) -> Iterator[str]:
    rewards = run.objective.rewards if isinstance(run.objective, Rewarded) else ()
    return (reward.path for reward in rewards if isinstance(reward, ModelReward))


def _is_role(path: str, run: Run) -> bool:
    """Returns whether a reward model is plain LoRA on the policy's base, as its files say."""
    config = _adapter_config(path)
    named = str(config.get("base_model_name_or_path"))
    same = named == run.model.id or Path(named).expanduser().absolute() == Path(run.model.id).expanduser().absolute()
    is_plain = "r" in config and not config.get("use_dora") and not config.get("rank_pattern")
    return same and is_plain and isinstance(run.adapter, LowRankAdapter)


def _adapter_config(path: str) -> dict[str, Any]:
    """Returns the ``adapter_config.json`` of a run or an adapter folder; empty if there is none."""
    folder = Path(path).expanduser()
    inner = folder / "adapter"
    try:
        found = json.loads(((inner if inner.is_dir() else folder) / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(path: str, auto_bytes: int, is_teacher: bool) -> Companion:
    """Returns the size of a model.

    Raises:
        ModelError: It cannot be found, or there is no arithmetic for its architecture.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    model, base = _source(path)
    if model.id.lower().endswith(".gguf"):
        return Companion(Path(model.id).expanduser().stat().st_size)
    found = read_architecture(find_config(model)[0])
    if found is None:
        raise ModelError("Plans have no arithmetic for its architecture.")
    shape = found.shape(NoAdapter(kind="none"))
    dtype_bytes = {"auto": auto_bytes, "bfloat16": 2, "float32": 4}[model.dtype]
    bits = sum(
        lin.num_weights * lin.count * base.bits_per_weight(lin.in_features, dtype_bits=8 * dtype_bytes)
        for lin in shape.linears
    )
    weights = round(bits / 8) + shape.other_parameters * dtype_bytes
    return Companion(weights, shape.hidden_size, shape.active_parameters) if is_teacher else Companion(weights)


def _source(path: str) -> tuple[ModelConfig, BaseConfig]:
    """Returns the model at a path, and the format of its weights, as :func:`ingle.inference.locate` finds them."""
    folder = Path(path).expanduser()
    if (folder / "run.yaml").is_file():
        run = locate_paths(move_paths(run_from_yaml(read_config(folder / "run.yaml")), folder))
        if run.adapter.kind != "none":
            return run.model, run.base
        return ModelConfig(id=str(folder / "model"), dtype=run.model.dtype), NoBase()
    if base := _adapter_config(path).get("base_model_name_or_path"):
        return ModelConfig(id=str(base)), NoBase()
    return ModelConfig(id=path), NoBase()
