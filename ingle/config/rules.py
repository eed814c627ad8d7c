"""What no single option can know: the tables of combinations that make no sense.

A row says when it applies, what is wrong, which options it concerns and what to type instead.  All rows are looked
at, and everything that is wrong is reported at once.
"""

from __future__ import annotations

from ingle.config.evaluate import TaskConfig
from ingle.config.problems import Problem, raise_problems
from ingle.config.rule import Rule, S
from ingle.config.run import Run
from ingle.config.run_rules import RUN_RULES
from ingle.config.section import Section
from ingle.config.task_rules import TASK_RULES, task_rules


def find_violations(section: Section) -> list[Problem]:
    """Every rule that ``section``, a run or a task, breaks."""
    if isinstance(section, TaskConfig):
        return _check(section, TASK_RULES)
    assert isinstance(section, Run)
    found = _check(section, RUN_RULES)
    if section.evaluate is not None:
        found += _check(section.evaluate, task_rules("evaluate."))
    return found


def check(section: Run | TaskConfig) -> None:
    """Raises a :class:`~ingle.errors.ConfigError` with every rule that ``section`` breaks.

    The loader does this for files; whoever builds a run in Python calls it.
    """
    raise_problems(find_violations(section))


def _check(section: S, rules: tuple[Rule[S], ...]) -> list[Problem]:
    return [Problem(rule.message(section), rule.where, rule.fix(section)) for rule in rules if rule.applies(section)]
