"""Models and tokenizers; the only package that imports ``transformers``."""

from ingle.models.versions import OLDEST_TRANSFORMERS  # first: it refuses a transformers that is too old

# isort: split
from transformers import PreTrainedModel as Model

from ingle.models.forward.hidden_states import Head, device_of, forward_hidden, head, through_head
from ingle.models.forward.layers import (
    can_recompute,
    dealt_modules,
    decoder_layers,
    layer_uses,
    read_modules,
    recompute_layers,
    repeated_layers,
)
from ingle.models.forward.layout import layout_note, require_shardable
from ingle.models.forward.prompt_sharing import why_prompts_repeat
from ingle.models.forward.rewards import forward_reward, scores_by_position
from ingle.models.forward.routers import Routers, find_routers
from ingle.models.forward.task_heads import forward_task
from ingle.models.forward.verification import keys_of, verify, verify_virtual_tokens
from ingle.models.forward.virtual_tokens import virtual_length
from ingle.models.generation.batches import first_token
from ingle.models.generation.decoding import generate, stream
from ingle.models.generation.rollout import Request, Rollout, Sampler, Sampling, noise_keys
from ingle.models.generation.sampler import make_sampler
from ingle.models.generation.stop_criteria import Generation, end_token_ids
from ingle.models.interop.imatrix_names import gguf_names, importance_by_tensor, load_importance, save_importance
from ingle.models.interop.saving import save_pretrained, save_setup, save_sharded
from ingle.models.interop.towers import copy_processor
from ingle.models.kinds import ModelKind, ModelTask, class_that_reads, kind_of, reader_class, require_kind, task_of
from ingle.models.loading.config_json import stored_base, stored_kind, stored_task
from ingle.models.loading.gguf_model import choose_formats, convert_base
from ingle.models.loading.meta_device import compute_dtype, meta_model
from ingle.models.loading.quantized_cache import QuantizedCache
from ingle.models.loading.weight_loading import load_model, load_weights
from ingle.models.loading.weight_stream import original_weights
from ingle.models.objective_tasks import has_labels, keep_stored_labels, model_task, trained_objective
from ingle.models.text_limits import (
    choose_padding,
    num_tokens,
    refuse_longer,
    refuse_tokens_beyond,
    text_limit,
    unscaled_limit,
)
from ingle.models.text_part import tower_paths
from ingle.models.tokenizer import load_tokenizer

__all__ = [
    "OLDEST_TRANSFORMERS",
    "Generation",
    "Head",
    "Model",
    "ModelKind",
    "ModelTask",
    "QuantizedCache",
    "Request",
    "Rollout",
    "Routers",
    "Sampler",
    "Sampling",
    "can_recompute",
    "choose_formats",
    "choose_padding",
    "class_that_reads",
    "compute_dtype",
    "convert_base",
    "copy_processor",
    "dealt_modules",
    "decoder_layers",
    "device_of",
    "end_token_ids",
    "find_routers",
    "first_token",
    "forward_hidden",
    "forward_reward",
    "forward_task",
    "generate",
    "gguf_names",
    "has_labels",
    "head",
    "importance_by_tensor",
    "keep_stored_labels",
    "keys_of",
    "kind_of",
    "layer_uses",
    "layout_note",
    "load_importance",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "make_sampler",
    "meta_model",
    "model_task",
    "noise_keys",
    "num_tokens",
    "original_weights",
    "read_modules",
    "reader_class",
    "recompute_layers",
    "refuse_longer",
    "refuse_tokens_beyond",
    "repeated_layers",
    "require_kind",
    "require_shardable",
    "save_importance",
    "save_pretrained",
    "save_setup",
    "save_sharded",
    "scores_by_position",
    "stored_base",
    "stored_kind",
    "stored_task",
    "stream",
    "task_of",
    "text_limit",
    "through_head",
    "tower_paths",
    "trained_objective",
    "unscaled_limit",
    "verify",
    "verify_virtual_tokens",
    "virtual_length",
    "why_prompts_repeat",
]
