"""Predicts what a run takes beyond its devices: host memory and disk space."""

from __future__ import annotations

from ingle.config.optim import Subspace
from ingle.planning.loading import reading_bytes
from ingle.planning.memory import trainable_parameters
from ingle.planning.rollout_memory import answers_bytes
from ingle.planning.search import Option, Problem, offloaded_bytes
from ingle.planning.update_rules import state_bytes

#: Host memory of a process on a GPU: Python, PyTorch, transformers and the CUDA libraries.
_PROCESS_BYTES = 2 << 30
#: Bytes of a token of the data on disk and in memory: its id and whether it is supervised.
_TOKEN_BYTES = 5
#: Bytes per trained parameter of a master in a checkpoint, and of a result in 16 or 32 bits.
_MASTER_BYTES, _RESULT_BYTES = 4, 4
#: Quantized bytes from which they are kept on disk, as in :mod:`ingle.models.loading.quantized_cache`.
_LEAST_CACHED = 1 << 28


def host_bytes(problem: Problem, option: Option) -> int:
    """Predicts the host memory of a machine with all its ranks, without the files that the system caches.

    On a CPU it is what the ranks need, on GPUs their processes, the tensors that are being read, and what is offloaded.
    """
    ranks, strategy = problem.local_world_size, option.strategy
    data = problem.data.num_tokens * _TOKEN_BYTES
    if not problem.device.on_gpu:
        return ranks * option.memory.total_bytes + data
    reading = reading_bytes(problem.shape, problem.run.base, problem.dtype_bytes, ranks)
    offloaded = offloaded_bytes(problem, strategy, option.host_activation_bytes)
    answers = ranks * answers_bytes(problem.run, problem.data)
    return round(ranks * _PROCESS_BYTES + reading + offloaded + data + answers)


def checkpoint_bytes(problem: Problem) -> int:
    """Predicts the size of one checkpoint."""
    run, shape = problem.run, problem.shape
    trained = trainable_parameters(run, shape)
    masters = run.optim.rule.dim if isinstance(run.optim.rule, Subspace) else trained
    return round(_MASTER_BYTES * masters + state_bytes(run, shape, trained))


def disk_bytes(problem: Problem) -> int:
    """Predicts the disk space of a run, without the model's own files.

    That is checkpoints, one of them being written, the result, tokenized data, and quantized weights that are kept.
    """
    trained = trainable_parameters(problem.run, problem.shape)
    kept = problem.run.train.keep_checkpoints + problem.run.train.keep_best + 1
    quantized = 0 if problem.run.model.id.lower().endswith(".gguf") else round(problem.work.stored_bytes)
    cached = quantized if quantized >= _LEAST_CACHED else 0
    return kept * checkpoint_bytes(problem) + _RESULT_BYTES * trained + _TOKEN_BYTES * problem.data.num_tokens + cached
