"""The config tree: YAML files, command-line overrides and Python objects all build a frozen :class:`Run`."""

from ingle.config.adapter import (
    AdapterConfig,
    DoraAdapter,
    LoraAdapter,
    LowRankAdapter,
    MergeAware,
    NoAdapter,
    QaLoraAdapter,
)
from ingle.config.base import BaseConfig, Int8Base, Nf4Base, NoBase
from ingle.config.data import DataConfig, Source
from ingle.config.evaluate import TaskConfig
from ingle.config.loader import LoadedRun, load_run, load_task, run_from_yaml, run_to_yaml
from ingle.config.model import ModelConfig
from ingle.config.objective import Answer, Classify, Clm, Mlm, ObjectiveConfig, Seq2Seq, Sft, Span, Tag
from ingle.config.optim import OptimConfig
from ingle.config.parallel import ParallelConfig
from ingle.config.preferences import Bco, Cpo, Dpo, Kto, Orpo, Reward, Simpo
from ingle.config.rules import check
from ingle.config.run import Run
from ingle.config.train import TrainConfig

__all__ = [
    "AdapterConfig",
    "Answer",
    "BaseConfig",
    "Bco",
    "Classify",
    "Clm",
    "Cpo",
    "DataConfig",
    "DoraAdapter",
    "Dpo",
    "Int8Base",
    "Kto",
    "LoadedRun",
    "LoraAdapter",
    "LowRankAdapter",
    "MergeAware",
    "Mlm",
    "ModelConfig",
    "Nf4Base",
    "NoAdapter",
    "NoBase",
    "ObjectiveConfig",
    "OptimConfig",
    "Orpo",
    "ParallelConfig",
    "QaLoraAdapter",
    "Reward",
    "Run",
    "Seq2Seq",
    "Sft",
    "Simpo",
    "Source",
    "Span",
    "Tag",
    "TaskConfig",
    "TrainConfig",
    "check",
    "load_run",
    "load_task",
    "run_from_yaml",
    "run_to_yaml",
]
