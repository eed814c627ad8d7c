r"""Trains the tokenizer of a bundled model: byte-level BPE with GPT-2's pre-tokenizer, all 256 bytes and 4,096 tokens.

    python examples/pretrain/train_tokenizer.py --kind causal --corpus examples/pretrain/corpus

The kinds of models differ in their special tokens, which are among the 4,096:

- ``causal``: documents and turns both end with ``<|im_end|>``, the tokenizer's eos; a turn of a conversation is
  ``<|im_start|>role\n...<|im_end|>\n`` (ChatML). llama.cpp reads this tokenizer as ``gpt2``.
- ``encoder``: a text is ``[CLS] text [SEP]``, a pair is ``[CLS] text [SEP] text [SEP]``; ``[MASK]`` hides a token.
- ``encoder-decoder``: a text ends with ``</s>``; ``<mask>`` hides a span, as in BART.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What distinguishes the tokenizers of the bundled models.

    Attributes:
        model: Folder of the model.
        special_tokens: The first tokens of the vocabulary.
        roles: Arguments of the tokenizer class that name special tokens.
        single: Template of a text with special tokens; empty without.
        pair: Template of two texts.
        chat_template: Template of conversations; empty without.
    """

    model: str
    special_tokens: tuple[str, ...]
    roles: Mapping[str, str]
    single: str = ""
    pair: str = ""
    chat_template: str = ""


KINDS = {
    "causal": Kind(
        "ember-6m",
        ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"),
        {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"},
        chat_template=CHAT_TEMPLATE,
    ),
    "encoder": Kind(
        "ember-encoder",
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
    ),
    "encoder-decoder": Kind(
        "ember-encoder-decoder",
        ("<pad>", "</s>", "<mask>"),
        {"pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"},
        single="$A </s>",
        pair="$A </s> $B </s>",
    ),
}


def texts(corpus: Path, every: int) -> Iterator[str]:
    """Yields every ``every``-th row of the generated shards and of the passages of books."""
    for path in sorted(corpus.glob("*.jsonl")):
        if path.name.startswith("heldout"):
            continue
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if number % every == 0:
                    row = json.loads(line)
                    yield from [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]


def hides(token: str) -> bool:
    """Returns whether a token replaces text, with the space before it: words begin with their space."""
    return token in ("[MASK]", "<mask>")


def train(corpus: Path, every: int, kind: Kind) -> PreTrainedTokenizerFast:
    """Returns the trained tokenizer of a kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, lstrip=hides(token)) for token in kind.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus, every), trainer)
    if kind.single:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=kind.single,
            pair=kind.pair,
            special_tokens=[(token, number) for number, token in enumerate(kind.special_tokens)],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=1024, clean_up_tokenization_spaces=False, **kind.roles
    )
    if kind.chat_template:
        fast.chat_template = kind.chat_template
    return fast


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and saves the tokenizer."""
    parser = argparse.ArgumentParser(description="Trains the tokenizer of a bundled model.")
    parser.add_argument("--kind", choices=KINDS, default="causal", help="the kind of model")
    parser.add_argument("--corpus", type=Path, default=Path(__file__).parent / "corpus")
    parser.add_argument("--output", type=Path, help="folder of the model; default: examples/models/NAME")
    parser.add_argument("--every", type=int, default=12, help="train on every n-th row")
    options = parser.parse_args(arguments)
    kind = KINDS[options.kind]
    output = options.output or Path(__file__).parents[1] / "models" / kind.model
    tokenizer = train(options.corpus, options.every, kind)
    tokenizer.save_pretrained(output)
    settings_file = output / "tokenizer_config.json"
    # transformers 4 knows no other name of this class
    settings = json.loads(settings_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    if not kind.chat_template:  # ModernBERT and T5 have no token types
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{len(tokenizer)} tokens in {output}")


if __name__ == "__main__":
    main()
