"""Real corpora load as they are published."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from ingle.config.data import DataConfig
from ingle.config.objective import Classify, Mlm, ObjectiveConfig, Seq2Seq
from ingle.data import TokenDataset, build_dataset, hold_out, name_labels
from tests import tiny_tokenizers

BERT = tiny_tokenizers.bert()


def build(sources: list[object], objective: ObjectiveConfig, **options: object) -> tuple[TokenDataset, DataConfig]:
    data = DataConfig.model_validate({"sources": sources, **options})
    return build_dataset(data, BERT, objective=name_labels(data, objective)), data


def test_sentences_in_a_file_for_each_class(shared_data: Path) -> None:
    files = {name: str(shared_data / f"sentence_polarity/rt-polarity.{name}") for name in ("pos", "neg")}
    sources: list[object] = [{"path": path, "lines": True, "label": name, "limit": 500} for name, path in files.items()]
    dataset, _ = build(sources, Classify(kind="classify"))
    assert dataset.label_counts(2).tolist() == [500, 500] and not dataset.stats.dropped


def test_documents_with_summaries_are_pairs_and_held_out_by_document(shared_data: Path) -> None:
    sources: list[object] = [str(shared_data / "summedits/samsum.json")]
    dataset, data = build(sources, Classify(kind="classify"), max_seq_len=256, validation=0.1)
    assert dataset.label_counts(2).tolist() == [422, 242]
    assert dataset.stats.truncated_documents > 300
    _, held_out = hold_out(dataset, data, 0, lambda _: dataset)
    assert held_out is not None
    firsts = [hash(dataset.sample(i).input_ids[:40].tobytes()) for i in range(len(dataset))]
    is_held_out = np.isin(np.arange(len(dataset)), held_out.documents)
    assert not {first for first, held in zip(firsts, is_held_out, strict=True) if held} & {
        first for first, held in zip(firsts, is_held_out, strict=True) if not held
    }


def test_meaning_representations_and_sentences(shared_data: Path) -> None:
    dataset, _ = build([{"path": str(shared_data / "e2e/devset.csv"), "limit": 500}], Seq2Seq(kind="seq2seq"))
    assert (dataset.stats.rows, len(dataset)) == (500, 1000)
    assert [dataset.text_name(i) for i in (0, 1)] == ["source", "target"]


def test_plain_text_is_cut_into_full_pieces(shared_data: Path) -> None:
    dataset, _ = build([str(shared_data / "wikitext-2/valid.txt")], Mlm(kind="mlm"), max_seq_len=128)
    assert (dataset.lengths[:-1] == 128).all() and dataset.stats.split_documents == 1


def test_reviews_with_signed_opinions_after_a_conversion_of_a_few_lines(shared_data: Path, tmp_path: Path) -> None:
    rows = []
    for path in sorted((shared_data / "product_reviews").glob("*_*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            opinions, found, text = line.partition("##")
            signs = set(re.findall(r"\[([+-])\d?\]", opinions))
            if found and len(signs) == 1:
                rows.append({"text": text, "label": "positive" if signs == {"+"} else "negative"})
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, _ = build([str(tmp_path / "reviews.jsonl")], Classify(kind="classify"))
    counts = Counter(row["label"] for row in rows)
    assert dataset.label_counts(2).tolist() == [counts["negative"], counts["positive"]]
    assert len(dataset) == len(rows) > 1600
