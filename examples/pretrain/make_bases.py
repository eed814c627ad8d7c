"""Writes configs and tokenizers of two small models to pre-train: an encoder (BERT) and an encoder-decoder (T5).

    python examples/pretrain/make_bases.py

Both have the vocabulary of ``examples/models/ember-6m`` and the special tokens that their objectives need.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

MODELS = Path(__file__).parents[1] / "models"
CLS, SEP, MASK, END, PAD = "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>", "<|pad|>"
NUM_SENTINELS = 100
SENTINELS = [f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]

ENCODER: Mapping[str, Any] = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": 4160,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}
ENCODER_DECODER: Mapping[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "vocab_size": 4224,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "pad_token_id": 1,
    "eos_token_id": 0,
    "decoder_start_token_id": 1,
}


def encoder_tokenizer(vocabulary: Tokenizer) -> dict[str, Any]:
    """Adds BERT's special tokens: ``[CLS] a [SEP] b [SEP]``; returns the settings of the tokenizer."""
    vocabulary.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (CLS, SEP, MASK)])
    vocabulary.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(token, vocabulary.token_to_id(token)) for token in (CLS, SEP)],
    )
    return {
        "cls_token": CLS,
        "sep_token": SEP,
        "mask_token": MASK,
        "pad_token": PAD,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": 512,
    }


def encoder_decoder_tokenizer(vocabulary: Tokenizer) -> dict[str, Any]:
    """Adds T5's sentinels and the end of each text; returns the settings of the tokenizer."""
    vocabulary.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SENTINELS])
    vocabulary.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, vocabulary.token_to_id(END))]
    )
    return {
        "eos_token": END,
        "pad_token": PAD,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
    }


def write(folder: Path, config: Mapping[str, Any], vocabulary: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Writes the files of a model without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    for name, content in (("config.json", config), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write configs and tokenizers of small models.")
    parser.add_argument("--output", type=Path, default=MODELS)
    output = parser.parse_args(arguments).output
    for name, config, extend in (
        ("ember-encoder", ENCODER, encoder_tokenizer),
        ("ember-encoder-decoder", ENCODER_DECODER, encoder_decoder_tokenizer),
    ):
        vocabulary = Tokenizer.from_file(str(MODELS / "ember-6m" / "tokenizer.json"))
        write(output / name, config, vocabulary, extend(vocabulary))
        print(f"{output / name}: {vocabulary.get_vocab_size():,} tokens")


if __name__ == "__main__":
    main()
