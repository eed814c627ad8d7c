"""Trained reward models that score sampled answers in this process.

A reward model on the policy's own base is a role of the policy: an adapter and a head, and no second model. Any other
one is opened as a model of its own. Answers are scored packed, at their last token by position.

Legend: R answers, N tokens of a row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingle import adapters, stopping
from ingle.config.run import Run
from ingle.data import IGNORE_INDEX, Sample, Tokenizer, collate, round_up
from ingle.data.batch import Batch
from ingle.data.encode_prompts import answer_ending
from ingle.data.types import Ids
from ingle.errors import ModelError
from ingle.models import Model, forward_hidden, text_limit
from ingle.models.forward.rewards import forward_reward
from ingle.objectives.interface import OpenModel
from ingle.objectives.rollouts.buffer import SampleBuffer
from ingle.objectives.scalar_head import ScalarHead, adapter_folder
from ingle.parallel import Mesh

#: Tokens of a packed row; longer answers are alone.
_ROW_TOKENS = 4096


class RewardModel:
    """Scores finished answers.

    Args:
        path: The run folder of the reward model.
        model: The policy.
        role: The role of the reward model in the policy; None if it is a model of its own.
        tokenizer: The policy's tokenizer.
        mesh: The ranks, which score different rows.
    """

    def __init__(self, path: str, model: Model, role: str | None, tokenizer: Tokenizer, mesh: Mesh) -> None:
        self._path, self._role, self._mesh = path, role, mesh
        self._model: Any = model
        self._tokenizer = tokenizer
        self._ending = answer_ending(tokenizer)
        self._head: ScalarHead | None = None

    def load(self, identity: adapters.BaseIdentity | None, open_model: OpenModel) -> None:
        """Loads its weights, once those of the policy are there.

        Raises:
            AdapterError: The adapter does not fit the policy, or has no head.
            ModelError: It cannot be opened, is no reward model, or has another vocabulary.
        """
        if self._role is not None:
            folder = adapter_folder(self._path)
            tensors = adapters.load_role(self._model, self._role, folder, identity=identity)
            layer: Any = self._model.get_output_embeddings()
            self._head = ScalarHead(layer.in_features, self._mesh.device).requires_grad_(False)
            self._head.load(folder, tensors)
            return
        opened = open_model(self._path)
        where = f"objective.rewards: {self._path}"
        if getattr(opened.model, "num_labels", None) != 1 or not hasattr(opened.model, "score"):
            raise ModelError(
                "This is no causal model that scores answers.",
                where=where,
                why=f"it is a {type(opened.model).__name__}",
                fix="name a run with --objective.kind=reward on a causal model",
            )
        if opened.tokenizer.get_vocab() != self._tokenizer.get_vocab():
            raise ModelError(
                "The reward model has another vocabulary than the policy, so it cannot read its tokens.",
                where=where,
                fix="train a reward model on a base of the same family",
            )
        self._model = opened.model.eval().requires_grad_(False)

    def __call__(self, buffer: SampleBuffer) -> npt.NDArray[np.float64] | None:
        """Returns the score of every answer of a buffer, as :meth:`score` does; all ranks call it together."""
        prompts, answers = buffer.by_answer("prompt_ids"), buffer.by_answer("ids")
        return self.score([np.concatenate(pair) for pair in zip(prompts, answers, strict=True)])

    def score(self, sequences: Sequence[Ids]) -> npt.NDArray[np.float64] | None:
        """Scores texts; all ranks call it together with the same ones.

        The rows in which texts are computed do not depend on the number of ranks.

        Args:
            sequences: The tokens of prompts with their answers. What the chat template writes after the end of a turn
                is added, as in training.

        Returns:
            float64 [R]; None if a rank was asked to stop.

        Raises:
            ModelError: A text is longer than the model's context.
        """
        texts = [self._finish(ids) for ids in sequences]
        self._check(texts)
        rows = list(_rows([len(ids) for ids in texts]))
        rank, size = self._mesh.dist_rank, self._mesh.world_size
        own = rows[rank::size]
        own += rows[:1] * (-(-len(rows) // size) - len(own))  # all ranks make as many passes
        found = []
        for row in own:
            if self._mesh.agree(stopping.requested() is not None):
                return None
            with torch.no_grad():
                found.append((row, self._pass([texts[i] for i in row]).double().cpu().numpy()))
        scores = np.zeros(len(texts))
        for row, values in (each for part in self._mesh.gather(found) for each in part):
            scores[row] = values
        return scores

    def _finish(self, ids: Ids) -> Ids:
        end, tail = self._ending
        return np.concatenate([ids, tail]) if len(tail) and len(ids) and ids[-1] == end else ids

    def _check(self, texts: Sequence[Ids]) -> None:
        limit, longest = text_limit(self._model), max(map(len, texts), default=0)
        if limit is not None and longest > limit:
            raise ModelError(
                "An answer is longer than the context of the reward model.",
                where=f"objective.rewards: {self._path}",
                why=f"it has {longest:,} tokens with its prompt; the context has room for {limit:,}",
                fix="a smaller --data.max_seq_len",
            )

    def _pass(self, texts: Sequence[Ids]) -> Tensor:
        """Returns the scores of texts that are computed in one row, [R]."""
        labels = [np.full(len(ids), IGNORE_INDEX, np.int32) for ids in texts]
        samples = [Sample(ids, own) for ids, own in zip(texts, labels, strict=True)]
        batch = round_up(collate(samples)).to(self._mesh.device)
        if self._role is None:
            return forward_reward(self._model, batch)
        return self._read_role(batch)

    def _read_role(self, batch: Batch) -> Tensor:
        assert self._role is not None and self._head is not None, "load comes first"
        with adapters.use(self._model, self._role):
            hidden_NH = forward_hidden(self._model, batch)[0]
        scores: Tensor = self._head(hidden_NH[batch.cu_seqlens[1 : batch.num_documents + 1].long() - 1])
        return scores


def insert_reward_role(model: Model, run: Run, number: int, path: str) -> str | None:
    """Adds the role of a reward model to a policy, before it is sharded.

    Returns:
        The name of the role; None if the reward model has another base, other layers, or no plain LoRA.

    Raises:
        AdapterError: Its adapter cannot be read.
    """
    folder = adapter_folder(path)
    if not (folder / "adapter_config.json").is_file() or not _has_base_of(folder, run):
        return None
    shape = adapters.read_shape(folder)
    if not adapters.fits_role(model, folder):
        return None
    name = f"reward_{number}"
    adapters.add_role(model, name, rank=shape.rank, scale=shape.scale, trained=False)
    return name


def _has_base_of(folder: Path, run: Run) -> bool:
    """Returns whether an adapter names the base of a run, in the same format."""
    named = adapters.base_of(folder)
    same = named == run.model.id or Path(named).expanduser().absolute() == Path(run.model.id).expanduser().absolute()
    return same and adapters.read_record(folder).base in (None, run.base)


def _rows(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields the numbers of texts that are computed together: neighbours, up to so many tokens."""
    row: list[int] = []
    total = 0
    for number, length in enumerate(lengths):
        if row and total + length > _ROW_TOKENS:
            yield row
            row, total = [], 0
        row.append(number)
        total += length
    if row:
        yield row
