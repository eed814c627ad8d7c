"""The whole tree: one run."""

from __future__ import annotations

from ingle.config.adapter import AdapterConfig, LoraAdapter
from ingle.config.base import BaseConfig, NoBase
from ingle.config.data import DataConfig
from ingle.config.evaluate import TaskConfig
from ingle.config.model import ModelConfig
from ingle.config.objective import ObjectiveConfig, Sft
from ingle.config.optim import OptimConfig
from ingle.config.parallel import ParallelConfig
from ingle.config.section import Section, Seed, Text
from ingle.config.train import TrainConfig


class Run(Section):
    """One run, as ``run.yaml`` stores it.

    Attributes:
        output: The run folder.
        seed: Of data order, adapter initialisation and dropout.
        paths_from: Folder that relative paths refer to if the current folder does not have them; ``run.yaml`` in a run
            folder holds the one in which the run was started.
    """

    model: ModelConfig
    base: BaseConfig = NoBase()
    adapter: AdapterConfig = LoraAdapter()
    data: DataConfig
    objective: ObjectiveConfig = Sft()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluate: TaskConfig | None = None
    output: Text
    seed: Seed = 0
    paths_from: Text | None = None
