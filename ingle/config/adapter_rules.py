"""Invalid combinations of the options of adapters."""

from __future__ import annotations

from ingle.config.adapter import READS_DATA, LowRankAdapter, WeightAdapter
from ingle.config.adapter_kinds import BitfitAdapter, BottleneckAdapter, PeftAdapter, PrefixAdapter, PromptAdapter
from ingle.config.objective import samples_answers
from ingle.config.peft_methods import METHODS, REFUSED, Method
from ingle.config.rule import Rule
from ingle.config.run import Run
from ingle.wording import nearest


def _odd_ranks(run: Run) -> list[int]:
    """Returns the odd ranks of an orthogonal start, whose halves must be equal."""
    adapter = run.adapter
    if not isinstance(adapter, WeightAdapter) or adapter.init != "orthogonal":
        return []
    return sorted({rank for rank in (adapter.rank, *adapter.rank_pattern.values()) if rank % 2})


def _rounds(run: Run) -> bool:
    """Returns whether weights are quantized while they are loaded."""
    return run.base.format != "none" and not run.model.id.lower().endswith(".gguf") and run.model.init != "random"


def _text_inits(run: Run) -> tuple[bool, bool]:
    """Returns whether virtual tokens begin as a text, and whether a text is given."""
    adapter = run.adapter
    if not isinstance(adapter, PrefixAdapter | PromptAdapter):
        return False, False
    return adapter.init in ("tokens", "text"), adapter.init_text is not None


def _method(run: Run) -> Method | None:
    """Returns what a method of PEFT needs; None for other adapters."""
    return METHODS.get(run.adapter.method) if isinstance(run.adapter, PeftAdapter) else None


def _is_quantized(run: Run) -> bool:
    return run.base.format != "none" or run.model.id.lower().endswith(".gguf")


def _unknown_method(run: Run) -> str:
    """Returns what is wrong with a method of PEFT that cannot be used."""
    if not isinstance(run.adapter, PeftAdapter) or run.adapter.method in METHODS:
        return ""
    name = run.adapter.method
    if name in REFUSED:
        return f"PEFT's {name} is not used here: {REFUSED[name][0]}."
    return f"{name!r} is not a method of PEFT that Ingle knows."


def _other_method(run: Run) -> str:
    name = getattr(run.adapter, "method", "")
    if name in REFUSED:
        return REFUSED[name][1]
    close = nearest(name, sorted(METHODS))
    return f"--adapter.method={close}" if close else f"--adapter.method=NAME with one of {', '.join(sorted(METHODS))}"


