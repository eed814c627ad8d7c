"""Mamba 1 and 2, and what other families share with Mamba 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.family import Change, Config, GgufFamily, Rule, negative_exp, squeeze

_TOP = {"backbone.embeddings": "token_embd", "backbone.norm_f": "output_norm", "lm_head": "output"}
#: llama.cpp's converter writes this context for models without a limit.
_CONTEXT = 2**20


def mamba2_layer(path: str) -> dict[str, str]:
    """Returns the tensors of a Mamba 2 mixer at a path."""
    return {
        f"{path}.in_proj": "ssm_in",
        f"{path}.conv1d": "ssm_conv1d",
        f"{path}.norm": "ssm_norm",
        f"{path}.out_proj": "ssm_out",
    }


def mamba2_parameters(path: str) -> dict[str, tuple[str, ...]]:
    """Returns the tensors of a Mamba 2 mixer that are not named after a module."""
    return {f"{path}.A_log": ("ssm_a",), f"{path}.D": ("ssm_d",), f"{path}.dt_bias": ("ssm_dt.bias",)}


def mamba2_rules(path: str, groups: str) -> dict[str, Rule]:
    """Returns the rules of a Mamba 2 mixer.

    Args:
        path: Its path in a layer.
        groups: The key of the config with the number of groups.
    """

    def column(config: Config, shape: tuple[int, ...]) -> Change:
        return Change(shape=(shape[0], 1))

    def grouped(config: Config, shape: tuple[int, ...]) -> Change:
        return Change(shape=(config[groups], shape[0] // config[groups]))

    return {
        f"{path}.conv1d.weight": squeeze,
        f"{path}.A_log": lambda config, shape: Change(is_negative_exp=True, shape=(shape[0], 1)),
        f"{path}.D": column,
        f"{path}.norm": grouped,
    }


def ssm_metadata(*, heads: int, inner: int, state: int, groups: int, kernel: int) -> dict[str, Any]:
    """Returns the metadata of Mamba 2 mixers and of gated delta rules."""
    return {
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }


def read_mamba2(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    """Returns the part of a config about Mamba 2 mixers in layers with other modules."""
    inner, heads = values.integer("ssm.inner_size"), values.integer("ssm.time_step_rank")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": values.integer("ssm.group_count"),
        "mamba_d_state": values.integer("ssm.state_size"),
        "mamba_d_conv": values.integer("ssm.conv_kernel"),
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in file.tensors),
        "mamba_proj_bias": any(name.endswith("ssm_in.bias") for name in file.tensors),
    }


def mamba2_metadata(config: Config) -> dict[str, Any]:
    """Inverts :func:`read_mamba2`."""
    return ssm_metadata(
        heads=config["mamba_n_heads"],
        inner=config["mamba_n_heads"] * config["mamba_d_head"],
        state=config["mamba_d_state"],
        groups=config["mamba_n_groups"],
        kernel=config["mamba_d_conv"],
    )


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    hidden, inner = values.integer("embedding_length"), values.integer("ssm.inner_size")
    if inner % hidden:
        raise GgufError(f"Mixers of {inner} features in a model of {hidden} are not supported.", where=str(file.path))
    return {
        "hidden_size": hidden,
        "num_hidden_layers": values.integer("block_count"),
        "layer_norm_epsilon": values.number("attention.layer_norm_rms_epsilon"),
        "expand": inner // hidden,
        "state_size": values.integer("ssm.state_size"),
        "conv_kernel": values.integer("ssm.conv_kernel"),
        "use_conv_bias": "blk.0.ssm_conv1d.bias" in file.tensors,
        "use_bias": "blk.0.ssm_in.bias" in file.tensors,
    }


def _read_mamba(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    if values.get("ssm.dt_b_c_rms"):
        raise GgufError("FalconMamba, Mamba with norms in its mixers, is not supported.", where=str(file.path))
    return _read(file, values) | {"time_step_rank": values.integer("ssm.time_step_rank")}


def _read_mamba2(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config, heads = _read(file, values), values.integer("ssm.time_step_rank")
    head_dim = values.integer("ssm.inner_size") // heads
    return config | {"num_heads": heads, "head_dim": head_dim, "n_groups": values.integer("ssm.group_count")}


def _common_metadata(config: Config) -> dict[str, Any]:
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": _CONTEXT,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        "vocab_size": config["vocab_size"],
    }


def _mamba_metadata(config: Config) -> dict[str, Any]:
    return _common_metadata(config) | {
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.inner_size": config["expand"] * config["hidden_size"],
        "ssm.state_size": config["state_size"],
        "ssm.time_step_rank": config["time_step_rank"],
    }


def _mamba2_metadata(config: Config) -> dict[str, Any]:
    return _common_metadata(config) | ssm_metadata(
        heads=config["num_heads"],
        inner=config["num_heads"] * config["head_dim"],
        state=config["state_size"],
        groups=config["n_groups"],
        kernel=config["conv_kernel"],
    )


def _mamba_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    inner = config["expand"] * config["hidden_size"]
    return {"ssm_in": (2 * inner, config["hidden_size"]), "ssm_conv1d": (inner, config["conv_kernel"])}


def _mamba2_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    inner, groups = config["num_heads"] * config["head_dim"], config["n_groups"] * config["state_size"]
    return {"ssm_in": (2 * inner + 2 * groups + config["num_heads"], config["hidden_size"])}


MAMBA = GgufFamily(
    architecture="mamba",
    model_type="mamba",
    class_name="MambaForCausalLM",
    read_config=_read_mamba,
    write_metadata=_mamba_metadata,
    layer={
        "norm": "attn_norm",
        "mixer.in_proj": "ssm_in",
        "mixer.conv1d": "ssm_conv1d",
        "mixer.x_proj": "ssm_x",
        "mixer.dt_proj": "ssm_dt",
        "mixer.out_proj": "ssm_out",
    },
    parameters={"mixer.A_log": ("ssm_a",), "mixer.D": ("ssm_d",)},
    rules={"mixer.conv1d.weight": squeeze, "mixer.A_log": negative_exp},
    sizes=_mamba_sizes,
    top=_TOP,
    decoder="backbone",
)
MAMBA2 = GgufFamily(
    architecture="mamba2",
    model_type="mamba2",
    class_name="Mamba2ForCausalLM",
    read_config=_read_mamba2,
    write_metadata=_mamba2_metadata,
    layer={"norm": "attn_norm"} | mamba2_layer("mixer"),
    parameters=mamba2_parameters("mixer"),
    rules=mamba2_rules("mixer", "n_groups"),
    sizes=_mamba2_sizes,
    top=_TOP,
    decoder="backbone",
)
