"""Checkpoints: what a run needs to resume with the same bits.

A checkpoint contains the state of the optimizer (float32 masters and moments), the state of the objective, and a few
numbers. Everything else is a pure function of them and of the config: the learning rate of a step, the order of the
data, the dropout masks of ``(seed, step, micro-batch)``.

Several ranks write one checkpoint: each writes the rows that it holds, and rank 0 writes everything else and then the
digests of all files. Any number of ranks can read it, each the rows that it needs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ingle.atomic import atomic_folder, disk_full_explained, sha256, sync
from ingle.errors import CheckpointError, DoesNotFit, QuantizationError
from ingle.parallel import Mesh, local
from ingle.training.folder import RunFolder, remove_partial
from ingle.training.state_files import UnreadableState, read_tensors, write_tensors
from ingle.wording import size

FORMAT_VERSION = 4

#: File of a checkpoint with its position, the plain part of all states, and digests.
STATE = "state.json"

#: Name of the optimizer among the states.
OPTIMIZER = "optimizer"

#: Prefix of its masters.
_MASTER = "master."


class Stateful(Protocol):
    """A part of a run whose state is saved in checkpoints: tensors and plain JSON values, by name."""

    def state_dict(self) -> Mapping[str, Any]:
        """Returns the state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""


class OptimizerState(Stateful, Protocol):
    """The state of the optimizer, whose size is known before the first step."""

    @property
    def checkpoint_bytes(self) -> int:
        """Largest size of the state in a run."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run is.

    Attributes:
        step: Optimizer steps made.
        num_tokens: Tokens read.
        data_hash: Digest of the tokenized data; a run does not continue with other data.
        train_s: Time spent in the training loop.
        wall_s: Time since the run began, without the time between an interruption and the next start.
        validation_s: Time spent on validations, which is no part of ``train_s``.
    """

    step: int
    num_tokens: int
    data_hash: str
    train_s: float = 0.0
    wall_s: float = 0.0
    validation_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        position: How far the run was.
        values: Plain values of each state, by the state's name.
        tensors: Tensors of each state, by the state's name.
    """

    position: Position
    values: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)

    def state(self, name: str) -> dict[str, Any]:
        """Returns a state as its ``state_dict()`` returned it."""
        return {**self.values.get(name, {}), **self.tensors.get(name, {})}


class Checkpoints:
    """Writes, finds and reads the checkpoints of one run.

    All methods are collective: every rank calls them in the same order, and all raise the same error.

    Args:
        folder: The run folder; all ranks see it under this path.
        keep: How many of the newest checkpoints stay on disk.
        states: Parts of the run to save and restore, by name; ``optimizer`` is one of them. All ranks have the same
            values and plain tensors; each has its rows of sharded tensors.
        mesh: The ranks of the run.
        pins_one: Whether one more checkpoint than the newest may stay on disk.
    """

    def __init__(
        self,
        folder: RunFolder,
        keep: int,
        states: Mapping[str, Stateful],
        mesh: Mesh | None = None,
        *,
        pins_one: bool = False,
    ) -> None:
        self._root = folder.checkpoints
        self._folder = folder
        self._keep = keep
        self._num_on_disk = keep + pins_one
        self._states = states
        self._mesh = mesh or Mesh(torch.device("cpu"))

    def save(self, position: Position, pinned: int | None = None) -> Path:
        """Writes a checkpoint, then deletes all but the newest ``keep``.

        It gets its name only after the files of all ranks are complete.

        Args:
            position: How far the run is.
            pinned: The step of an older checkpoint that stays too.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: The disk is full.
        """
        mesh, target = self._mesh, self._root / f"step-{position.step}"
        parts = {name: _split(part.state_dict()) for name, part in self._states.items()}
        with self._written_by_all(target, pinned) as partial:
            own: dict[str, str] = {}
            with mesh.together(), disk_full_explained(target):
                for name, (_, tensors) in parts.items():
                    file = write_tensors(partial, name, tensors, mesh)
                    if file is not None:
                        sync(file)
                        own[file.name] = sha256(file)
            digests = {name: digest for files in mesh.gather(own) for name, digest in sorted(files.items())}
            if mesh.is_main:
                values = {name: plain for name, (plain, _) in parts.items()}
                state = {"format": FORMAT_VERSION, "sha256": digests, "states": values, **asdict(position)}
                state["state_sha256"] = _digest(state)
                (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        return target

    @contextmanager
    def _written_by_all(self, target: Path, pinned: int | None) -> Iterator[Path]:
        """Yields a folder that replaces ``target`` when the block succeeds on all ranks."""
        with self._mesh.together(), ExitStack() as stack, self._mesh.together():
            partial = target
            with self._mesh.together():
                if self._mesh.is_main:
                    self._root.mkdir(parents=True, exist_ok=True)
                    remove_partial(self._root)
                    stack.callback(self._delete_old, pinned)
                    partial = stack.enter_context(atomic_folder(target))
            yield Path(self._mesh.broadcast(str(partial)))

    def _delete_old(self, pinned: int | None) -> None:
        for old in self.steps()[: -self._keep]:
            if old != pinned:
                shutil.rmtree(self._root / f"step-{old}")

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, ascending."""
        if not self._root.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d+)", entry.name) for entry in self._root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Path | None:
        """Returns the newest checkpoint, or None."""
        steps = self._mesh.broadcast(self.steps())
        return self._root / f"step-{steps[-1]}" if steps else None

    def load_weights(self, step: int, data_hash: str) -> None:
        """Restores the trained weights of a step, and no other part of the run; see :meth:`load`."""
        self.load(self._root / f"step-{step}", data_hash, only=(OPTIMIZER,))

    def load(self, path: Path, data_hash: str, only: Sequence[str] | None = None) -> Position:
        """Restores the run.

        Args:
            path: The folder of the checkpoint.
            data_hash: Digest of the data.
            only: The parts to restore; all by default.

        Raises:
            CheckpointError: The files are damaged, of another version, or belong to other data or parameters.
        """
        with self._mesh.together():
            checkpoint = read(path, self._mesh, self._layouts())
            if checkpoint.position.data_hash != data_hash:
                raise CheckpointError(
                    "The training data has changed since this run began; resuming would mix two datasets.",
                    where=str(path),
                    fix="restore the former files, or use --output=DIR to start a new run",
                )
            found = {name for name in checkpoint.tensors.get(OPTIMIZER, {}) if name.startswith(_MASTER)}
            expected = self._masters().keys()
            if found != expected:
                raise CheckpointError(
                    "The parameters in the checkpoint are not those that this run trains.",
                    where=str(path),
                    why=f"{len(found - expected)} unknown and {len(expected - found)} missing parameters",
                )
        with self._mesh.together():
            for name, part in self._states.items():
                if only is not None and name not in only:
                    continue
                try:
                    part.load_state_dict(checkpoint.state(name))
                except (KeyError, QuantizationError) as error:
                    raise _damaged(path, error) from error
        return checkpoint.position

    def rehearse(self, position: Position) -> Path:
        """Saves, reloads and compares a checkpoint before the first step, so that later ones are known to work.

        Also checks that the disk has room for all checkpoints and the result of the run.

        Raises:
            DoesNotFit: The disk is too small.
            CheckpointError: The checkpoint differs from what was written.
        """
        masters = sum(master.nbytes for master in self._masters().values())
        full = self._optimizer.checkpoint_bytes  # the moments exist only after the first step
        needed = full * (self._num_on_disk + 1) + masters + (16 << 20)
        free = self._mesh.broadcast(self._folder.free_bytes() if self._mesh.is_main else 0)
        if needed > free:
            raise DoesNotFit(
                f"This run needs {size(needed)} of disk space; {size(free)} are free.",
                where=f"output = {self._folder.path}, train.keep_checkpoints = {self._keep}",
                why=f"{self._num_on_disk + 1} checkpoints of {size(full)} and the result",
                fix="--output=DIR on another disk, or --train.keep_checkpoints=1",
            )
        path = self.save(position)
        states = {name: _split(part.state_dict()) for name, part in self._states.items()}
        with self._mesh.together():
            checkpoint = read(path, self._mesh, self._layouts())
            same = checkpoint.position == position
            for name, (values, tensors) in states.items():
                reread = checkpoint.tensors.get(name, {})
                same = same and values == checkpoint.values.get(name, {}) and tensors.keys() == reread.keys()
                same = same and all(_equal(reread[key], tensor) for key, tensor in tensors.items())
            if not same:
                raise CheckpointError("The first checkpoint differs from what was written.", where=str(path))
        return path

    @property
    def _optimizer(self) -> OptimizerState:
        return cast(OptimizerState, self._states[OPTIMIZER])

    def _masters(self) -> dict[str, Tensor]:
        """Returns the float32 masters by their names in the state of the optimizer."""
        state = self._optimizer.state_dict()
        return {name: value for name, value in state.items() if name.startswith(_MASTER)}

    def _layouts(self) -> Callable[[str, str], Tensor | None]:
        """Returns a function that maps a tensor of a state to one that is sharded like it."""

        def find(state: str, name: str) -> Tensor | None:
            like = getattr(self._states.get(state), "like", None)
            return None if like is None else like(name)

        return find


