"""Converts the parameters of rotary position embeddings between transformers and GGUF metadata.

Source: llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile

#: Tensor with the divisors of the rotary frequencies, which transformers stores in the config.
ROPE_FREQS = "rope_freqs.weight"

#: Tensors with such divisors for short and for long texts.
SHORT_FREQS, LONG_FREQS = "rope_factors_short.weight", "rope_factors_long.weight"
#: Every tensor of a file that is no parameter.
ROPE_TENSORS = (ROPE_FREQS, SHORT_FREQS, LONG_FREQS)

#: llama.cpp rounds the size of its context up to a multiple of this number of tokens.
CONTEXT_STEP = 256

#: Divisor of frequencies that do not rotate.
STILL = 1e30

#: Details of YaRN that llama.cpp has as constants.
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}

#: Parameters of Llama 3, whose scaling is stored in files only as divisors of the frequencies.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def head_size(config: Mapping[str, Any]) -> int:
    """Returns the number of features of a query head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotary_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary parameters in the layout of transformers 5, also for older configs."""
    if config.get("rope_parameters") is not None:
        return dict(config["rope_parameters"])
    scaling = dict(config.get("rope_scaling") or {})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    return {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)} | scaling


def rope_divisors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Returns ``rope_freqs.weight`` for a model with the scaling of Llama 3 or the proportions of Gemma 4, or None."""
    rope = rotary_parameters(config)
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") == "proportional":
        head_dim = max([head_size(config), *(each.get("head_dim", 0) for each in config["per_layer_config"].values())])
        num_rotated = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
        return np.where(np.arange(head_dim // 2) < num_rotated, 1.0, STILL).astype(np.float32)
    if rope.get("rope_type", "default") != "llama3":
        return None
    low, high, trained = (float(rope[key]) for key in _LLAMA3)
    return _llama3_divisors(head_size(config), float(rope["rope_theta"]), float(rope["factor"]), low, high, trained)


def rope_tensors(config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Returns the tensors of a file that transformers stores in the config, float32 ``[pairs]``."""
    divisors, rope = rope_divisors(config), rotary_parameters(config)
    if rope.get("rope_type") == "longrope":
        names = {SHORT_FREQS: "short_factor", LONG_FREQS: "long_factor"}
        return {name: np.array(rope[key], dtype=np.float32) for name, key in names.items()}
    return {} if divisors is None else {ROPE_FREQS: divisors}


def longrope_metadata(rope: Mapping[str, Any], longest: int, trained: int) -> dict[str, Any]:
    """Returns the metadata of a scaling with divisors for short and for long texts.

    Args:
        rope: The rotary parameters.
        longest: Tokens of the longest text.
        trained: Tokens of the longest text without the scaling.

    Raises:
        GgufError: llama.cpp has no context that is small enough for the divisors for short texts.
    """
    if trained < CONTEXT_STEP:
        raise GgufError(
            "llama.cpp cannot use the rotary divisors for short texts.",
            where="original_max_position_embeddings",
            why=f"they are for texts of up to {trained} tokens, and its smallest context is {CONTEXT_STEP}",
        )
    growth, found = float(rope.get("factor") or longest / trained), rope.get("attention_factor")
    default = math.sqrt(1 + math.log(growth) / math.log(trained)) if growth > 1 else 1.0
    return {
        "rope.scaling.attn_factor": default if found is None else float(found),
        "rope.scaling.original_context_length": trained,
    }


def read_longrope(file: GgufFile, values: ArchitectureValues, trained: int) -> dict[str, Any]:
    """Inverts :func:`longrope_metadata`; empty for a file without divisors for short and for long texts.

    Raises:
        GgufError: The file has only one of them.
    """
    tensors = [file.tensors.get(name) for name in (SHORT_FREQS, LONG_FREQS)]
    if not any(tensors):
        return {}
    found = [t.read().view(np.float32).reshape(-1).tolist() for t in tensors if t is not None and t.type_name == "f32"]
    if len(found) != len(tensors):
        raise GgufError(
            "The divisors of the rotary frequencies are incomplete.",
            where=str(file.path),
            why=f"{SHORT_FREQS} or {LONG_FREQS} is missing or not float32",
        )
    return {
        "rope_type": "longrope",
        "short_factor": found[0],
        "long_factor": found[1],
        "original_max_position_embeddings": trained,
        "attention_factor": values.number("rope.scaling.attn_factor", 1.0),
    }


def scaling_metadata(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of the scaling without the architecture's prefix; empty for Llama 3.

    Raises:
        GgufError: llama.cpp does not support the scaling.
    """
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn" and _is_plain_yarn(rope):
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }
    raise GgufError(f"Rotary scaling of type {kind!r} cannot be written to GGUF.", why=f"rope_parameters is {rope}")


def _is_plain_yarn(rope: Mapping[str, Any]) -> bool:
    """Returns whether llama.cpp derives every detail of a YaRN scaling as transformers does."""
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", *_YARN}
    scale = rope.get("attention_factor")
    derived = 0.1 * math.log(float(rope["factor"])) + 1.0
    return (
        not set(rope) - known
        and (scale is None or math.isclose(scale, derived, rel_tol=1e-4))
        and all(rope.get(key) in (None, value) for key, value in _YARN.items())
    )


def read_rotary(file: GgufFile, values: ArchitectureValues, head_dim: int) -> dict[str, Any]:
    """Returns ``rope_parameters`` of a config, by type of layer if there are local layers.

    Raises:
        GgufError: The scaling is not linear, YaRN or that of Llama 3.
    """
    theta = values.number("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = values.get("rope.scaling.type", "none")
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 1.0))
    if kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": values.integer("rope.scaling.original_context_length"),
        }
    elif kind not in ("none", "linear"):
        raise GgufError(f"Rotary scaling of type {kind!r} is not supported.", where=str(file.path))
    elif factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if ROPE_FREQS in file.tensors:
        rope |= _read_llama3(file, head_dim, theta)
    if values.get("rope.freq_base_swa") is None and values.architecture != "gemma3":
        return rope
    local = {"rope_type": "default", "rope_theta": values.number("rope.freq_base_swa", 10000.0)}
    return {"full_attention": rope, "sliding_attention": local}


def _read_llama3(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Recovers the scaling of Llama 3 from its divisors, the only part of it in the file."""
    tensor = file.tensors[ROPE_FREQS]
    if tensor.type_name == "f32" and tensor.shape == (head_dim // 2,):
        stored = tensor.read().view(np.float32).reshape(-1)
        factor = float(stored.max())
        if 0 < factor < math.inf:
            expected = _llama3_divisors(head_dim, theta, factor, *(float(value) for value in _LLAMA3.values()))
            if np.allclose(stored, expected, rtol=1e-3):
                return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise GgufError(
        "The scaling of the rotary frequencies is not that of Llama 3.",
        where=f"{file.path}, {ROPE_FREQS}",
        fix="use the model's safetensors release",
    )


def _llama3_divisors(
    head_dim: int, theta: float, factor: float, low: float, high: float, trained: float
) -> NDArray[np.float32]:
    """1 for short waves, ``factor`` for long ones, and a smooth transition in between."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    waves = 2 * math.pi / frequencies
    smooth = (trained / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(waves < trained / high, 1.0, np.where(waves > trained / low, factor, between))
    return divisors.astype(np.float32)
