"""The modules of each architecture: names and sizes of a layer's parts, from a ``config.json``.

A test compares every entry with the modules that transformers builds from the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ingle.errors import ModelError
from ingle.planning.shape import LayerShape, LinearShape, Mixer

#: Architectures that Ingle's fused layers know; :mod:`ingle.adapters.fusion` checks each layer.
FUSED = ("llama", "mistral", "qwen2", "qwen3")

_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
#: Settings that a ``config.json`` may leave out, with transformers' defaults.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 128},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "sliding_window": 4096},
    "gemma3_text": {**_GEMMA, "sliding_window": 4096},
    "cohere": {"tie_word_embeddings": True},
    "gpt_oss": {"head_dim": 64, "attention_bias": True, "sliding_window": 128},
    "glm4": {"head_dim": 128, "attention_bias": True},
    "smollm3": {"tie_word_embeddings": True},
    "starcoder2": {"tie_word_embeddings": True, "use_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "phi": {"hidden_act": "gelu_new"},
    "gpt2": {"tie_word_embeddings": True, "activation_function": "gelu_new"},
    "gpt_neox": {"hidden_act": "gelu", "attention_bias": True},
    "bert": {"tie_word_embeddings": True, "hidden_act": "gelu"},
    "roberta": {"tie_word_embeddings": True, "hidden_act": "gelu"},
    "t5": {"tie_word_embeddings": True, "relative_attention_num_buckets": 32, "feed_forward_proj": "relu"},
    "qwen2_moe": {"decoder_sparse_step": 1, "num_experts": 60, "num_experts_per_tok": 4},
    "qwen3_moe": {"decoder_sparse_step": 1, "num_experts": 128, "num_experts_per_tok": 8},
    "qwen3_next": {"decoder_sparse_step": 1, "num_experts": 512, "num_experts_per_tok": 10},
    "fnet": {"num_attention_heads": 1},
    "mamba": {"num_attention_heads": 1},
    "mamba2": {"state_size": 128, "n_groups": 8, "conv_kernel": 4, "use_conv_bias": True, "use_bias": False},
}

#: Names of the number of query heads.
HEADS = ("num_attention_heads", "encoder_attention_heads", "n_head", "num_heads")


class Settings:
    """The content of a ``config.json``, with the defaults of its architecture."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model_type = str(config.get("model_type", ""))
        present = {key: value for key, value in config.items() if value is not None}
        self._values = {**DEFAULTS.get(self.model_type, {}), **present}
        if config.get("sliding_window", 0) is None:  # null switches the window off
            self._values["sliding_window"] = 0

    def get(self, *names: str, default: Any = None) -> Any:
        """Returns the first of the settings that is present."""
        return next((self._values[name] for name in names if name in self._values), default)

    def size(self, *names: str, default: int | None = None) -> int:
        """Returns a size.

        Raises:
            ModelError: It is missing or no size.
        """
        value = self.get(*names, default=default)
        if type(value) is not int or value < 0:
            raise ModelError(
                f"config.json has no usable {names[0]}.",
                where=names[0],
                why=f"it is {value!r}",
                fix="compare config.json with the model's page on the hub",
            )
        return value

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.size("hidden_size", "n_embd", "d_model")

    @property
    def heads(self) -> int:
        """Query heads."""
        return max(1, self.size(*HEADS))

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.size("num_key_value_heads", default=self.heads)

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.size("head_dim", "d_kv", default=self.hidden // self.heads)

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward part."""
        return self.size("intermediate_size", "encoder_ffn_dim", "n_inner", "d_ff", default=4 * self.hidden)

    @property
    def num_layers(self) -> int:
        """Layers of the stack."""
        return self.size("num_hidden_layers", "n_layer", "num_layers")

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return str(self.get("hidden_activation", "hidden_act", "activation_function", "dense_act_fn", default="silu"))


@dataclass(frozen=True, slots=True)
class Block:
    """One layer with the paths of its parts.

    Attributes:
        path: Its path in the model.
        shape: Its shape, without adapters.
        others: Parameters of its other modules, by path within the layer.
    """

    path: str
    shape: LayerShape
    others: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Family:
    """How the layers of Llama's relatives differ.

    Attributes:
        qkv_bias: Whether query, key and value have biases, or the setting that says so.
        o_bias: The same for the output of attention.
        mlp_bias: The same for the feed-forward part.
        norms: Names of the norms over the hidden state.
        norm: ``rms``, ``layer`` (with bias) or ``scale`` (a layer norm without bias).
        head_norms: Whether queries and keys are normalized: per ``head``, or over their full ``width``.
        attention: Names of the linear layers of attention; the first of two is fused.
        mlp: Names of the feed-forward part: gate, up and down, or up and down; ``gate_up_proj`` is fused.
        experts: Name of the router if layers have experts.
        refused: Settings for which the entry is wrong; such a model is counted by building it.
    """

    qkv_bias: bool | str = "attention_bias"
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm: Literal["rms", "layer", "scale"] = "rms"
    head_norms: Literal["", "head", "width"] = ""
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    experts: str = ""
    refused: Mapping[str, Any] = field(default_factory=dict)


_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_FUSED_MLP = ("gate_up_proj", "down_proj")
#: Families by ``model_type``.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(False, False, False),
    "qwen2": Family(True, False, False),
    "qwen3": Family(mlp_bias=False, head_norms="head"),
    "gemma": Family(mlp_bias=False),
    "gemma2": Family(mlp_bias=False, norms=_GEMMA_NORMS),
    "gemma3_text": Family(mlp_bias=False, norms=_GEMMA_NORMS, head_norms="head"),
    "phi3": Family(False, False, False, attention=("qkv_proj", "o_proj"), mlp=_FUSED_MLP),
    "olmo2": Family(
        mlp_bias=False, norms=("post_attention_layernorm", "post_feedforward_layernorm"), head_norms="width"
    ),
    "smollm3": Family(),
    "granite": Family(),
    "glm4": Family(
        o_bias=False,
        mlp_bias=False,
        norms=("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
        mlp=_FUSED_MLP,
    ),
    "starcoder2": Family("use_bias", "use_bias", "use_bias", norm="layer", mlp=("c_fc", "c_proj")),
    "stablelm": Family(
        "use_qkv_bias", False, False, norm="layer", refused={"qk_layernorm": True, "use_parallel_residual": True}
    ),
    "cohere": Family(mlp_bias=False, norms=("input_layernorm",), norm="scale", refused={"use_qk_norm": True}),
    "phi": Family(
        True,
        True,
        True,
        norms=("input_layernorm",),
        norm="layer",
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        mlp=("fc1", "fc2"),
        refused={"qk_layernorm": True},
    ),
    "mixtral": Family(False, False, False, experts="gate"),
    "qwen2_moe": Family("qkv_bias", False, False, experts="gate"),
    "qwen3_moe": Family(mlp_bias=False, head_norms="head", experts="gate"),
    "qwen3_next": Family(mlp_bias=False, head_norms="head", experts="gate"),
    "gpt_oss": Family(mlp_bias=False, experts="router"),
}
#: One of so many layers has full attention, and the others a window or a state; for settings without ``layer_types``.
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "qwen3_next": 4}


def mixer_of(config: Mapping[str, Any], index: int) -> tuple[Mixer, int]:
    """Returns how a layer mixes tokens, and its window.

    Args:
        config: The content of ``config.json``, or ``config.to_dict()``.
        index: Number of the layer.
    """
    settings = Settings(config)
    if settings.model_type.startswith(("mamba", "falcon_mamba", "rwkv")):
        return "recurrent", 0
    types = settings.get("layer_types", "layers_block_type")
    window = settings.size("sliding_window", default=0)
    every = _FULL_EVERY.get(settings.model_type)
    if settings.model_type == "gemma3_text":
        every = settings.size("sliding_window_pattern", "_sliding_window_pattern", default=6)
    if types and index < len(types):
        kind = str(types[index])
    elif every is not None:
        other = "linear_attention" if settings.model_type == "qwen3_next" else "sliding_attention"
        kind = "full_attention" if (index + 1) % every == 0 else other
    elif settings.model_type in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"):
        slides = settings.get("use_sliding_window", default=False)
        kind = (
            "sliding_attention" if slides and index >= settings.size("max_window_layers", default=28) else "attention"
        )
    else:
        kind = "sliding_attention" if window else "full_attention"
    if kind in ("sliding_attention", "local_attention"):
        return "sliding_attention", window
    return ("full_attention", 0) if kind in ("full_attention", "attention") else ("recurrent", 0)


def decoder_block(settings: Settings, family: Family, config: Mapping[str, Any], index: int) -> Block:
    """Returns a layer of one of Llama's relatives."""
    mixer, window = mixer_of(config, index)
    others = {name: _norm_size(family, settings.hidden) for name in family.norms}
    linears = _delta_net(settings, others) if mixer == "recurrent" else _attention(settings, family, others)
    is_sparse = bool(family.experts) and _is_sparse(settings, index)
    linears += _experts(settings, family, others) if is_sparse else _mlp(settings, family, "mlp", settings.inner)
    shape = LayerShape(
        tuple(linears),
        other_parameters=sum(others.values()) + sum(lin.out_features for lin in linears if lin.bias),
        mixer=mixer,
        num_heads=settings.heads,
        num_kv_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        window=window,
        num_norms=len(family.norms),
        head_norms=bool(family.head_norms) and mixer != "recurrent",
        norm="rms" if family.norm == "rms" else "layer",
        activation=settings.activation,
        gated=len(family.mlp) == 3 or family.mlp == _FUSED_MLP,
        num_experts=_num_experts(settings) if is_sparse else 0,
        experts_per_token=settings.size("num_experts_per_tok", default=1) if is_sparse else 0,
    )
    return Block(f"model.layers.{index}", shape, others)


def _norm_size(family: Family, width: int) -> int:
    return 2 * width if family.norm == "layer" else width


def _says(settings: Settings, bias: bool | str) -> bool:
    return bool(settings.get(bias, default=bias == "qkv_bias")) if isinstance(bias, str) else bias


def _attention(settings: Settings, family: Family, others: dict[str, int]) -> list[LinearShape]:
    hidden, size = settings.hidden, settings.head_dim
    queries, keys = settings.heads * size, settings.kv_heads * size
    bias = _says(settings, family.qkv_bias)
    gate = 2 if settings.model_type == "qwen3_next" else 1  # queries come with a gate of the output
    *inputs, output = (f"self_attn.{name}" for name in family.attention)
    widths = [queries + 2 * keys] if len(inputs) == 1 else [gate * queries, keys, keys]
    linears = [LinearShape(hidden, width, name=name, bias=bias) for name, width in zip(inputs, widths, strict=True)]
    linears.append(LinearShape(queries, hidden, name=output, bias=_says(settings, family.o_bias)))
    if family.head_norms:
        others["self_attn.q_norm"] = size if family.head_norms == "head" else queries
        others["self_attn.k_norm"] = size if family.head_norms == "head" else keys
    if settings.model_type == "gpt_oss":
        others["self_attn"] = settings.heads  # sinks
    return linears


def _mlp(settings: Settings, family: Family, path: str, inner: int) -> list[LinearShape]:
    bias, hidden = _says(settings, family.mlp_bias), settings.hidden
    *ups, down = (f"{path}.{name}" for name in family.mlp)
    width = 2 * inner if family.mlp == _FUSED_MLP else inner
    return [
        *(LinearShape(hidden, width, name=name, bias=bias) for name in ups),
        LinearShape(inner, hidden, name=down, bias=bias),
    ]


def _num_experts(settings: Settings) -> int:
    return settings.size("num_experts", "num_local_experts")


def _is_sparse(settings: Settings, index: int) -> bool:
    step = settings.size("decoder_sparse_step", default=1)
    return index not in settings.get("mlp_only_layers", default=()) and step > 0 and (index + 1) % step == 0


def _experts(settings: Settings, family: Family, others: dict[str, int]) -> list[LinearShape]:
    hidden, count = settings.hidden, _num_experts(settings)
    inner = settings.size("moe_intermediate_size", default=settings.inner)
    active = min(count, settings.size("num_experts_per_tok", default=1))
    others[f"mlp.{family.experts}"] = count * hidden + (count if settings.model_type == "gpt_oss" else 0)
    if settings.model_type == "gpt_oss":
        others["mlp.experts"] = count * (2 * inner + hidden)  # biases
    linears = [
        LinearShape(hidden, 2 * inner, count, active, name="mlp.experts.gate_up_proj"),
        LinearShape(inner, hidden, count, active, name="mlp.experts.down_proj"),
    ]
    shared = settings.size("shared_expert_intermediate_size", default=0)
    if shared:
        linears += _mlp(settings, family, "mlp.shared_expert", shared)
        linears.append(LinearShape(hidden, 1, name="mlp.shared_expert_gate"))
    return linears


def _delta_net(settings: Settings, others: dict[str, int]) -> list[LinearShape]:
    """Returns the linear attention of Qwen3-Next (Gated DeltaNet)."""
    hidden, heads = settings.hidden, settings.size("linear_num_value_heads")
    keys = settings.size("linear_num_key_heads") * settings.size("linear_key_head_dim")
    values = heads * settings.size("linear_value_head_dim")
    others["linear_attn"] = 2 * heads  # A_log and dt_bias
    others["linear_attn.conv1d"] = (2 * keys + values) * settings.size("linear_conv_kernel_dim", default=4)
    others["linear_attn.norm"] = settings.size("linear_value_head_dim")
    return [
        LinearShape(hidden, 2 * keys + 2 * values, name="linear_attn.in_proj_qkvz"),
        LinearShape(hidden, 2 * heads, name="linear_attn.in_proj_ba"),
        LinearShape(values, hidden, name="linear_attn.out_proj"),
    ]