def read(
    path: Path, mesh: Mesh | None = None, like: Callable[[str, str], Tensor | None] = lambda state, name: None
) -> Checkpoint:
    """Reads a checkpoint; not collective.

    Args:
        path: Its folder.
        mesh: The ranks that read it; each checks the digests of some files. One process checks all.
        like: Returns the sharded tensor whose rows of this rank are needed, given the names of a state and of a tensor
            in it; complete tensors are read for None.

    Raises:
        CheckpointError: A file is missing, damaged, or of another version.
    """
    rank, world_size = (mesh.dist_rank, mesh.world_size) if mesh is not None else (0, 1)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        version = state["format"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"This checkpoint has format {str(version)[:20]}; this version of Ingle reads format {FORMAT_VERSION}.",
                where=str(path),
                fix="finish the run with the version that began it, or use --output=DIR to start a new run",
            )
        if state.pop("state_sha256") != _digest(state):
            raise _damaged(path, f"the values in {STATE} do not match their digest")
        digests = state.pop("sha256")
        for name in sorted(digests)[rank::world_size]:
            if sha256(path / name) != digests[name]:
                raise _damaged(path, f"the bytes of {name} do not match their digest")
        del state["format"]
        values = state.pop("states")
        tensors = {name: read_tensors(path, name, digests, partial(like, name)) for name in values}
        position = Position(**state)
    except UnreadableState as error:
        raise _damaged(path, error) from error
    except FileNotFoundError as error:
        raise _damaged(path, f"{Path(error.filename or path).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{STATE}: {type(error).__name__}: {error}") from error
    if path.name != f"step-{position.step}":
        raise _damaged(path, f"it contains step {position.step}, but its folder has another name")
    return Checkpoint(position, values, tensors)


def _equal(read: Tensor, written: Tensor) -> bool:
    return torch.equal(local(read).cpu(), local(written).cpu())


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Separates plain values from tensors."""
    values = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return values, {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _digest(state: dict[str, Any]) -> str:
    """Returns the SHA-256 of the values of ``state.json``, independent of their layout in the file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, error: Exception | str) -> CheckpointError:
    return CheckpointError(
        "The checkpoint is damaged.",
        where=str(path),
        why=str(error),
        fix=f"delete {path} and repeat the command: the run resumes from the previous checkpoint",
    )
