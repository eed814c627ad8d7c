"""Models and tokenizers; the one door to ``transformers``."""

from ingle.models.architecture import compute_dtype, skeleton
from ingle.models.hidden import Head, forward_hidden, head, verify
from ingle.models.loader import fill
from ingle.models.tokenizer import load_tokenizer

__all__ = ["Head", "compute_dtype", "fill", "forward_hidden", "head", "load_tokenizer", "skeleton", "verify"]
