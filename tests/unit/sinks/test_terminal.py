from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from ingle import events
from ingle.config import Run
from ingle.events import Evaluated, Failed, Finished, Proved, Saved, Started, Step, Validated, Warned
from ingle.report.results import ClassTable, ShownSamples
from ingle.report.terminal_tables import comparison_table, plan_table, summary_table
from ingle.sinks import Terminal, combine
from tests.stored_results import COMPARISON as STORED_COMPARISON
from tests.stored_results import REPORT, SUMMARY

PLAN = {
    "num_steps": 6,
    "global_batch_size": 16,
    "micro_batch_size": 8,
    "grad_accum_steps": 2,
    "tokens_per_step": 4096.0,
    "num_tokens": 24576,
    "num_epochs": 1.5,
    "save_every": 2,
    "compile": False,
    "trainable_parameters": 1000,
    "num_parameters": 100_000,
    "flops_per_token": 4e5,
    "memory": {"weights": 1 << 20, "optimizer": 1 << 10, "gradients": 0, "total": 3 << 20},
}
AUDIT = {
    "bytes_by_dtype": {"uint8": 1 << 20},
    "classes": [
        {
            "class_name": "QuantLinear",
            "format": "nf4",
            "modules": 7,
            "parameters": 90_000,
            "quantized": 90_000,
            "trainable": 0,
            "bytes": 1 << 20,
        }
    ],
    "unquantized": [{"name": "lm_head", "class_name": "Linear", "parameters": 10_000, "frozen": True}],
    "parameters": 100_000,
    "quantized": 90_000,
    "trainable": 1000,
    "bytes": 1 << 20,
}
_ROWS = STORED_COMPARISON.metrics
_SAMPLE = STORED_COMPARISON.samples[0]
COMPARISON = replace(
    STORED_COMPARISON,
    verdict="exact match rose.",
    metrics={
        "exact_match": replace(
            _ROWS["exact_match"], base=0.0, tuned=0.4125, delta=0.4125, ci95=(0.35, 0.47), p=1e-20, p_exact=2e-20,
            n=200, outcome="better",
        ),
        "perplexity": replace(
            _ROWS["perplexity"], base=30.0, tuned=12.5, delta=-17.5, ci95=(-20.0, None), p=0.012, p_exact=0.012, n=200,
            outcome="unclear",
        ),
    },
    samples=tuple(
        replace(_SAMPLE, prompt=f"ask {i} [bold]", references=("truth",), base=f"base {i}", tuned=f"tuned {i}")
        for i in range(5)
    ),
    shown=ShownSamples((4, 3), (2,), (0, 1)),
)  # fmt: skip


def run_data(log_every: int = 1, num_shown: int = 3) -> dict[str, Any]:
    return Run.model_validate(
        {
            "model": {"id": "m[1]"},
            "base": "nf4",
            "data": {"sources": "a.jsonl"},
            "train": {"log_every": log_every},
            "evaluate": {"sources": "e.jsonl", "num_shown": num_shown},
            "output": "runs/x",
        }
    ).model_dump(mode="json")


def started(step: int = 0, resumed_from: str | None = None, **options: int) -> Started:
    return Started(run_data(**options), PLAN, AUDIT, step, 6, resumed_from)


def step(number: int) -> Step:
    return Step(number, 2.5, 4096 * number, 1234.0, 2e-4, 0.75, 5 << 20, number / 4)


