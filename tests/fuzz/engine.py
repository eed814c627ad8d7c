"""Makes inputs, mutates them, runs the cases, judges the results, and counts."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.fuzz import ggufs, inputs, sandbox
from tests.fuzz.mutations import mutate
from tests.fuzz.sandbox import LITTER, REFUSED, SUCCESS, WRONG, Outcome, Place
from tests.fuzz.targets import TARGETS, Target

#: Failed cases to keep per cause.
_KEPT = 3


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        target: Name of the target.
        seed: Seed of the mutation.
        done: The mutations of each file.
        files: The changed files.
    """

    target: str
    seed: int
    done: tuple[str, ...]
    files: Mapping[str, bytes]


@dataclass
class Tally:
    """The results of one target.

    Attributes:
        kinds: Number of cases by kind of result.
        same: Successes with the same answer as the unchanged input.
        unplaced: Refusals whose message names none of the changed files.
        slowest: Longest processor time of a case in seconds.
        causes: Number of failures by cause.
        seconds: Total time.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    same: int = 0
    unplaced: int = 0
    slowest: float = 0.0
    causes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def failures(self) -> int:
        """Returns the number of failed cases."""
        return sum(count for kind, count in self.kinds.items() if kind not in (SUCCESS, REFUSED))


class Fuzzer:
    """Makes and runs cases.

    Args:
        root: An empty folder.
        names: Names of the targets.
        failures: Folder for failed cases; None to keep none.
    """

    def __init__(self, root: Path, names: list[str], failures: Path | None = None) -> None:
        self._root = root
        self._shared = root / "shared"
        self._failures = failures
        self._place = Place(root / "place")
        self._pristine = {name: root / "pristine" / name for name in names}
        self._answers: dict[str, Any] = {}
        self._meanings: dict[str, dict[str, Any]] = {}
        self._current = ""
        self.tallies = {name: Tally() for name in names}
        self._shared.mkdir(parents=True)
        self._make("model", lambda: inputs.write_folder(self._shared / "model"))
        self._make("data", lambda: inputs.write_data(self._shared / "data"))
        if "gguf" in names:
            self._make("GGUF", lambda: inputs.write_gguf_file(self._shared / "model.gguf", self._shared / "model"))
        if {"run", "checkpoint"} & set(names):
            rows = self._shared / "data" / "rows.jsonl"
            self._make("run", lambda: inputs.write_run(self._shared / "run", self._shared / "model", rows))
        for name in names:
            self._begin(TARGETS[name])

    def case(self, name: str, seed: int) -> Case:
        """Returns the case of a seed, which depends only on the seed and the input."""
        rng = Random(f"{name} {seed}")
        kinds = TARGETS[name].kinds
        # Mostly one file is changed, because an error in one file hides those in others.
        chosen = [rng.choice(sorted(kinds))] if rng.random() < 0.9 else sorted(kinds)
        files, done = {}, []
        for file in chosen:
            content = (self._pristine[name] / file).read_bytes()
            files[file], what = mutate(content, kinds[file], rng)
            done.append(f"{file}: {what}")
        return Case(name, seed, tuple(done), files)

    def run(self, case: Case) -> Outcome:
        """Runs and counts a case, and keeps it if it failed."""
        began = time.monotonic()
        target, tally = TARGETS[case.target], self.tallies[case.target]
        self._enter(case.target)
        for file, content in case.files.items():
            (self._place.input / file).write_bytes(content)
        before = sandbox.digest(self._place.input)
        outcome = self._run(target)
        if not outcome.failed:
            outcome = self._judge(target, case, outcome, before)
        tally.kinds[outcome.kind] += 1
        tally.same += outcome.kind == SUCCESS and outcome.answer == self._answers[case.target]
        tally.slowest = max(tally.slowest, outcome.cpu_s)
        tally.seconds += time.monotonic() - began
        if outcome.kind == REFUSED:
            names = [*(Path(file).name for file in case.files), target.option]
            tally.unplaced += not any(name in outcome.message for name in names if name)
        if outcome.failed:
            tally.causes[outcome.cause] += 1
            if tally.causes[outcome.cause] <= _KEPT:
                self._keep(case, outcome)
        for file in case.files:
            shutil.copyfile(self._pristine[case.target] / file, self._place.input / file)
        return outcome

    def replay(self, path: Path) -> tuple[Case, Outcome]:
        """Repeats a case that was kept."""
        kept = json.loads(path.read_text())
        old, new = kept["root"].encode(), str(self._root).encode()
        files = {file: base64.b64decode(text).replace(old, new) for file, text in kept["files"].items()}
        case = Case(kept["target"], kept["seed"], tuple(kept["done"]), files)
        return case, self.run(case)

    def _run(self, target: Target) -> Outcome:
        shutil.rmtree(self._place.out, ignore_errors=True)
        return sandbox.run(lambda: target.act(self._place.input, self._place.out), self._place)

    def _judge(self, target: Target, case: Case, outcome: Outcome, before: str) -> Outcome:
        """Checks a case that succeeded or was refused."""
        if litter := self._place.litter():
            for path in litter:
                Path(path).unlink()
            return replace(outcome, kind=LITTER, message="\n".join(litter), cause=f"leaves {Path(litter[0]).name}")
        if sandbox.digest(self._place.input) != before:
            shutil.rmtree(self._place.input)
            self._current = ""
            return replace(outcome, kind=LITTER, message="the input was changed", cause="changes its input")
        if outcome.kind == REFUSED:
            return outcome
        if target.fixed or self._means_the_same(target, case):
            if outcome.answer != self._answers[target.name]:
                return _wrong(outcome, self._answers[target.name], "the answer changed, but not the input")
            return outcome
        if target.expect is None:
            return outcome
        expect = target.expect
        read = sandbox.run(lambda: dict(expect(self._place.input)), self._place)
        if read.kind != SUCCESS:
            if target.strict:
                return _wrong(outcome, read.message[-1000:], "accepts an input that the reference refuses")
            return outcome
        for key, value in read.answer.items():
            if outcome.answer[key] != value:
                return _wrong(outcome, read.answer, f"{key} differs from the reference")
        return outcome

    def _means_the_same(self, target: Target, case: Case) -> bool:
        known = self._meanings[target.name]
        return all(_meaning(content, target.kinds[file]) == known[file] for file, content in case.files.items())

    def _make(self, what: str, make: Any) -> Outcome:
        made = sandbox.run(lambda: str(make()), self._place, limited=False)
        if made.kind != SUCCESS:
            raise AssertionError(f"the {what} cannot be made: {made.message}")
        return made

    def _begin(self, target: Target) -> None:
        """Makes the input of a target and records the answer to it."""
        folder = self._pristine[target.name]
        folder.mkdir(parents=True)
        self._make(f"input of {target.name}", lambda: target.make(folder, self._shared))
        self._enter(target.name)
        sandbox.warm_up(lambda: target.act(self._place.input, self._place.out))
        outcome = self._run(target)
        if outcome.kind != SUCCESS:
            raise AssertionError(f"the unchanged input of {target.name} fails: {outcome.kind} {outcome.message}")
        self._answers[target.name] = outcome.answer
        self._meanings[target.name] = {
            file: _meaning((folder / file).read_bytes(), kind) for file, kind in target.kinds.items()
        }
        if litter := self._place.litter():
            raise AssertionError(f"the unchanged input of {target.name} leaves {litter}")
        if target.expect is not None:
            expect = target.expect
            read = sandbox.run(lambda: dict(expect(self._place.input)), self._place)
            agreed = read.kind == SUCCESS and all(outcome.answer[key] == value for key, value in read.answer.items())
            assert agreed, f"{target.name}: the reference reads {read.message or read.answer}, Ingle {outcome.answer}"

    def _enter(self, name: str) -> None:
        """Copies the unchanged input of a target."""
        if self._current != name:
            shutil.rmtree(self._place.input, ignore_errors=True)
            shutil.copytree(self._pristine[name], self._place.input)
            self._current = name

    def _keep(self, case: Case, outcome: Outcome) -> None:
        if self._failures is None:
            return
        self._failures.mkdir(parents=True, exist_ok=True)
        path = self._failures / f"{case.target}-{case.seed}.json"
        content = {
            "replay": f"{sys.executable} -m tests.fuzz --replay {path}",
            **asdict(outcome),
            "target": case.target,
            "seed": case.seed,
            "done": case.done,
            "root": str(self._root),
            "files": {file: base64.b64encode(data).decode() for file, data in case.files.items()},
        }
        path.write_text(json.dumps(content, indent=1))


def _wrong(outcome: Outcome, expected: Any, cause: str) -> Outcome:
    message = f"answer   {json.dumps(outcome.answer)[:1500]}\nexpected {json.dumps(expected)[:1500]}"
    return replace(outcome, kind=WRONG, message=message, cause=cause)


def _meaning(content: bytes, kind: str) -> Any:
    """What a file says, so that changes which say the same can be told; its bytes where there is nothing shorter."""
    try:
        if kind == "json":
            return json.loads(content, object_pairs_hook=_unique)
        if kind == "jsonl":
            return [json.loads(line, object_pairs_hook=_unique) for line in content.split(b"\n") if line.strip()]
        if kind == "yaml" and len(content) < 4096:
            return yaml.safe_load(content)
        if kind == "gguf":
            file = ggufs.parse(content)
            file.values.sort(key=lambda value: value.key)
            return file
    except (ValueError, RecursionError, KeyError, IndexError, struct.error, yaml.YAMLError):
        pass
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object none of whose keys stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
