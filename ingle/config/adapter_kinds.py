"""Sections of the adapters that are not low-rank: bottlenecks, virtual tokens, factors, biases, and PEFT's others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, Strict, model_validator

from ingle.config.section import Section, Strings, Text

#: Patterns that match the ends of modules' paths.
Patterns = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Sublayers = Annotated[tuple[Literal["attention", "mlp"], ...], Strict(False), Field(min_length=1)]


class Adapter(Section):
    """Options of every adapter.

    Attributes:
        trainable_modules: Modules that are fully trained and saved with the adapter (``embed_tokens``, ``lm_head``);
            PEFT calls them ``modules_to_save``. The head of a task is always among them.
        path: Adapter folder in PEFT's layout to continue from. Its rank and targets must match.
        allow_mismatch: Continue from ``path`` even if that adapter was trained on a different base.
    """

    kind: str
    trainable_modules: Strings = ()
    path: Text | None = None
    allow_mismatch: bool = False


class BottleneckAdapter(Adapter):
    """Small networks after the sublayers of each layer: ``z + scale * up(activation(down(x)))``.

    ``z`` is the output of the sublayer. ``x`` is ``z`` too, and the input of the sublayer with ``parallel``. Training
    starts from the base, since ``up`` begins with zeros. PEFT has no such adapters, so only Ingle reads the files.

    Source: Houlsby et al. 2019 (arXiv 1902.00751), section 2.1; Pfeiffer et al. 2021 (arXiv 2005.00247); He et al. 2022
    (arXiv 2110.04366), section 4.

    Attributes:
        style: The published design: ``houlsby`` after attention and MLP, ``pfeiffer`` after the MLP, ``parallel``
            in parallel with the MLP. It decides the options below that are null.
        after: Sublayers with a network: any of attention, mlp. If null, as ``style`` says.
        reduction: The hidden size divided by the width of the networks. If null, 16, and 2 for ``parallel``.
        size: Width of the networks, instead of ``reduction``.
        activation: If null, ``silu`` for ``houlsby`` and ``relu`` for the others.
        scale: Factor on the networks; ``learned`` trains one number for each, from 1. If null, 1, and 4 for
            ``parallel``.
        dropout: Fraction of the networks' inputs that are set to zero in training.
    """

    kind: Literal["bottleneck"]
    style: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    after: Sublayers | None = None
    reduction: Width | None = None
    size: Width | None = None
    activation: Literal["silu", "relu", "gelu", "tanh"] | None = None
    scale: Annotated[float, Field(gt=0, le=1_000_000)] | Literal["learned"] | None = None
    dropout: Dropout = 0.0

    @property
    def sublayers(self) -> tuple[str, ...]:
        """Sublayers with a network."""
        return self.after or (("attention", "mlp") if self.style == "houlsby" else ("mlp",))

    @property
    def function(self) -> str:
        """Name of the activation."""
        return self.activation or ("silu" if self.style == "houlsby" else "relu")

    @property
    def first_scale(self) -> float:
        """Factor on the networks when training begins."""
        if self.scale == "learned":
            return 1.0
        return self.scale or (4.0 if self.style == "parallel" else 1.0)

    def width(self, hidden_size: int) -> int:
        """Returns the width of the networks in a model of this hidden size."""
        reduction = self.reduction or (2 if self.style == "parallel" else 16)
        return self.size or max(1, hidden_size // reduction)


class PrefixAdapter(Adapter):
    """Trained keys and values in front of every text, in every attention layer.

    Source: Li and Liang 2021, "Prefix-Tuning" (arXiv 2101.00190), section 4.

    Attributes:
        num_virtual_tokens: Number of keys and values.
        init: ``zero_value``: random keys, and values of zero. ``random``: both random, as in PEFT. ``tokens``: those
            that the base computes for ``init_text``, so that training starts from the base with this text in front.
        init_text: The text of ``tokens``. It decides the number of keys and values.
        encoder: ``mlp`` trains them as the output of a network, which is not saved. Such an adapter cannot be
            continued.
        encoder_hidden_size: Width of that network. If null, the hidden size.
    """

    kind: Literal["prefix"]
    num_virtual_tokens: Width = 30
    init: Literal["zero_value", "random", "tokens"] = "zero_value"
    init_text: Text | None = None
    encoder: Literal["none", "mlp"] = "none"
    encoder_hidden_size: Width | None = None


class PromptAdapter(Adapter):
    """Trained embeddings in front of every text.

    Source: Lester et al. 2021, "Prompt Tuning" (arXiv 2104.08691); with an encoder Liu et al. 2021, "P-tuning" (arXiv
    2103.10385), section 2.

    Attributes:
        num_virtual_tokens: Number of embeddings.
        init: ``vocabulary``: those of tokens drawn at random. ``text``: those of the tokens of ``init_text``, repeated
            or cut. ``random``: a normal distribution with a deviation of 1, as in PEFT.
        init_text: The text of ``text``.
        encoder: ``mlp`` or ``lstm`` trains them as the output of a network (p-tuning), which is not saved. Such an
            adapter cannot be continued.
        encoder_hidden_size: Width of that network. If null, the hidden size.
    """

    kind: Literal["prompt"]
    num_virtual_tokens: Width = 20
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    init_text: Text | None = None
    encoder: Literal["none", "mlp", "lstm"] = "none"
    encoder_hidden_size: Width | None = None


class Ia3Adapter(Adapter):
    """Trained factors on keys, values and the inputs of the MLP's output.

    Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
    (arXiv 2205.05638), section 3.3.

    Attributes:
        target_modules: Patterns that match the end of a module's path. If null, the projections of keys and values (the
            common one of queries, keys and values, where a model has no others) and the output of the MLP.
        feedforward_modules: Patterns of those whose inputs are scaled instead of their outputs. If null, the output of
            the MLP.
    """

    kind: Literal["ia3"]
    target_modules: Patterns | None = None
    feedforward_modules: Annotated[tuple[Text, ...], Strict(False)] | None = None


class BitfitAdapter(Adapter):
    """Trains the biases of the layers, or their norms, and nothing else.

    Source: Ben Zaken et al. 2022, "BitFit" (arXiv 2106.10199), section 3; Zhao et al. 2023, "Tuning LayerNorm in
    Attention" (arXiv 2312.11420).

    Attributes:
        biases: Train every bias inside the model's layers, those of norms too.
        norms: Train the weights of every norm of the model and their biases: LayerNorm tuning.
    """

    kind: Literal["bitfit"]
    biases: bool = True
    norms: bool = False


class PeftAdapter(Adapter):
    """A method of the PEFT library, computed by its own modules: VeRA, OFT, BOFT, LoHa, LoKr, AdaLoRA and others.

    Attributes:
        method: PEFT's name of the method (``VERA``), in any case.
        options: Options of the method under PEFT's own names (``r``, ``init_r``), as its config class takes them.
        target_modules: ``all-linear``, or patterns that match the end of a module's path, as for LoRA.
    """

    kind: Literal["peft"]
    method: Text
    options: dict[Text, JsonValue] = Field(default_factory=dict)
    target_modules: Literal["all-linear"] | Patterns = "all-linear"

    @model_validator(mode="before")
    @classmethod
    def _read_method(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("method"), str):
            return {**value, "method": value["method"].upper().replace("-", "_")}
        return value

    @property
    def dropout(self) -> float:
        """The largest dropout of the method's options, which PEFT names differently for each."""
        shares = (value for key, value in self.options.items() if key.endswith("dropout"))
        return max((float(value) for value in shares if isinstance(value, int | float)), default=0.0)
