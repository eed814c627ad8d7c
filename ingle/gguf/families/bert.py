"""BERT, Nomic BERT and ModernBERT: encoders.

Files have their layers, but not the head that predicts masked tokens. Those of BERT and ModernBERT have the head of a
classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import MOST_LAYERS, require_values
from ingle.gguf.families.family import Config, GgufFamily
from ingle.gguf.rotary import rotary_parameters
from ingle.gguf.special_tokens import special_token_id

#: llama.cpp's pooling of classifiers: the pooler and the output layer run on the first token.
_RANK = 4


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    positions, types = file.tensors.get("position_embd.weight"), file.tensors.get("token_types.weight")
    if positions is None or types is None or "blk.0.attn_q.weight" not in file.tensors:
        raise GgufError(
            "Encoders without token types, without learned positions or with fused projections are not supported.",
            where=str(file.path),
            why="the file has no position_embd.weight, no token_types.weight or no blk.0.attn_q.weight",
        )
    if values.get("attention.causal", False):
        raise GgufError("BERT with causal attention is not supported.", where="bert.attention.causal")
    return (
        _read_sizes(values)
        | {
            "max_position_embeddings": positions.shape[0],
            "type_vocab_size": types.shape[0],
        }
        | _read_labels(file, values, "BertForSequenceClassification")
    )


def _read_sizes(values: ArchitectureValues, *, epsilon: str = "layer_norm_eps") -> dict[str, Any]:
    """Returns the part of a config that encoders share; ``epsilon`` is the key of the config with that of norms."""
    return {
        "hidden_size": values.integer("embedding_length"),
        "intermediate_size": values.integer("feed_forward_length"),
        "num_hidden_layers": values.integer("block_count"),
        "num_attention_heads": values.integer("attention.head_count"),
        epsilon: values.number("attention.layer_norm_epsilon"),
    }


def _read_labels(file: GgufFile, values: ArchitectureValues, class_name: str) -> dict[str, Any]:
    """Returns the part of a config about the labels of a classifier; empty for a file without one."""
    labels = values.get("classifier.output_labels")
    if "cls.output.weight" not in file.tensors or not isinstance(labels, list):
        return {}
    names = dict(enumerate(map(str, labels)))
    return {
        "architectures": [class_name],
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
    }


def _metadata(config: Config) -> dict[str, Any]:
    if config["hidden_act"] != "gelu" or config.get("is_decoder"):
        raise GgufError(
            "llama.cpp computes BERT as an encoder with GELU.",
            where="config.json",
            why=f"hidden_act is {config['hidden_act']!r}, is_decoder is {bool(config.get('is_decoder'))}",
        )
    return _size_metadata(config) | _label_metadata(config)


def _size_metadata(config: Config, *, epsilon: str = "layer_norm_eps") -> dict[str, Any]:
    """Inverts :func:`_read_sizes`."""
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_epsilon": float(config[epsilon]),
        "attention.causal": False,
        "vocab_size": config["vocab_size"],
    }


def _label_metadata(config: Config) -> dict[str, Any]:
    """Inverts :func:`_read_labels`.

    Raises:
        GgufError: A text can have several labels.
    """
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        raise GgufError("A GGUF file cannot say that a text has several labels.", where="problem_type", fix="--to peft")
    if "ForSequenceClassification" in (config.get("architectures") or [""])[0]:
        return {"pooling_type": _RANK, "classifier.output_labels": [str(each) for each in config["id2label"].values()]}
    return {}


def _sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    return {"attn_q": (hidden, hidden), "ffn_up": (config["intermediate_size"], hidden)}


BERT = GgufFamily(
    architecture="bert",
    model_type="bert",
    class_name="BertModel",
    read_config=_read,
    write_metadata=_metadata,
    layer={
        "attention.self.query": "attn_q",
        "attention.self.key": "attn_k",
        "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output",
        "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up",
        "output.dense": "ffn_down",
        "output.LayerNorm": "layer_output_norm",
    },
    sizes=_sizes,
    top={
        "bert.embeddings.word_embeddings": "token_embd",
        "bert.embeddings.position_embeddings": "position_embd",
        "bert.embeddings.token_type_embeddings": "token_types",
        "bert.embeddings.LayerNorm": "token_embd_norm",
        "bert.pooler.dense": "cls",
        "classifier": "cls.output",
    },
    decoder="bert",
    layers="encoder.layer",
    left_out=("cls.",),
)


def _read_nomic(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    types = file.tensors.get("token_types.weight")
    if types is None or "blk.0.attn_q.weight" not in file.tensors:
        raise GgufError(
            "Nomic BERT without token types or with fused projections is not supported.",
            where=str(file.path),
            why="the file has no token_types.weight or no blk.0.attn_q.weight",
        )
    return _read_sizes(values) | {
        "max_position_embeddings": values.integer("context_length"),
        "type_vocab_size": types.shape[0],
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": values.number("rope.freq_base", 10000.0)},
    }


def _nomic_metadata(config: Config) -> dict[str, Any]:
    rope = rotary_parameters(config)
    require_values(config, hidden_act="silu")
    require_values(rope, rope_type="default")
    return _size_metadata(config) | {"rope.freq_base": float(rope["rope_theta"])}


NOMIC_BERT = GgufFamily(
    architecture="nomic-bert",
    model_type="nomic_bert",
    class_name="NomicBertModel",
    read_config=_read_nomic,
    write_metadata=_nomic_metadata,
    layer={
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "attn_output_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_mlp_layernorm": "layer_output_norm",
    },
    sizes=_sizes,
    top={
        "nomic_bert.embeddings.word_embeddings": "token_embd",
        "nomic_bert.embeddings.token_type_embeddings": "token_types",
        "nomic_bert.embeddings.LayerNorm": "token_embd_norm",
    },
    decoder="nomic_bert",
    left_out=("cls.", "nomic_bert.pooler."),
)

#: llama.cpp's numbers of what a classifier of ModernBERT reads.
_POOLINGS = {"mean": 1, "cls": 2}
_WINDOW = "attention.sliding_window"


def _read_modern(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = _read_sizes(values, epsilon="norm_eps")
    num_layers = config["num_hidden_layers"]
    pattern: Any = values.get(f"{_WINDOW}_pattern", 3)
    if type(pattern) is int and pattern > 0:  # the first layer of each group has full attention
        pattern = [layer % pattern > 0 for layer in range(min(num_layers, MOST_LAYERS))]
    if not isinstance(pattern, list) or len(pattern) != num_layers:
        raise GgufError("The file does not say which layers have a window.", where=f"{file.path}, {_WINDOW}_pattern")
    thetas = {"full_attention": "rope.freq_base", "sliding_attention": "rope.freq_base_swa"}
    pooling = values.integer("classifier.pooling_type", _POOLINGS["mean"])
    return (
        config
        | {
            "max_position_embeddings": values.integer("context_length"),
            "local_attention": values.integer(_WINDOW),
            "cls_token_id": special_token_id(file.metadata, "cls"),
            "sep_token_id": special_token_id(file.metadata, "seperator"),
            "layer_types": ["sliding_attention" if local else "full_attention" for local in pattern],
            "hidden_activation": values.get("hidden_activation", "gelu"),
            "classifier_pooling": next((name for name, number in _POOLINGS.items() if number == pooling), "cls"),
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": values.number(key, 10000.0)}
                for kind, key in thetas.items()
            },
        }
        | _read_labels(file, values, "ModernBertForSequenceClassification")
    )


def _modern_metadata(config: Config) -> dict[str, Any]:
    off = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), False)
    require_values(config, classifier_activation="gelu", **off)
    activation, rope = config["hidden_activation"], rotary_parameters(config)
    if activation not in ("gelu", "silu"):
        require_values(config, hidden_activation="gelu")
    return (
        _size_metadata(config, epsilon="norm_eps")
        | _label_metadata(config)
        | {
            _WINDOW: config["local_attention"],
            f"{_WINDOW}_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
            "hidden_activation": activation,
            "classifier.pooling_type": _POOLINGS[config["classifier_pooling"]],
            "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
            "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        }
    )


def _modern_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    return {"attn_qkv": (3 * hidden, hidden), "ffn_up": (2 * config["intermediate_size"], hidden)}


MODERN_BERT = GgufFamily(
    architecture="modern-bert",
    model_type="modernbert",
    class_name="ModernBertModel",
    read_config=_read_modern,
    write_metadata=_modern_metadata,
    layer={
        "attn_norm": "attn_norm",
        "attn.Wqkv": "attn_qkv",
        "attn.Wo": "attn_output",
        "mlp_norm": "ffn_norm",
        "mlp.Wi": "ffn_up",
        "mlp.Wo": "ffn_down",
    },
    sizes=_modern_sizes,
    top={
        "model.embeddings.tok_embeddings": "token_embd",
        "model.embeddings.norm": "token_embd_norm",
        "model.final_norm": "output_norm",
        "head.dense": "cls",
        "head.norm": "cls.norm",
        "classifier": "cls.output",
    },
    left_out=("decoder.",),
)
