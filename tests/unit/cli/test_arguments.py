from __future__ import annotations

import pytest

from ingle.cli.arguments import split_words
from ingle.errors import ConfigError

KNOWN = ("optim", "seed")


@pytest.mark.parametrize(
    ("words", "plain", "overrides"),
    [
        (None, [], []),
        (["c.yaml", "--optim.lr=1"], ["c.yaml"], ["--optim.lr=1"]),
        (["--optim.lr", "1", "c.yaml"], ["c.yaml"], ["--optim.lr", "1"]),
        (["--seed", "-1", "c.yaml"], ["c.yaml"], ["--seed", "-1"]),
        (["c.yaml", "--a.flag", "--seed=1"], ["c.yaml"], ["--a.flag", "--seed=1"]),
        (["--a.flag", "--seed", "1", "c.yaml"], ["c.yaml"], ["--a.flag", "--seed", "1"]),
        (["--unknown=1"], [], ["--unknown=1"]),
    ],
)
def test_words_are_split(words: list[str] | None, plain: list[str], overrides: list[str]) -> None:
    assert split_words(words, known=KNOWN) == (plain, overrides)


def test_misspelled_options_of_the_command_are_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        split_words(["--dryrun"], known=KNOWN, flags=("--dry-run",))
    assert caught.value.fix == "did you mean --dry-run?"
    with pytest.raises(ConfigError, match="-l is not an option"):
        split_words(["-l"], known=KNOWN)
