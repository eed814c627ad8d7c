"""BERT: an encoder. Files have its layers and the head of a classifier, but not the one that predicts masked tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.family import Config, GgufFamily

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
    labels = values.get("classifier.output_labels")
    config: dict[str, Any] = {
        "hidden_size": values.integer("embedding_length"),
        "intermediate_size": values.integer("feed_forward_length"),
        "num_hidden_layers": values.integer("block_count"),
        "num_attention_heads": values.integer("attention.head_count"),
        "layer_norm_eps": values.number("attention.layer_norm_epsilon"),
        "max_position_embeddings": positions.shape[0],
        "type_vocab_size": types.shape[0],
    }
    if "cls.output.weight" in file.tensors and isinstance(labels, list):
        config["architectures"] = ["BertForSequenceClassification"]
        config["id2label"] = dict(enumerate(map(str, labels)))
        config["label2id"] = {name: number for number, name in config["id2label"].items()}
    return config


def _metadata(config: Config) -> dict[str, Any]:
    if config["hidden_act"] != "gelu" or config.get("is_decoder"):
        raise GgufError(
            "llama.cpp computes BERT as an encoder with GELU.",
            where="config.json",
            why=f"hidden_act is {config['hidden_act']!r}, is_decoder is {bool(config.get('is_decoder'))}",
        )
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        raise GgufError("A GGUF file cannot say that a text has several labels.", where="problem_type", fix="--to peft")
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_epsilon": float(config["layer_norm_eps"]),
        "attention.causal": False,
        "vocab_size": config["vocab_size"],
    }
    if "ForSequenceClassification" in (config.get("architectures") or [""])[0]:
        labels = [str(label) for label in config["id2label"].values()]
        values |= {"pooling_type": _RANK, "classifier.output_labels": labels}
    return values


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
