r"""Trains the tokenizer of the bundled base model: byte-level BPE that llama.cpp reads as ``gpt2``.

    python examples/pretrain/train_tokenizer.py --corpus examples/pretrain/corpus --output examples/models/ember-6m

It has GPT-2's pre-tokenizer, all 256 bytes, and 4,096 tokens including four special ones. Documents and turns both end
with ``<|im_end|>``, the tokenizer's eos; a turn of a conversation is ``<|im_start|>role\n...<|im_end|>\n`` (ChatML).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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


def train(corpus: Path, every: int) -> PreTrainedTokenizerFast:
    """Returns the trained tokenizer with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus, every), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and saves the tokenizer."""
    parser = argparse.ArgumentParser(description="Trains the tokenizer of the bundled base model.")
    parser.add_argument("--corpus", type=Path, default=Path(__file__).parent / "corpus")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "models" / "ember-6m")
    parser.add_argument("--every", type=int, default=12, help="train on every n-th row")
    options = parser.parse_args(arguments)
    tokenizer = train(options.corpus, options.every)
    tokenizer.save_pretrained(options.output)
    settings_file = options.output / "tokenizer_config.json"
    # transformers 4 knows no other name of this class
    settings = json.loads(settings_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{len(tokenizer)} tokens in {options.output}")


if __name__ == "__main__":
    main()
