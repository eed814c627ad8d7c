"""Loads reward functions, and calls each with its own signature.

- TRL: ``f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric)`` takes all answers to
  a prompt and returns a list. Of a conversation, an answer is a list of one message.
- verl: ``f(data_source, solution_str, ground_truth, extra_info)`` takes one answer and returns a number, or a dict with
  ``score``.
- ``f(prompt, completion, **columns)`` takes one answer and returns a number.

Any of them may be ``async``. A function gets only the arguments that it has parameters for.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ingle.errors import RewardError
from ingle.rewards import judge, rules
from ingle.wording import either

#: Names that a function has if a file has several and none is chosen.
_USUAL = ("reward", "compute_score")


@dataclass(frozen=True)
class Answers:
    """Answers to one prompt, in the child process; the fields are those of :class:`~ingle.rewards.scores.Group`."""

    prompt: Any
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Any]
    finished: Sequence[bool]
    state: Mapping[str, float]

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Answers:
        """Returns the answers of a request."""
        return cls(**{name: request[name] for name in cls.__dataclass_fields__})

    def __len__(self) -> int:
        return len(self.completions)

    def each(self) -> Iterator[Answers]:
        """Yields each answer alone."""
        for at in range(len(self)):
            part = slice(at, at + 1)
            yield replace(
                self,
                completions=self.completions[part],
                completion_ids=self.completion_ids[part],
                finished=self.finished[part],
            )


@dataclass
class Log:
    """What a function logs during a call."""

    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def add_extra(self, column: str, values: Sequence[Any]) -> None:
        """Logs a value for each answer."""
        self.extra[str(column)] = list(values)

    def add_metric(self, name: str, value: float) -> None:
        """Logs a number for the call."""
        self.metrics[str(name)] = float(value)

    def as_frame(self, count: int) -> dict[str, Any]:
        """Returns what belongs into the frame of the call, which has scored ``count`` answers."""
        return {
            "extra": {name: values for name, values in self.extra.items() if len(values) == count},
            "metrics": self.metrics,
        }


@dataclass(frozen=True)
class Scorer:
    """A reward, ready to be called.

    Attributes:
        score: Returns a value for each answer, of any type.
        is_per_answer: Whether answers are scored one by one; otherwise the function may compare them.
    """

    score: Callable[[Answers, Log], list[Any]]
    is_per_answer: bool = True


def load(options: Mapping[str, Any]) -> Scorer:
    """Returns the scorer of a reward.

    Args:
        options: The options of a section of :mod:`ingle.config.rewards`.

    Raises:
        RewardError: A function or prompt cannot be found, or an option is invalid.
    """
    if options["kind"] == "function":
        function = find_function(options["path"], options["function"])
        return adapt(function, options["where"])
    if options["kind"] == "judge":
        opened = judge.Judge(options)
        return Scorer(lambda answers, log: opened.score(answers, log.add_extra), is_per_answer=False)
    rule = rules.make(options)
    return Scorer(
        lambda answers, log: [rule(answers.completions[0], answers.completion_ids[0], answers.columns)],
    )


def find_function(path: str, name: str | None) -> Callable[..., Any]:
    """Returns a function of a file or of an installed module.

    Args:
        path: The file, or the name of the module.
        name: Its name; None for ``reward``, ``compute_score``, or the only public function.

    Raises:
        RewardError: There is no such file, module or function.
    """
    module = _import_file(Path(path)) if path.endswith(".py") else _import_module(path)
    own = [
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    functions = [key for key in own if not inspect.isclass(getattr(module, key))]
    usual = [key for key in _USUAL if callable(getattr(module, key, None))]
    chosen = name or (usual + functions if usual or len(functions) == 1 else [None])[0]
    if chosen is None or not callable(getattr(module, chosen, None)):
        raise RewardError(
            f"There is no function {chosen} in {path}." if chosen else f"{path} has no function with a usual name.",
            where=path,
            why=f"its functions are {', '.join(functions[:8]) or 'none'}",
            fix=f"name one: {{path: {path}, function: NAME}}, or call it {either(_USUAL)}",
        )
    return getattr(module, chosen)  # type: ignore[no-any-return]


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise RewardError(
            "The file of a reward function does not exist.",
            where=str(path),
            fix="name a Python file, or an installed module without .py",
        )
    sys.path.insert(0, str(path.resolve().parent))  # for modules in the same folder
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        file, colon, function = name.partition(":")
        raise RewardError(
            "The module of a reward function is not installed.",
            where=name,
            why=str(error),
            fix=f"write {{path: {file}, function: {function}}}" if colon else "name an installed module, or a file .py",
        ) from None


def adapt(function: Callable[..., Any], where: str) -> Scorer:
    """Returns a scorer that calls a function with the arguments of its signature.

    Args:
        function: A function, or an object that can be called.
        where: The option, for the error.

    Raises:
        RewardError: The function has the parameters of none of the signatures.
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    required = {
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }
    if "environments" in required:
        raise RewardError(
            "The function needs the environments of an agent, and answers are sampled without them.", where=where
        )

    def call(arguments: Mapping[str, Any]) -> Any:
        missing = sorted(required - arguments.keys())
        if missing:
            raise LookupError(f"the row has no column {either(missing)}")
        given = arguments if takes_any else {key: value for key, value in arguments.items() if key in parameters}
        result = function(**given)
        return asyncio.run(_wait(result)) if inspect.isawaitable(result) else result

    if "solution_str" in parameters:
        return Scorer(lambda answers, log: [_verl_score(call(_for_verl(answers)), log)])
    if "completion" in parameters:
        return Scorer(lambda answers, log: [call(_for_one(answers))])
    if takes_any or parameters.keys() & {"completions", "completion_ids"}:
        return Scorer(lambda answers, log: list(call(_for_trl(answers, log))), is_per_answer=False)
    raise RewardError(
        "The parameters of the function are those of no known signature.",
        where=where,
        why=f"it has {', '.join(parameters) or 'none'}",
        fix="take (completions, **kwargs) as in TRL, (solution_str, ground_truth) as in verl, or (prompt, completion)",
    )


async def _wait(result: Any) -> Any:
    return await result


def _for_trl(answers: Answers, log: Log) -> dict[str, Any]:
    is_chat = not isinstance(answers.prompt, str)
    reserved = ("prompt", "completion", "completion_ids")
    columns = {name: [value] * len(answers) for name, value in answers.columns.items() if name not in reserved}
    return columns | {
        "prompts": [answers.prompt] * len(answers),
        "completions": [[{"role": "assistant", "content": text}] if is_chat else text for text in answers.completions],
        "completion_ids": list(answers.completion_ids),
        "finished": list(answers.finished),
        "trainer_state": SimpleNamespace(**answers.state),
        "log_extra": log.add_extra,
        "log_metric": log.add_metric,
    }


def _for_one(answers: Answers) -> dict[str, Any]:
    own = {"prompt": answers.prompt, "completion": answers.completions[0], "completion_ids": answers.completion_ids[0]}
    return dict(answers.columns) | own | {"finished": answers.finished[0]}


def _for_verl(answers: Answers) -> dict[str, Any]:
    columns = dict(answers.columns)
    truth = columns.pop("reward_model", None)
    if isinstance(truth, Mapping) and "ground_truth" in truth:
        columns["ground_truth"] = truth["ground_truth"]
    return {"data_source": None, "extra_info": {}} | columns | {"solution_str": answers.completions[0]}


def _verl_score(result: Any, log: Log) -> Any:
    if not isinstance(result, Mapping):
        return result
    for name, value in result.items():
        if name != "score":
            log.add_extra(name, [value])
    return result["score"]
