"""Command R and its second generation: attention and feed-forward network in parallel, after one layer norm."""

from __future__ import annotations

from typing import Any

from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import (
    ATTENTION,
    FEED_FORWARD,
    decoder_metadata,
    decoder_sizes,
    read_decoder,
    read_windows,
    require_values,
    rope_scaling,
    window_metadata,
)
from ingle.gguf.families.family import Config, GgufFamily
from ingle.gguf.rotary import head_size

_EPSILON = "layer_norm_eps"
#: Command R+ has this number of layers, and norms of queries and keys that are not supported.
_PLUS = 64


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return read_decoder(file, values, layer_norm=_EPSILON) | {"logit_scale": values.number("logit_scale")}


def _metadata(config: Config) -> dict[str, Any]:
    require_values(config, attention_bias=False, hidden_act="silu")
    return (
        decoder_metadata(config, layer_norm=_EPSILON)
        | rope_scaling(config)
        | {"logit_scale": float(config["logit_scale"]), "rope.dimension_count": head_size(config)}
    )


def _command_r_metadata(config: Config) -> dict[str, Any]:
    require_values(config, use_qk_norm=False)
    if config["num_hidden_layers"] >= _PLUS:
        require_values(config, num_hidden_layers=f"less than {_PLUS}")
    return _metadata(config)


COMMAND_R = GgufFamily(
    architecture="command-r",
    model_type="cohere",
    class_name="CohereForCausalLM",
    read_config=_read,
    write_metadata=_command_r_metadata,
    layer=ATTENTION | FEED_FORWARD,
    sizes=decoder_sizes,
    is_tied=True,
)
COHERE2 = GgufFamily(
    architecture="cohere2",
    model_type="cohere2",
    class_name="Cohere2ForCausalLM",
    read_config=lambda file, values: _read(file, values) | read_windows(file, values, values.integer("block_count")),
    write_metadata=lambda config: _metadata(config) | window_metadata(config),
    layer=ATTENTION | FEED_FORWARD,
    sizes=decoder_sizes,
    is_tied=True,
)
