"""T5: an encoder-decoder with relative positions, whose files have two stacks of layers.

The first models multiply the output of the decoder by ``d_model ** -0.5`` before their tied output head, but llama.cpp
does not. So Ingle writes this factor into the last norm, and says so in the metadata. A file of another program has it
nowhere; the model that is read from it has the factor, as it was published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.family import Change, Config, GgufFamily

#: llama.cpp computes with the distance of the published models.
_LONGEST_DISTANCE = 128
#: Metadata of Ingle: the factor in the last norm of the decoder.
_SCALE = "decoder_output_scale"
#: llama.cpp has no limit; its converter writes this number for configs without one.
_CONTEXT = 512

_FEED_FORWARD = {
    "DenseReluDense.wi": "ffn_up",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
    "layer_norm": "ffn_norm",
}


def _attention(name: str, part: str) -> dict[str, str]:
    """Returns the tensors of an attention and of the norm before it."""
    found = {f"{name}.{letter}": f"{part}_{letter}" for letter in "qkvo"}
    return found | {f"{name}.relative_attention_bias": f"{part}_rel_b", "layer_norm": f"{part}_norm"}


def _stack(path: str, prefix: str, *parts: Mapping[str, str]) -> dict[str, str]:
    """Returns the tensors of a stack of layers; each part of a layer has a number."""
    found = {
        f"{path}.block.*.layer.{number}.{module}": f"{prefix}.blk.*.{tensor}"
        for number, part in enumerate(parts)
        for module, tensor in part.items()
    }
    return found | {f"{path}.final_layer_norm": f"{prefix}.output_norm"}


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    num_layers = values.integer("block_count")
    if "enc.blk.1.attn_rel_b.weight" in file.tensors:
        raise GgufError("UMT5, T5 with relative positions in each layer, is not supported.", where=str(file.path))
    factor = values.get(_SCALE)
    return {
        "d_model": values.integer("embedding_length"),
        "d_ff": values.integer("feed_forward_length"),
        "d_kv": values.integer("attention.key_length"),
        "num_heads": values.integer("attention.head_count"),
        "num_layers": num_layers,
        "num_decoder_layers": values.integer("decoder_block_count", num_layers),
        "relative_attention_num_buckets": values.integer("attention.relative_buckets_count"),
        "relative_attention_max_distance": _LONGEST_DISTANCE,
        "layer_norm_epsilon": values.number("attention.layer_norm_rms_epsilon"),
        "feed_forward_proj": "gated-gelu" if "enc.blk.0.ffn_gate.weight" in file.tensors else "relu",
        "decoder_start_token_id": values.integer("decoder_start_token_id", 0, low=0),
        "is_encoder_decoder": True,
        "scale_decoder_outputs": "output.weight" not in file.tensors and factor != 1.0,
        "has_scaled_norm": factor is not None,
    }


def _metadata(config: Config) -> dict[str, Any]:
    for is_unsupported, why in (
        (config["feed_forward_proj"] not in ("relu", "gated-gelu"), f"the activation is {config['feed_forward_proj']}"),
        (
            config["relative_attention_max_distance"] != _LONGEST_DISTANCE,
            f"positions differ up to a distance of {config['relative_attention_max_distance']}",
        ),
        (config["num_decoder_layers"] > config["num_layers"], "the decoder has more layers than the encoder"),
    ):
        if is_unsupported:
            raise GgufError("llama.cpp does not compute this T5 model.", where="config.json", why=why)
    epsilon = float(config["layer_norm_epsilon"])
    return {
        _SCALE: _scale(config),
        "block_count": config["num_layers"],
        "decoder_block_count": config["num_decoder_layers"],
        "context_length": config.get("n_positions") or _CONTEXT,
        "embedding_length": config["d_model"],
        "feed_forward_length": config["d_ff"],
        "attention.head_count": config["num_heads"],
        "attention.key_length": config["d_kv"],
        "attention.value_length": config["d_kv"],
        "attention.layer_norm_epsilon": epsilon,
        "attention.layer_norm_rms_epsilon": epsilon,
        "attention.relative_buckets_count": config["relative_attention_num_buckets"],
        "decoder_start_token_id": config.get("decoder_start_token_id") or 0,
        "vocab_size": config["vocab_size"],
    }


def _scale(config: Config) -> float:
    """Returns the factor in the last norm."""
    is_scaled = config.get("scale_decoder_outputs") and config.get("has_scaled_norm", True)
    return float(config["d_model"] ** -0.5) if is_scaled else 1.0


def _last_norm(config: Config, shape: tuple[int, ...]) -> Change:
    return Change(scale=_scale(config))


def _sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    inner, width = config["num_heads"] * config["d_kv"], config["d_model"]
    return {
        "attn_q": (inner, width),
        "ffn_up": (config["d_ff"], width),
        "cross_attn_q": (inner, width),
    }


T5 = GgufFamily(
    architecture="t5",
    model_type="t5",
    class_name="T5ForConditionalGeneration",
    read_config=_read,
    write_metadata=_metadata,
    layer={},
    sizes=_sizes,
    top={
        "shared": "token_embd",
        "lm_head": "output",
        **_stack("encoder", "enc", _attention("SelfAttention", "attn"), _FEED_FORWARD),
        **_stack(
            "decoder",
            "dec",
            _attention("SelfAttention", "attn"),
            _attention("EncDecAttention", "cross_attn"),
            _FEED_FORWARD,
        ),
    },
    rules={"decoder.final_layer_norm.weight": _last_norm},
    decoder="",
    layers="encoder.block",
    also=("mt5",),
)
