"""Checkpoints from which a run goes on bit for bit.

A checkpoint holds the optimizer's state (float32 masters and moments) and a few integers.  Everything else
is a pure function of them: the learning rate of the step, the data order of the sampler's counter, dropout
of ``(seed, step, micro-batch)``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ingle.atomic import atomic_folder, sha256
from ingle.errors import CheckpointError, DoesNotFit, QuantizationError
from ingle.quant.imatrix_collector import ImatrixCollector
from ingle.training.folder import RunFolder, remove_partial
from ingle.training.optim import Optimizer
from ingle.wording import size

FORMAT_VERSION = 3

#: Position and digests, in the folder of a checkpoint.
STATE = "state.json"

#: Masters and moments, in the folder of a checkpoint.
OPTIMIZER = "optimizer.safetensors"

#: The importance matrix so far, in the folder of a checkpoint.
IMATRIX = "imatrix.safetensors"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands.

    Attributes:
        step: Optimizer steps made.
        counter: Sequences taken from the sampler; its whole state.
        num_tokens: Tokens read.
        data_hash: Of the tokenized data; going on with other data is refused.
        seconds: Time spent training.
    """

    step: int
    counter: int
    num_tokens: int
    data_hash: str
    seconds: float = 0.0


class Checkpoints:
    """Writes, finds and reads the checkpoints of one run.

    Args:
        folder: The run folder.
        keep: How many of the newest stay on disk.
        imatrix: Importance matrix that the run gathers, if it does; saved and restored too.
    """

    def __init__(self, folder: RunFolder, keep: int, imatrix: ImatrixCollector | None = None) -> None:
        self._root = folder.checkpoints
        self._folder = folder
        self._keep = keep
        self._imatrix = imatrix

    def save(self, optimizer: Optimizer, position: Position) -> Path:
        """Writes a checkpoint, then removes those that are too many.

        Raises:
            CheckpointError: When the disk is full.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        remove_partial(self._root)
        target = self._root / f"step-{position.step}"
        with atomic_folder(target) as partial:
            tensors = {name: tensor.contiguous() for name, tensor in optimizer.state_dict().items()}
            save_file(tensors, partial / OPTIMIZER)
            if self._imatrix is not None:
                save_file(self._imatrix.state_dict(), partial / IMATRIX)
            digests = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            state = {"format": FORMAT_VERSION, "sha256": digests, **asdict(position)}
            state["state_sha256"] = _digest(state)
            (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._root / f"step-{old}")
        return target

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        if not self._root.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d+)", entry.name) for entry in self._root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Path | None:
        """The newest checkpoint, None when there is none."""
        steps = self.steps()
        return self._root / f"step-{steps[-1]}" if steps else None

    def load(self, path: Path, optimizer: Optimizer, data_hash: str) -> Position:
        """Puts the optimizer and the trained parameters where the checkpoint left them.

        Raises:
            CheckpointError: When the files are damaged, of another version, or belong to other data.
        """
        tensors, position = read(path)
        if position.data_hash != data_hash:
            raise CheckpointError(
                "The training data changed since this run began; going on would mix two data sets.",
                where=str(path),
                fix="put the former files back, or choose another folder with --output=",
            )
        expected = {f"master.{name}" for name, _ in optimizer.named_masters()}
        found = {name for name in tensors if name.startswith("master.")}
        if expected != found:
            raise CheckpointError(
                "The checkpoint holds other parameters than this run trains.",
                where=str(path),
                why=f"{len(found - expected)} unknown, {len(expected - found)} missing",
            )
        if self._imatrix is not None:
            self._restore(self._imatrix, path / IMATRIX)
        optimizer.load_state_dict(tensors)
        return position

    def _restore(self, imatrix: ImatrixCollector, file: Path) -> None:
        try:
            imatrix.load_state_dict(load_file(file))
        except (OSError, SafetensorError, QuantizationError) as error:
            raise _damaged(file.parent, error) from error

    def rehearse(self, optimizer: Optimizer, position: Position) -> Path:
        """Saves, reloads and compares at the first step, so that saving cannot be what loses the run.

        Also checks that the disk holds all the checkpoints and the result of the whole run.

        Raises:
            DoesNotFit: When the disk is too small.
            CheckpointError: When what is read back is not what was written.
        """
        state = optimizer.state_dict()
        num_bytes = sum(tensor.nbytes for tensor in state.values())
        masters = sum(tensor.nbytes for name, tensor in state.items() if name.startswith("master."))
        full = max(num_bytes, 3 * masters)  # the moments are there only after the first step
        needed = full * (self._keep + 1) + masters + (16 << 20)
        free = self._folder.free_bytes()
        if needed > free:
            raise DoesNotFit(
                f"This run needs {size(needed)} of disk; {size(free)} are free.",
                where=f"output = {self._folder.path}, train.keep_checkpoints = {self._keep}",
                why=f"{self._keep + 1} checkpoints of {size(full)} and the result",
                fix="--output=a/folder/on/another/disk or --train.keep_checkpoints=1",
            )
        path = self.save(optimizer, position)
        tensors, reread = read(path)
        same = reread == position and tensors.keys() == state.keys()
        if not same or any(not torch.equal(tensors[name], state[name].cpu()) for name in state):
            raise CheckpointError(
                "What was read back from the first checkpoint is not what was written.", where=str(path)
            )
        return path


def read(path: Path) -> tuple[dict[str, Tensor], Position]:
    """Tensors and position of a checkpoint.

    Raises:
        CheckpointError: When a file is missing, damaged, or of another version.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        version = state["format"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"This checkpoint has format {str(version)[:20]}; this version of Ingle reads format {FORMAT_VERSION}.",
                where=str(path),
                fix="finish the run with the version that began it, or start again with --output=another/folder",
            )
        if state.pop("state_sha256") != _digest(state):
            raise _damaged(path, f"{STATE} holds other values than were written")
        digests = state.pop("sha256")
        for name in (OPTIMIZER, *digests):
            if sha256(path / name) != digests[name]:
                raise _damaged(path, f"{name} holds other bytes than were written")
        tensors = load_file(path / OPTIMIZER)
        del state["format"]
        position = Position(**state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise _damaged(path, f"{STATE}: {type(error).__name__}: {error}") from error
    if path.name != f"step-{position.step}":
        raise _damaged(path, f"it is the checkpoint of step {position.step}, in a folder of another name")
    return tensors, position


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of what ``state.json`` says, however it is laid out."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, error: Exception | str) -> CheckpointError:
    return CheckpointError(
        "The checkpoint is damaged.",
        where=str(path),
        why=str(error),
        fix=f"delete {path} and run again: the run goes on from the checkpoint before it",
    )
