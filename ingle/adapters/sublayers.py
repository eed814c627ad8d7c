"""Finds the attention and the MLP of every layer of a model, by the paths and sizes of their linear layers."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

from torch import nn

from ingle.adapters.linear import AdaptedLinear, features
from ingle.adapters.targets import linear_layers

#: The path of a layer: up to the first numbers.
_LAYER = re.compile(r"(.+?\.\d+(?:\.\d+)*)\.(.+)")
#: Parts of paths of what mixes tokens: attention, and what stands in its place.
_MIXER = re.compile(r"at+n|attention|mixer|mamba|temporal|recurrent|ssm|(^|\.)conv", re.IGNORECASE)
#: Names of the last linear layer of an attention; others may have as many outputs.
_OUTPUT = re.compile(r"(o|Wo|wo|o_lin|proj|dense|c_proj|post_proj|(.*_)?o(_[ab])?_proj|.*out(_proj|_lin)?|output.*)")
#: Parts of paths of feed-forward networks; some layers have further linear layers.
_MLP = re.compile(r"mlp|ffn|ff|feed_?forward|dense", re.IGNORECASE)


class Sublayer(NamedTuple):
    """The attention or the MLP of a layer.

    Attributes:
        kind: ``attention`` or ``mlp``.
        output: Path of its last linear layer, whose outputs are added to the hidden states.
        input: Path of its first linear layer, which reads what the sublayer reads; None if it has no other.
    """

    kind: str
    output: str
    input: str | None


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """Returns the sublayers of all layers that end in a linear layer, in the order of the model."""
    config: Any = getattr(model, "config", None)
    hidden = int(config.get_text_config().hidden_size)
    groups: dict[tuple[str, str, str], list[tuple[str, int, int]]] = defaultdict(list)
    for path, module in linear_layers(model).items():
        match = _LAYER.fullmatch(path)
        if match is None or "expert" in path:
            continue
        parts = match[2].split(".")
        if any(part.endswith("layernorm") for part in parts):  # some norms compute their factors
            continue
        mixer = next((".".join(parts[: end + 1]) for end, part in enumerate(parts) if _MIXER.search(part)), None)
        if mixer is None and _MIXER.search(match[1].split(".")[-2]):
            mixer = ""  # a list of attentions
        key = (match[1], "mlp", "") if mixer is None else (match[1], "attention", mixer)
        groups[key].append((path, *features(module.base if isinstance(module, AdaptedLinear) else module)))
    found = []
    for (_, kind, _), linears in groups.items():
        ends = [path for path, out_features, _ in linears if out_features == hidden and "intermediate" not in path]
        if kind == "attention":
            ends = [path for path in ends if any(_OUTPUT.fullmatch(part) for part in path.split(".")[-2:])]
        else:
            ends = [path for path in ends if any(_MLP.search(part) for part in path.split("."))] or ends
        if ends:
            output = ends[-1]
            starts = [path for path, _, in_features in linears if in_features == hidden and path != output]
            found.append(Sublayer(kind, output, starts[0] if starts else None))
    return found


def mixtures(model: nn.Module) -> list[str]:
    """Returns the modules that hold experts, whose outputs are mixed for each token."""
    return [
        name for name, module in model.named_modules() if name.rpartition(".")[2] in ("experts", "block_sparse_moe")
    ]