ADAPTER_RULES: tuple[Rule[Run], ...] = (
    Rule(
        "orthogonal-is-even",
        lambda run: bool(_odd_ranks(run)),
        lambda run: f"init = orthogonal needs even ranks, unlike {', '.join(map(str, _odd_ranks(run)))}.",
        "adapter.init, adapter.rank, adapter.rank_pattern",
        "an even rank, or --adapter.init=kaiming",
    ),
    Rule(
        "loftq-gives-back-what-was-rounded",
        lambda run: isinstance(run.adapter, WeightAdapter) and run.adapter.init == "loftq" and not _rounds(run),
        "init = loftq gives back what quantization takes from the weights, which this run does not quantize.",
        "adapter.init, base.format, model.id",
        ("adapter.init=pissa", "base.format=nf4"),
    ),
    Rule(
        "initial-values-read-given-data",
        lambda run: (
            isinstance(run.adapter, WeightAdapter)
            and run.adapter.init in READS_DATA
            and samples_answers(run.objective.kind)
        ),
        "The initial values of the adapter follow from training data, and this objective makes its data in training.",
        "adapter.init, objective.kind",
        "--adapter.init=kaiming",
    ),
    Rule(
        "frozen-a-has-one-rate",
        lambda run: (
            isinstance(run.adapter, LowRankAdapter) and not run.adapter.trains_a and run.adapter.lora_plus_ratio != 1
        ),
        "lora_plus_ratio is the learning rate of B divided by that of A, but freeze_a trains no A.",
        "adapter.freeze_a, adapter.lora_plus_ratio",
        ("adapter.lora_plus_ratio=1", "adapter.freeze_a=false"),
    ),
    Rule(
        "bottlenecks-have-one-width",
        lambda run: (
            isinstance(run.adapter, BottleneckAdapter)
            and run.adapter.size is not None
            and run.adapter.reduction is not None
        ),
        "size and reduction both decide the width of the bottlenecks.",
        "adapter.size, adapter.reduction",
        ("adapter.size=null", "adapter.reduction=null"),
    ),
    Rule(
        "bitfit-trains-something",
        lambda run: isinstance(run.adapter, BitfitAdapter) and not (run.adapter.biases or run.adapter.norms),
        "Without biases and norms, nothing would be trained.",
        "adapter.biases, adapter.norms",
        ("adapter.biases=true", "adapter.norms=true"),
    ),
    Rule(
        "virtual-tokens-begin-somewhere",
        lambda run: _text_inits(run) == (True, False),
        lambda run: f"init = {getattr(run.adapter, 'init', '')} needs a text.",
        "adapter.init, adapter.init_text",
        "--adapter.init_text=TEXT",
    ),
    Rule(
        "only-texts-are-read",
        lambda run: _text_inits(run) == (False, True),
        lambda run: f"adapter.init_text has no effect with init = {getattr(run.adapter, 'init', '')}.",
        "adapter.init, adapter.init_text",
        lambda run: (
            f"adapter.init={'tokens' if run.adapter.kind == 'prefix' else 'text'}",
            "adapter.init_text=null",
        ),
    ),
    Rule(
        "networks-are-not-saved",
        lambda run: (
            isinstance(run.adapter, PrefixAdapter | PromptAdapter)
            and run.adapter.encoder != "none"
            and run.adapter.path is not None
        ),
        "An adapter folder has the output of encoder, so the network cannot be trained further.",
        "adapter.path, adapter.encoder",
        "--adapter.encoder=none",
    ),
    Rule(
        "networks-begin-at-random",
        lambda run: (
            isinstance(run.adapter, PrefixAdapter) and run.adapter.encoder != "none" and run.adapter.init == "tokens"
        ),
        "The network of encoder cannot begin with the keys and values of a text.",
        "adapter.init, adapter.encoder",
        ("adapter.encoder=none", "adapter.init=zero_value"),
    ),
    Rule(
        "virtual-tokens-are-few",
        lambda run: (
            isinstance(run.adapter, PrefixAdapter | PromptAdapter)
            and run.adapter.num_virtual_tokens >= run.data.max_seq_len
        ),
        lambda run: f"There are as many virtual tokens as a text may have ({run.data.max_seq_len}).",
        "adapter.num_virtual_tokens, data.max_seq_len",
        lambda run: f"--adapter.num_virtual_tokens={max(1, run.data.max_seq_len // 4)}",
    ),
    Rule(
        "methods-of-peft-are-known",
        lambda run: bool(_unknown_method(run)),
        _unknown_method,
        "adapter.method",
        _other_method,
    ),
    Rule(
        "methods-read-plain-weights",
        lambda run: (found := _method(run)) is not None and found.reads == "values" and _is_quantized(run),
        lambda run: (
            f"PEFT's {getattr(run.adapter, 'method', '')} reads the weights of the layers that it changes, so they "
            "cannot be quantized."
        ),
        "adapter.method, base.format",
        ("base.format=none", "adapter.method=OFT"),
    ),
    Rule(
        "methods-stay-in-one-place",
        lambda run: (
            (found := _method(run)) is not None
            and (found.shares or found.reads == "values")
            and run.parallel.kind not in ("auto", "none", "ddp")
        ),
        lambda run: (
            f"PEFT's {getattr(run.adapter, 'method', '')} reads what other layers own, so the model cannot be sharded."
        ),
        "adapter.method, parallel.kind",
        ("parallel.kind=ddp",),
    ),
    Rule(
        "adalora-needs-its-gradients",
        lambda run: getattr(run.adapter, "method", "") == "ADALORA" and run.optim.rule.kind != "adamw",
        lambda run: f"AdaLoRA measures the gradients of its own weights, which {run.optim.rule.kind} does not keep.",
        "adapter.method, optim.rule",
        ("optim.rule=adamw", "adapter.kind=lora"),
    ),
    Rule(
        "targets-are-named-once",
        lambda run: (
            isinstance(run.adapter, PeftAdapter)
            and "target_modules" in run.adapter.options
            and run.adapter.target_modules != "all-linear"
        ),
        "The layers to change are named twice.",
        "adapter.target_modules, adapter.options.target_modules",
        ("adapter.target_modules=all-linear",),
    ),
    Rule(
        "precondition-needs-frozen-a",
        lambda run: isinstance(run.adapter, WeightAdapter) and run.adapter.precondition and not run.adapter.freeze_a,
        "The gradient of B is preconditioned by a frozen A only.",
        "adapter.precondition, adapter.freeze_a",
        ("adapter.freeze_a=true", "adapter.precondition=false"),
    ),
)
