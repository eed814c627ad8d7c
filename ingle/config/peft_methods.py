"""What each method of the PEFT library needs from the layers that it changes.

A test compares the table with the methods that PEFT has, so that a new one is not computed wrongly in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Method(NamedTuple):
    """A method of PEFT.

    Attributes:
        reads: What it reads of a layer's weight: ``nothing`` but its outputs, its ``shape``, or its ``values``.
        shares: Whether its layers share parameters or buffers.
        starts_elsewhere: Whether it begins at another function than the base.
    """

    reads: Literal["nothing", "shape", "values"] = "nothing"
    shares: bool = False
    starts_elsewhere: bool = False


_PLAIN, _SHAPE, _VALUES = Method(), Method("shape"), Method("values")

METHODS: Mapping[str, Method] = {
    **dict.fromkeys(("ADALORA", "BEFT", "BOFT", "GRALORA", "MISS", "OFT", "RANDLORA", "ROAD"), _PLAIN),
    "WAVEFT": _PLAIN,
    **dict.fromkeys(("C3A", "FOURIERFT"), Method(starts_elsewhere=True)),
    **dict.fromkeys(("PVERA", "VERA"), Method(shares=True)),
    **dict.fromkeys(("UNILORA", "VBLORA"), Method(shares=True, starts_elsewhere=True)),
    **dict.fromkeys(("LOHA", "LOKR"), _SHAPE),
    **dict.fromkeys(("DELORA", "GLORA", "HIRA", "PEANUT", "PSOFT", "SHIRA", "TINYLORA"), _VALUES),
    **dict.fromkeys(("DEFT", "HRA", "SUPERTUNING"), Method("values", starts_elsewhere=True)),
}

_OTHER_INPUTS = "it needs more than the texts of a run"
#: Methods that are refused, with the reason and what to use instead.
REFUSED: Mapping[str, tuple[str, str]] = {
    "LORA": ("Ingle computes LoRA itself", "--adapter.kind=lora, or dora"),
    "LN_TUNING": ("Ingle trains norms itself", "--adapter.kind=bitfit --adapter.norms --adapter.biases=false"),
    "IA3": ("Ingle computes IA3 itself", "--adapter.kind=ia3"),
    "PREFIX_TUNING": ("Ingle computes prefix tuning itself", "--adapter.kind=prefix"),
    "PROMPT_TUNING": ("Ingle computes prompt tuning itself", "--adapter.kind=prompt"),
    "P_TUNING": ("Ingle computes p-tuning itself", "--adapter.kind=prompt --adapter.encoder=mlp"),
    "CPT": (_OTHER_INPUTS, "--adapter.kind=prompt"),
    "CARTRIDGE": ("its virtual keys are those of prefix tuning", "--adapter.kind=prefix --adapter.init=tokens"),
    "MULTITASK_PROMPT_TUNING": (_OTHER_INPUTS, "--adapter.kind=prompt"),
    "ADAPTION_PROMPT": ("it replaces the attention layers of one architecture", "--adapter.kind=prefix"),
    "XLORA": (_OTHER_INPUTS, "--adapter.kind=lora"),
    "POLY": (_OTHER_INPUTS, "--adapter.kind=lora"),
    "SHADOW": ("it trains a second model", "--adapter.kind=bottleneck"),
    "ADAMSS": ("the sizes of its parameters follow from the weights", "--adapter.method=PSOFT"),
    "FROD": ("it replaces the weights of the layers", "--adapter.kind=lora --adapter.init=pissa"),
    "LILY": ("its layers mix the tokens of all texts that are computed together", "--adapter.kind=lora"),
    "OSF": ("it replaces the weights of the layers", "--adapter.kind=lora --adapter.init=pissa"),
    "TRAINABLE_TOKENS": (
        "it changes rows of the embedding",
        "--adapter.target_modules=none --adapter.trainable_modules=[embed_tokens]",
    ),
}
