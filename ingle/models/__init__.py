"""Models and tokenizers; the one door to ``transformers``."""

from transformers import PreTrainedModel as Model

from ingle.models.forward.layers import decoder_layers, recompute_layers
from ingle.models.forward.packed import Head, forward_hidden, head
from ingle.models.forward.verification import verify
from ingle.models.generation.answers import Generation
from ingle.models.generation.loop import end_token_ids, generate, stream
from ingle.models.interop.imatrix_names import gguf_names, load_importance, save_importance
from ingle.models.interop.saving import save_pretrained, save_setup
from ingle.models.limits import refuse_longer, refuse_tokens_beyond, text_limit
from ingle.models.loading.architecture import compute_dtype, meta_model
from ingle.models.loading.gguf_model import choose_formats, convert_base
from ingle.models.loading.opening import load_model
from ingle.models.loading.stored_format import stored_base
from ingle.models.loading.weights import load_weights
from ingle.models.tokenizer import load_tokenizer
from ingle.models.versions import OLDEST_TRANSFORMERS

__all__ = [
    "OLDEST_TRANSFORMERS",
    "Generation",
    "Head",
    "Model",
    "choose_formats",
    "compute_dtype",
    "convert_base",
    "decoder_layers",
    "end_token_ids",
    "forward_hidden",
    "generate",
    "gguf_names",
    "head",
    "load_importance",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "meta_model",
    "recompute_layers",
    "refuse_longer",
    "refuse_tokens_beyond",
    "save_importance",
    "save_pretrained",
    "save_setup",
    "stored_base",
    "stream",
    "text_limit",
    "verify",
]
