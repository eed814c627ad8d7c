"""Corrupted texts, from which ``mlm`` and ``span`` learn: tokens and spans are hidden when a batch is made."""

from ingle.data.corruption.infilling import Infilling
from ingle.data.corruption.masking import Masking
from ingle.data.corruption.samples import Corruption, Target
from ingle.data.corruption.spans import (
    UL2,
    Denoiser,
    SpanCorruption,
    corrupted_lengths,
    denoisers,
    find_sentinels,
    longest_text,
)
from ingle.data.corruption.words import WordTable, is_special, mask_token

__all__ = [
    "UL2",
    "Corruption",
    "Denoiser",
    "Infilling",
    "Masking",
    "SpanCorruption",
    "Target",
    "WordTable",
    "corrupted_lengths",
    "denoisers",
    "find_sentinels",
    "is_special",
    "longest_text",
    "mask_token",
]
