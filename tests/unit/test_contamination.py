"""Held-out rows in the training data: a warning before the run and a line in its report."""

from __future__ import annotations

from dataclasses import asdict, replace

from ingle.assembly import warn_of_contamination
from ingle.config import Run
from ingle.data import Contamination, ContaminationSearch
from ingle.data.types import Example
from ingle.report.run_details import list_facts
from tests.stored_results import REPORT

TRAINING = [(f"what is {i}?", str(i)) for i in range(4)]


def search(*held_out: tuple[str, str]) -> Contamination:
    """Held-out rows ``h:1``, ``h:2``, ... searched for in ``t:1`` to ``t:4``."""
    found = ContaminationSearch([pair(f"h:{number}", *row) for number, row in enumerate(held_out, 1)])
    for number, row in enumerate(TRAINING, 1):
        found.add(pair(f"t:{number}", *row))
    return found.result()


def pair(origin: str, prompt: str, completion: str) -> Example:
    return Example(origin, prompt=prompt, completion=completion)


def test_a_run_warns_and_its_report_says_so() -> None:
    found = search(("What is 2?", "two"), ("what is 3?", "3"), ("new", "3"))
    message = warn_of_contamination(found).message
    assert message.startswith("2 of 3 held-out prompts are in the training data, 1 of them with the same answer")
    assert "(first h:1 = t:3)" in message
    run = Run(model={"id": "m"}, data={"sources": "t.jsonl"}, output="x")  # type: ignore[arg-type]
    facts = {
        label: (value, note) for label, value, note in list_facts(run, replace(REPORT, contamination=asdict(found)))
    }
    assert facts["Held-out rows in the training data"] == ("2 of 3", "1 with the same answer")


def test_nothing_in_common_is_not_found() -> None:
    assert search(("new", "3")).same_prompt == 0
