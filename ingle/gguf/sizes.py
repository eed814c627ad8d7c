"""Whether the metadata and the tensors of a GGUF file describe one model.

A model is built from the metadata alone.  Sizes that the tensors do not have are refused before that, because a model
of two billion layers takes all memory before the first missing weight is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import DAMAGED, GgufFile

_LAYER = re.compile(r"^blk\.(\d{1,9})\.")


def require_sizes(file: GgufFile, config: Mapping[str, Any]) -> None:
    """Compares the sizes of a config with the tensors that have them.

    Args:
        file: The file.
        config: What :func:`ingle.gguf.architecture.to_config` made of it.

    Raises:
        GgufError: When the file holds no weights, or those of a model of other sizes.
    """
    if "token_embd.weight" not in file.tensors:
        raise GgufError(
            f"{file.path.name} holds no model: its {len(file.tensors)} tensors have no token_embd.weight among them.",
            where=str(file.path),
            fix="choose a file that holds the weights, not the vocabulary or a part of the model",
        )
    num_layers = len({match[1] for name in file.tensors if (match := _LAYER.match(name))})
    if num_layers != config["num_hidden_layers"]:
        raise _disagree(file, "block_count", config["num_hidden_layers"], f"tensors of {num_layers} layers")
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    vocab_size = len(tokens) if isinstance(tokens, list) and tokens else config["vocab_size"]
    wanted = {
        "token_embd": (vocab_size, hidden),
        "blk.0.attn_q": (config["num_attention_heads"] * head_dim, hidden),
        "blk.0.attn_k": (config["num_key_value_heads"] * head_dim, hidden),
        "blk.0.ffn_up": (config["intermediate_size"], hidden),
    }
    for name, shape in wanted.items():
        tensor = file.tensors.get(f"{name}.weight")
        found = None if tensor is None else tensor.shape
        if found != shape:
            held = f"no {name}.weight" if found is None else f"{name}.weight of {list(found)}"
            raise _disagree(file, f"sizes that make {name}.weight", list(shape), held)


def _disagree(file: GgufFile, what: str, said: object, held: str) -> GgufError:
    return GgufError(
        f"The metadata and the tensors of {file.path.name} describe different models.",
        where=str(file.path),
        why=f"the metadata give {what} {said}; the file holds {held}",
        fix=DAMAGED,
    )
