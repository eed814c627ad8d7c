"""The root of the config tree: one run."""

from __future__ import annotations

from ingle.config.adapter import AdapterConfig, LoraAdapter
from ingle.config.base import BaseConfig, NoBase
from ingle.config.data import DataConfig
from ingle.config.evaluate import EvaluateConfig, TaskConfig, suit_task
from ingle.config.model import ModelConfig
from ingle.config.objective import FAMILY, ObjectiveConfig, Sft
from ingle.config.optim import DEFAULT_LR, OptimConfig
from ingle.config.parallel import ParallelConfig
from ingle.config.section import Section, Seed, Text
from ingle.config.train import TrainConfig


class Run(Section):
    """One run, as ``run.yaml`` stores it.

    Attributes:
        output: The run folder.
        seed: Seed of data order, adapter initialization and dropout.
        paths_from: Folder for relative paths that do not exist in the current folder. Ingle stores here the folder in
            which the run was started.
    """

    model: ModelConfig
    base: BaseConfig = NoBase()
    adapter: AdapterConfig = LoraAdapter()
    data: DataConfig
    objective: ObjectiveConfig = Sft()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluate: EvaluateConfig | None = None
    output: Text
    seed: Seed = 0
    paths_from: Text | None = None

    @property
    def task(self) -> TaskConfig | None:
        """The task on which the tuned model is compared, with the metrics that suit the objective; None without one."""
        task = None if self.evaluate is None else self.evaluate.task
        return None if task is None else suit_task(task, self.objective)

    @property
    def optimizer(self) -> OptimConfig:
        """The options of the optimizer; a learning rate that is null is the one that suits objective and adapter."""
        return self.optim.model_copy(update={"lr": self.learning_rate})

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the one that is set, or the one that suits the objective and the adapter."""
        with_adapter, full = DEFAULT_LR[FAMILY[self.objective.kind]]
        return self.optim.lr or (full if self.adapter.kind == "none" else with_adapter)
