"""Files of a run's report: keys, escaping, and nothing from the network."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from ingle.config import Run
from ingle.evaluation import SampleText, TaskResult, compare, compare_all
from ingle.evaluation.scorers import Likelihood, Outputs
from ingle.report.results import RunReport, to_dict
from ingle.report.run_files import read_report, read_steps, write_report
from ingle.report.terminal_tables import comparison_table
from tests.stored_results import STORED

EVIL = "<script>alert('x')</script>&<img src=http://example.org/a.png onerror=alert(1)>"
VOID = {"meta", "path", "line", "circle", "rect", "br", "img"}
SUMMARY = {
    "num_steps": 30,
    "num_tokens": 1000,
    "tokens_per_s": 50.0,
    "train_s": 20.0,
    "wall_s": 25.0,
    "peak_memory_bytes": 2**30,
    "plan": {
        "num_epochs": 1.0,
        "global_batch_size": 4,
        "num_tokens": 1000,
        "memory": {"weights": 2**29, "loss": 2**28, "total": 3 * 2**28},
    },
    "audit": {
        "trainable": 10,
        "parameters": 1000,
        "classes": [
            {
                "class_name": "QuantLinear",
                "format": "nf4",
                "modules": 2,
                "parameters": 900,
                "quantized": 900,
                "trainable": 0,
                "bytes": 500,
            }
        ],
    },
}


def render_text(table) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what could reach the network or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def make_run(tmp_path: Path, *metrics: str, **options) -> Run:
    return Run.model_validate(
        {
            "model": {"id": EVIL},
            "data": {"sources": [{"path": "train.jsonl"}]},
            "output": str(tmp_path / "run"),
            "evaluate": {
                "sources": [{"path": "t.jsonl"}],
                "metrics": metrics or ("chrf", "exact_match", "bits_per_byte"),
            },
            **options,
        }
    )


def make_results(text: str = EVIL, num_samples: int = 12) -> tuple[TaskResult, TaskResult]:
    samples = tuple(
        SampleText(f"t.jsonl:{i}", f"ask {text} {i}", (f"target {text} {i}", "other")) for i in range(num_samples)
    )
    likelihoods = tuple(Likelihood(9.0 + i, 5, 20) for i in range(num_samples))
    better = tuple(Likelihood(5.0 + i, 5, 20) for i in range(num_samples))
    return (
        TaskResult(samples, Outputs(tuple(f"no {text}" for _ in samples), likelihoods)),
        TaskResult(samples, Outputs(tuple(s.references[0] for s in samples), better)),
    )


def write_steps(path: Path, losses: list[float]) -> Path:
    path.write_text(
        "".join(json.dumps({"step": i + 1, "loss": loss, "lr": 1e-3 * (i + 1)}) + "\n" for i, loss in enumerate(losses))
    )
    return path


def make_report(tmp_path: Path, results=None, losses=(4.0, 3.0, 2.5, 2.0), **options) -> tuple[RunReport, str, Path]:
    run = make_run(tmp_path, **options)
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    comparisons = [] if results is None else [compare(*results, run.evaluate)]
    metrics = write_steps(folder / "metrics.jsonl", list(losses))
    report = write_report(folder, run=run, comparisons=comparisons, summary=SUMMARY, metrics_path=metrics)
    return report, (folder / "report.html").read_text(encoding="utf-8"), folder


def test_the_files_hold_the_report_and_all_answers(tmp_path):
    report, _, folder = make_report(tmp_path, make_results())
    assert read_report(folder / "report.json") == report
    assert list(to_dict(report)) == list(STORED["report"])
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 12 and answers[3]["prompt"].endswith(" 3")
    assert "index" not in answers[0]
    shown = report.shown
    assert {sample.index for sample in report.samples} == {*shown.gains, *shown.losses, *shown.random}


def test_the_page_escapes_everything_and_needs_no_network(tmp_path):
    _, text, _ = make_report(tmp_path, make_results())
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert page.urls == []
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert "alert(" in "".join(page.words)  # shown as text
    assert len(re.findall(r"https?://", re.sub(r"http://example\.org", "", text))) == 0


def test_the_page_shows_the_verdict_the_curve_and_the_answers(tmp_path):
    report, text, _ = make_report(tmp_path, make_results("word"))
    words = " ".join(Page(text).words)
    assert "Better" in words and "chrF" in words and "bits per byte" in words
    assert "loss (nats per supervised token)" in words and "learning rate" in words and "step" in words
    assert "Random samples" in words and "Largest gains" in words and "Largest losses" not in words
    assert "Predicted 768 MiB (top), measured 1.00 GiB (bottom)" in words
    assert "sources:" in words  # the resolved config
    assert report.metrics["chrf"].signature in words


@pytest.mark.parametrize(
    ("adapter", "base", "said"),
    [
        ({"kind": "lora", "rank": 4}, "nf4", "LoRA rank 4 on NF4"),
        ({"kind": "qa_lora", "rank": 8}, "q5_1", "QA-LoRA rank 8 on Q5_1"),
        ({"kind": "none"}, "none", "full fine-tuning"),
    ],
)
def test_the_page_says_what_was_trained(tmp_path, adapter, base, said):
    _, text, _ = make_report(tmp_path, adapter=adapter, base={"format": base})
    assert f" · {said} · " in " ".join(Page(text).words)


def test_no_difference_is_said_plainly(tmp_path):
    base, _ = make_results("word")
    _, text, _ = make_report(tmp_path, (base, base))
    words = " ".join(Page(text).words)
    assert "No significant difference" in words and "Better" not in words


def test_likelihoods_alone_show_no_answers(tmp_path):
    base, tuned = (TaskResult(r.samples, Outputs((), r.outputs.likelihoods)) for r in make_results("word"))
    run = make_run(tmp_path, "bits_per_byte", "perplexity")
    folder = tmp_path / "run"
    folder.mkdir()
    comparison = compare(base, tuned, run.evaluate)
    write_report(folder, run=run, comparisons=[comparison], summary=SUMMARY, metrics_path=folder / "none")
    words = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words)
    assert "Answers side by side" not in words and "perplexity" in words


def test_answers_of_nothing_are_called_so(tmp_path):
    base, tuned = make_results("word")
    base = TaskResult(base.samples, Outputs(("\n" * 30, *[""] * 11), base.outputs.likelihoods))
    report, text, _ = make_report(tmp_path, (base, tuned))
    words = Page(text).words
    assert "empty answer" in words and report.samples[0].base in ("", "\n" * 30)
    assert "\n\n\n\n" not in text


def test_a_run_without_evaluation_says_so(tmp_path):
    report, text, folder = make_report(tmp_path)
    assert report.metrics == {} and not (folder / "answers.jsonl").exists()
    assert "Trained, not evaluated" in " ".join(Page(text).words)


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [2.0],
        [2.0, 2.0],
        [0.0, 0.0, 0.0],
        [3.0, math.nan, 1.0],
        [1e-9, 2e-9],
        [5e7, 2.0],
        [2.0 + 0.1 * (i % 7) for i in range(3000)],
    ],
)
def test_any_curve_can_be_drawn(tmp_path, losses):
    _, text, _ = make_report(tmp_path, losses=losses)
    Page(text)
    assert "NaN" not in text and "nan" not in re.sub(r"[a-z-]*nan[a-z]+", "", text)
    assert len(text) < 400_000


def test_steps_made_twice_count_once_and_cut_lines_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}, {"step": 2, "loss": 2.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "saved"}\n{"step": 4, "lo')
    assert [(row["step"], row["loss"]) for row in read_steps(path)] == [(1, 3.0), (2, 2.5), (3, 1.0)]


def test_validations_are_read_with_their_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "validation_loss": 4.0}, {"step": 1, "loss": 3.0}, {"step": 1, "validation_loss": 3.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 2, "validation_loss": "low"}]))
    assert read_steps(path) == [
        {"step": 0, "validation_loss": 4.0},
        {"step": 1, "loss": 3.0, "validation_loss": 3.5},
    ]


def test_a_report_has_the_strongest_baseline_first_and_names_all(tmp_path):
    weak, tuned = make_results("text")
    strong = TaskResult(weak.samples, Outputs(("target text 0",) + ("no",) * 11, weak.outputs.likelihoods))
    run = make_run(tmp_path, "exact_match")
    folder = tmp_path / "run"
    folder.mkdir()
    compared = compare_all({"majority": weak, "zero-shot": strong}, tuned, run.evaluate)
    assert list(compared) == ["zero-shot", "majority"]
    metrics = write_steps(folder / "metrics.jsonl", [2.0, 1.0])
    report = write_report(
        folder,
        run=run,
        comparisons=list(compared.values()),
        summary=SUMMARY,
        metrics_path=metrics,
    )
    assert read_report(folder / "report.json") == report
    assert report.base_name == "zero-shot"
    assert report.metrics["exact_match"].base == pytest.approx(1 / 12)
    assert report.comparisons["majority"].metrics["exact_match"].base == 0.0
    assert "exact match 0.0 % (majority) → 100.0 %" in report.comparisons["majority"].verdict
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Zero-shot against tuned" in page and "(majority)" in page
    shown = render_text(comparison_table(report))
    assert "zero-shot" in shown and "(majority) → 100.0 %" in shown
