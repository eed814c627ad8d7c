"""Models and tokenizers; the one door to ``transformers``."""

from transformers import PreTrainedModel as Model

from ingle.models.accepted import OLDEST_TRANSFORMERS
from ingle.models.answers import Generation
from ingle.models.architecture import compute_dtype, skeleton
from ingle.models.generation import end_token_ids, generate, stream
from ingle.models.gguf_file import choose_formats, pack
from ingle.models.hidden import Head, forward_hidden, head
from ingle.models.importance import gguf_names, load_importance, save_importance
from ingle.models.layers import decoder_layers, recompute_layers
from ingle.models.limits import refuse_longer, refuse_tokens_beyond, text_limit
from ingle.models.loader import fill
from ingle.models.opening import load_model
from ingle.models.packed import packed_base
from ingle.models.saving import save_pretrained, save_setup
from ingle.models.tokenizer import load_tokenizer
from ingle.models.verification import verify

__all__ = [
    "OLDEST_TRANSFORMERS",
    "Generation",
    "Head",
    "Model",
    "choose_formats",
    "compute_dtype",
    "decoder_layers",
    "end_token_ids",
    "fill",
    "forward_hidden",
    "generate",
    "gguf_names",
    "head",
    "load_importance",
    "load_model",
    "load_tokenizer",
    "pack",
    "packed_base",
    "recompute_layers",
    "refuse_longer",
    "refuse_tokens_beyond",
    "save_importance",
    "save_pretrained",
    "save_setup",
    "skeleton",
    "stream",
    "text_limit",
    "verify",
]