def show(*received: events.Event, terminal: bool = False, seconds: float = 1.0) -> str:
    """What is printed when ``seconds`` pass between one look at the clock and the next."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, highlight=False, color_system=None)
    with Terminal(console, itertools.count(0.0, seconds).__next__) as sink:
        for event in received:
            sink(event)
    return out.getvalue()


def test_the_plan_and_what_was_loaded_come_first() -> None:
    text = show(started())
    for part in (
        "m[1], 100 K parameters, base nf4",
        "lora, rank 16: 1,000 parameters (1.0% of the model)",
        "6 (1.5 epochs), 16 sequences each = 8 at once x 2",
        "3.0 MiB predicted: weights 1.0 MiB, optimizer 1.0 KiB",
        "every 2 steps",
        "QuantLinear (nf4)",
        "Not quantized: lm_head (10,000 parameters)",
        "Stored as: uint8 1.0 MiB",
    ):
        assert part in text
    assert "gradients" not in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert "Resuming" not in text
    assert "Resuming from c/step-3; 3 of 6 steps done." in show(started(3, "c/step-3"))


def test_plain_lines_one_a_logged_step_and_the_last() -> None:
    text = show(started(log_every=4), *(step(number) for number in range(1, 7)))
    found = [line for line in text.splitlines() if line.startswith("Step ")]
    assert [line.split()[1] for line in found] == ["4/6", "6/6"]
    assert "loss 2.5000  1,234 tokens/s  lr 2.00e-04  grad 0.75  5.0 MiB  ETA " in found[0]
    assert "took " in found[1] and "ETA" not in found[1]
    assert "\r" not in text and "\x1b" not in text


def test_a_run_on_preferences_shows_its_accuracy_and_one_that_samples_its_reward() -> None:
    for metrics, shown in (
        ({"rewards/accuracy": 0.875}, "loss 2.5000  accuracy 0.88"),
        ({"rewards/accuracy": 0.5, "reward": 1.5, "kl": 0.25}, "reward 1.5000  kl 0.25"),
    ):
        assert f"Step 6/6  {shown}  1,234 tokens/s" in show(started(), replace(step(6), metrics=metrics))


def test_a_live_bar_on_a_terminal_is_taken_away_at_the_end() -> None:
    text = show(started(), step(1), Saved(1, "c", "checkpoint"), step(6), terminal=True)
    assert "\x1b[" in text and "Training" in text and "Saved checkpoint" not in text
    assert "Step 6/6" in text.rstrip().splitlines()[-1] and "Step 1/6" not in text


def test_the_bar_fits_an_ordinary_terminal() -> None:
    out = io.StringIO()
    with Terminal(Console(file=out, force_terminal=True, width=80, color_system=None)) as sink:
        sink(started())
        sink(step(1))
    line = next(line for line in reversed(out.getvalue().split("\r")) if "Training" in line)
    assert "1/6" in line and "loss 2.5000  1,234 tokens/s  lr 2.00e-04  ETA " in line and "…" not in line


def test_the_proof_of_the_start_is_one_line() -> None:
    exact = {"measured": 2e-7, "expected": 0.0, "tolerance": 1e-5}
    known = {"measured": 0.6931472, "expected": 0.6931472, "tolerance": 1e-4}
    text = show(started(), Proved(0, {"log-ratio": exact, "preference": known}))
    assert "Checked the start: log-ratio (2e-07 off), preference 0.693147\n" in text


def test_validations_are_shown_in_the_bar_and_on_lines() -> None:
    received = (Validated(0, 2.25, 0, 2.25), step(1), Validated(1, 2.5, 0, 2.25, metrics={"chrf": 31.5}), step(2))
    text = show(started(), *received)
    assert "Validation 0/6  loss 2.2500, the lowest so far" in text
    assert "Validation 1/6  loss 2.5000, lowest 2.2500 at step 0  chrf 31.5" in text
    out = io.StringIO()
    with Terminal(Console(file=out, force_terminal=True, width=80, color_system=None)) as sink:
        for event in (started(), *received):
            sink(event)
    bars = [line for line in out.getvalue().split("\r") if "Training" in line]
    assert "2/6" in bars[-1] and "loss 2.5000  val 2.5000 (best 2.2500)  ETA " in bars[-1] and "…" not in bars[-1]


def test_the_bar_goes_when_the_block_ends_badly() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with pytest.raises(KeyboardInterrupt), Terminal(console) as sink:
        sink(started())
        sink(step(1))
        raise KeyboardInterrupt
    assert not console._live_stack


def test_a_stage_of_unknown_length_is_over_when_the_next_begins() -> None:
    shown: list[list[str]] = []
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with Terminal(console) as sink:
        for event in (
            events.Progress("tokenize", 1024),
            events.Progress("tokenize", 2048),
            events.Progress("reading weights", 1, 2),
            events.Progress("reading weights", 2, 2),
        ):
            sink(event)
            assert sink._live is not None
            shown.append([task.description for task in sink._live.tasks])
    assert shown == [["tokenize"], ["tokenize"], ["reading weights"], []]


def test_long_stages_print_quarters() -> None:
    text = show(*(events.Progress("reading", done, 100) for done in range(101)), *[events.Progress("drawing", 3)] * 4)
    assert text.splitlines() == [
        "reading: 2 of 100",
        "reading: 27 of 100",
        "reading: 52 of 100",
        "reading: 77 of 100",
        "reading: 100 of 100",
        "drawing: 3",
    ]


def test_short_stages_print_nothing() -> None:
    assert show(*(events.Progress("reading", done, 100) for done in range(101)), seconds=0.001) == ""


def test_stages_that_run_twice_print_twice() -> None:
    once = [events.Progress("reading", done, 2) for done in (0, 1, 2)]
    assert show(*once, *once).splitlines() == ["reading: 2 of 2"] * 2
    assert "reading" in show(*once, *once, terminal=True)


def test_warnings_are_merged_and_counted() -> None:
    text = show(
        Warned("row skipped [no answer]", "a.jsonl:3"),
        Warned("7 of 9 were cut", count=7),
        Warned("row skipped [no answer]", "a.jsonl:9", 4),
        Warned("odd"),
        Warned("SimPO with gamma 0.5.", "objective", is_note=True),
        Warned("SimPO with gamma 0.5.", "objective", is_note=True),
    )
    assert text.splitlines() == [
        "Warning: row skipped [no answer] [a.jsonl:3]",
        "Warning: 7 of 9 were cut",
        "Warning: odd",
        "Note: SimPO with gamma 0.5. [objective]",
        "Warning: row skipped [no answer] (5 times in total)",
    ]


def test_the_comparison_and_answers_side_by_side() -> None:
    text = show(started(), Evaluated(6, COMPARISON))
    row = next(line for line in text.splitlines() if "exact match" in line and "%" in line)
    silent = replace(COMPARISON, samples=(replace(_SAMPLE, references=(), base=" ", tuned="t"),) * 5)
    for part in ("0.0 %", "41.2 %", "+41.2 points   ✓", "[+35.0, +47.0]", "1.0e-20", "2.0e-20", "200"):
        assert part in row
    assert (
        "perplexity ↓" in text
        and "↓ Lower is better." in text
        and "✓ better: p < 0.05" in text
        and "[−20.00, –]" in text
    )
    assert "exact match rose." in text
    assert [line.strip() for line in text.splitlines() if line.strip().startswith("Sample")] == [
        "Sample 5, largest gain",
        "Sample 3, largest loss",
        "Sample 1, random",
    ]
    assert "(empty)" in show(started(), Evaluated(6, silent))
    few = show(started(), Evaluated(6, replace(COMPARISON, shown=ShownSamples((4,), (), (1, 4)))))
    assert few.count("Sample 5") == 1 and few.count("Sample 2") == 1, "each is shown once"
    assert "ask 4 [bold]" in text and "truth" in text and "base 4" in text and "tuned 4" in text


@pytest.mark.parametrize(
    ("width", "shown", "missing"),
    [
        (120, "95 % interval p corrected p exact p n", ""),
        (90, "95 % interval corrected p n", "exact"),
        (80, "95 % interval n", "corrected p"),
        (60, "base tuned difference n", "95 % interval"),
    ],
)
def test_a_narrow_terminal_leaves_out_p_values_first(width: int, shown: str, missing: str) -> None:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(comparison_table(COMPARISON))
    lines = out.getvalue().splitlines()
    heading = next(line for line in lines if "difference" in line)
    assert " ".join(heading.split()).endswith(shown) and (not missing or missing not in heading)
    assert "…" not in out.getvalue() and max(map(len, lines)) <= width
    row = next(line for line in lines if "exact match" in line)
    for figure in ("0.0 %", "41.2 %", "+41.2 points", "200"):
        assert figure in row


@pytest.mark.parametrize("width", [60, 40])
def test_every_figure_is_shown_at_any_width(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(comparison_table(COMPARISON))
    words = " ".join(out.getvalue().split())
    for figure in ("0.0 %", "41.2 %", "+41.2 points", "30.00", "12.50", "−17.50", "200", "exact match rose."):
        assert figure in words
    assert "…" not in words


def test_no_samples_are_shown_for_num_shown_0() -> None:
    assert "Sample" not in show(started(num_shown=0), Evaluated(6, COMPARISON))


def test_the_end_shows_predicted_and_measured_memory() -> None:
    report = replace(
        REPORT, num_steps=6, num_tokens=24576, wall_s=61.0, tokens_per_s=402.9, peak_memory_bytes=4 << 20, plan=PLAN
    )
    text = show(started(), Saved(6, "runs/x/adapter", "adapter"), Finished(6, report))
    assert "Saved adapter: runs/x/adapter" in text
    assert "Finished in 1m01s: 6 steps, 24,576 tokens at 403 tokens/s." in text
    assert "Peak memory of training: 4.0 MiB measured, 3.0 MiB predicted." in text


def test_a_run_that_was_finished_before_shows_its_comparison_again() -> None:
    report = replace(REPORT, metrics=COMPARISON.metrics)
    assert "41.2 %" in show(Warned("this run is finished"), Finished(6, report))
    assert show(started(), Evaluated(6, COMPARISON), Finished(6, report)).count("Evaluation") == 1


def test_a_summary_has_a_row_per_metric() -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(summary_table(SUMMARY))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "71.4 %" in text and "bits per byte ↓" in text and "↓ Lower is better." in text


def test_failed_prints_nothing_more() -> None:
    assert show(Failed("bad")) == ""


def test_combine_passes_events_in_order() -> None:
    received: list[tuple[int, events.Event]] = []
    combine(lambda event: received.append((1, event)), lambda event: received.append((2, event)))(step(1))
    assert [number for number, _ in received] == [1, 2]


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"rank": 4}, "lora, rank 4: "),
        ({"rank": 4, "merge_aware": {}}, "lora, rank 4, the last 25% of the steps through the rounding of q5_1: "),
        (
            {"rank": 4, "merge_aware": {"format": "q4_k", "fraction": 0.5}},
            "lora, rank 4, the last 50% of the steps through the rounding of q4_k: ",
        ),
        ({"kind": "qa_lora", "rank": 4, "train_rounding": True}, "qa_lora, rank 4, through the rounding of q5_1: "),
    ],
)
def test_the_plan_says_what_is_trained_through_the_rounding(adapter: dict[str, Any], said: str) -> None:
    run = Run.model_validate(
        {"model": {"id": "m"}, "base": "q5_1", "adapter": adapter, "data": {"sources": "a"}, "output": "o"}
    )
    console = Console(file=io.StringIO(), width=160)
    console.print(plan_table(run.model_dump(mode="json"), PLAN))
    assert said in console.file.getvalue()  # type: ignore[attr-defined]


def test_all_labels_of_a_text_are_shown_and_one_of_several_references() -> None:
    sample = replace(_SAMPLE, references=("sports", "politics"), base="sports", tuned="politics")
    for classes, shown in ((ClassTable(rows=()), "sports politics"), (None, "sports")):
        text = show(started(), Evaluated(6, replace(COMPARISON, samples=(sample,) * 5, classes=classes)))
        name = "label" if classes is not None else "reference"
        assert {line.split(maxsplit=1)[1].strip() for line in text.splitlines() if line.split()[:1] == [name]} == {
            shown
        }
