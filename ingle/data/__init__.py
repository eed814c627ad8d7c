"""Data: reads rows from files and the hub, and renders, tokenizes, masks and packs them.

Only batches need torch, so they are imported on first use: processes that tokenize rows do not load it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ingle.data.control import ControlTokens
from ingle.data.dataset import TokenDataset
from ingle.data.dataset_builder import build_dataset
from ingle.data.duplicates import ContaminationSearch
from ingle.data.encode_sources import source_ids
from ingle.data.holdout import HeldOut, hold_out
from ingle.data.label_names import name_labels
from ingle.data.packing import Sequences, make_sequences
from ingle.data.prompt import prompt_ids
from ingle.data.prompts import PromptSet, build_prompts
from ingle.data.sampler import SequenceSampler
from ingle.data.sources import read_examples
from ingle.data.template import render
from ingle.data.types import IGNORE_INDEX, Example, Message, Sample, Tokenizer
from ingle.report.data_results import Contamination

if TYPE_CHECKING:
    from ingle.data.batch import Batch, collate, round_up

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Contamination",
    "ContaminationSearch",
    "ControlTokens",
    "Example",
    "HeldOut",
    "Message",
    "PromptSet",
    "Sample",
    "SequenceSampler",
    "Sequences",
    "TokenDataset",
    "Tokenizer",
    "build_dataset",
    "build_prompts",
    "collate",
    "hold_out",
    "make_sequences",
    "name_labels",
    "prompt_ids",
    "read_examples",
    "render",
    "round_up",
    "source_ids",
]


def __getattr__(name: str) -> Any:
    if name in ("Batch", "collate", "round_up"):
        return getattr(import_module("ingle.data.batch"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
