"""What most families share: the tensors and the metadata of attention, feed-forward networks and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.family import Config
from ingle.gguf.rotary import head_size, read_rotary, rotary_parameters, scaling_metadata

ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
FEED_FORWARD = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TWO_NORMS = {"post_attention_layernorm": "ffn_norm"}
#: Stacked experts by the path of their module.
EXPERTS = {
    "gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "down_proj": ("ffn_down_exps.weight",),
}
FUSED_EXPERTS = "ffn_gate_up_exps.weight"
#: More layers than any model has; no list for each layer of a damaged file is longer.
MOST_LAYERS = 10_000
#: Model types whose sliding window llama.cpp ignores, so that their files have its length as the longest text.
_SHORTENED = ("mistral", "ministral3", "phi3", "starcoder2")


def experts(path: str) -> dict[str, tuple[str, ...]]:
    """Returns the tensors of the experts in the module at a path."""
    return {f"{path}.{name}": tensors for name, tensors in EXPERTS.items()}


def read_heads(file: GgufFile, values: ArchitectureValues) -> tuple[int, int]:
    """Returns the numbers of query heads and of key heads; a file may have the latter for each layer, 0 for none.

    Raises:
        GgufError: They are missing or invalid.
    """
    num_heads: Any = values.get("attention.head_count")
    num_kv_heads: Any = values.get("attention.head_count_kv", num_heads)
    if isinstance(num_kv_heads, list) and len(found := {each for each in num_kv_heads if each != 0}) == 1:
        num_kv_heads = found.pop()
    if not (_is_count(num_heads) and _is_count(num_kv_heads)) or num_heads % num_kv_heads:
        raise GgufError(
            "The numbers of attention heads in the file are invalid.",
            where=f"{values.architecture}.attention.head_count",
            why=f"head_count is {str(num_heads)[:60]}, head_count_kv is {str(num_kv_heads)[:60]}; the first must be a "
            "positive integer and a multiple of the second",
        )
    return num_heads, num_kv_heads


def read_decoder(
    file: GgufFile, values: ArchitectureValues, *, partial: bool = False, layer_norm: str | None = None
) -> dict[str, Any]:
    """Returns the part of a config that decoders with attention share.

    Args:
        file: The file.
        values: The metadata of its architecture.
        partial: Whether transformers can rotate only a part of each head in this architecture.
        layer_norm: The key of the config with the epsilon of layer norms, for models without RMS norms.

    Raises:
        GgufError: A detail of the file is not supported, or metadata is missing.
    """
    num_heads, num_kv_heads = read_heads(file, values)
    hidden = values.integer("embedding_length")
    head_dim = values.integer("attention.key_length", hidden // num_heads)
    rotated = values.integer("rope.dimension_count", head_dim)
    for is_unsupported, feature in (
        (head_dim % 2, f"Rotary embeddings of heads with {head_dim} features"),
        (values.integer("attention.value_length", head_dim) != head_dim, "Keys and values of different length"),
        (rotated != head_dim and not partial, "Rotary embeddings of a part of each head"),
    ):
        if is_unsupported:
            raise GgufError(f"{feature} are not supported.", where=str(file.path))
    rope = read_rotary(file, values, head_dim)
    if partial:
        rope["partial_rotary_factor"] = rotated / head_dim
    return {
        "hidden_size": hidden,
        "intermediate_size": values.integer("feed_forward_length"),
        "num_hidden_layers": values.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": values.integer("context_length"),
        "rope_parameters": rope,
    } | _read_epsilon(values, layer_norm)


def _read_epsilon(values: ArchitectureValues, layer_norm: str | None) -> dict[str, float]:
    if layer_norm is None:
        return {"rms_norm_eps": values.number("attention.layer_norm_rms_epsilon")}
    return {layer_norm: values.number("attention.layer_norm_epsilon")}


def decoder_metadata(config: Config, *, layer_norm: str | None = None) -> dict[str, Any]:
    """Returns the metadata that all decoders with attention share, without their rotary scaling.

    Args:
        config: The content of ``config.json``.
        layer_norm: As in :func:`read_decoder`.
    """
    head_dim = head_size(config)
    rope = rotary_parameters(config)
    full_rope = rope.get("full_attention", rope)
    longest = int(config["max_position_embeddings"])
    if config["model_type"] in _SHORTENED:
        longest = min(longest, config.get("sliding_window") or longest)
    epsilon = {"attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6))}
    if layer_norm is not None:
        epsilon = {"attention.layer_norm_epsilon": float(config[layer_norm])}
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": longest,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads") or config["num_attention_heads"],
        "rope.freq_base": float(full_rope.get("rope_theta", 10000.0)),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config["vocab_size"],
    } | epsilon


def rope_scaling(config: Config) -> dict[str, Any]:
    """Returns the metadata of the rotary scaling of full attention."""
    rope = rotary_parameters(config)
    return scaling_metadata(rope.get("full_attention", rope))


def plain_metadata(config: Config, *, layer_norm: str | None = None) -> dict[str, Any]:
    """Returns the metadata of a decoder without peculiarities; arguments as in :func:`decoder_metadata`.

    Raises:
        GgufError: The config has a sliding window, which llama.cpp does not compute for this architecture.
    """
    refuse_windows(config)
    return decoder_metadata(config, layer_norm=layer_norm) | rope_scaling(config)


def rotated_metadata(config: Config) -> dict[str, Any]:
    """Returns the metadata of the part of each head that is rotated."""
    part = rotary_parameters(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return {"rope.dimension_count": int(head_size(config) * part)}


def require_values(config: Config, **fixed: Any) -> None:
    """Refuses a config with other values than those with which llama.cpp always computes.

    Args:
        config: The content of ``config.json``.
        fixed: The values by key; a missing key is accepted.

    Raises:
        GgufError: The config has another value.
    """
    for key, value in fixed.items():
        if (found := config.get(key, value)) != value and not (value is None and not found):
            raise GgufError(
                f"llama.cpp always computes with {key} = {value} in this architecture.",
                where=key,
                why=f"it is {found!r}",
            )


def every_nth(num_layers: int, every: int) -> list[str]:
    """Returns the types of layers of which every n-th one has full attention, and the others a window."""
    return ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(num_layers)]


def read_windows(file: GgufFile, values: ArchitectureValues, num_layers: int) -> dict[str, Any]:
    """Returns the window of a config and which layers have it; by default every fourth one does not.

    Raises:
        GgufError: The file does not have a valid window or pattern.
    """
    pattern: Any = values.get("attention.sliding_window_pattern", 4)
    kinds = every_nth(min(num_layers, MOST_LAYERS), pattern) if type(pattern) is int and pattern > 0 else []
    if isinstance(pattern, list):
        kinds = ["sliding_attention" if local else "full_attention" for local in pattern]
    if len(kinds) != num_layers:
        raise GgufError(
            "The file does not say which layers have a sliding window.",
            where=f"{file.path}, {values.architecture}.attention.sliding_window_pattern",
        )
    return {"sliding_window": values.integer("attention.sliding_window"), "layer_types": kinds}


def window_metadata(config: Config) -> dict[str, Any]:
    """Inverts :func:`read_windows`."""
    return {
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
    }


def refuse_windows(config: Config) -> None:
    """Refuses a sliding window that llama.cpp would ignore.

    Raises:
        GgufError: The config has one.
    """
    if config.get("use_sliding_window"):
        raise GgufError("llama.cpp does not support sliding windows for this architecture.", where="sliding_window")


def decoder_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of matrices of a plain decoder."""
    return attention_sizes(config) | {"ffn_up": (config["intermediate_size"], config["hidden_size"])}


def attention_sizes(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the query and key projections."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    return {
        "attn_q": (config["num_attention_heads"] * head_dim, hidden),
        "attn_k": (config["num_key_value_heads"] * head_dim, hidden),
    }


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31
