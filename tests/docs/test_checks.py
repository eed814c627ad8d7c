"""Each check of the documentation finds its kind of problem, and the project has none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from docs import check, commands, generate
from docs.markdown import Block, Page
from tests.docs.running import Runner

ROOT = Path(check.ROOT)


def block(language: str, text: str) -> Block:
    return Block("page.md", 1, language, (), text)


def problems_of(page: Page) -> list[str]:
    return list(commands.wrong_blocks([page], ROOT))


def test_the_documentation_of_this_project_has_no_problem() -> None:
    assert list(check.problems()) == []


def test_an_outdated_reference_page_is_found(tmp_path: Path) -> None:
    reference = tmp_path / "docs" / "reference"
    reference.mkdir(parents=True)
    for name, text in generate.pages().items():
        (reference / name).write_text(text)
    assert list(check.stale_pages(tmp_path)) == []
    (reference / "config.md").write_text(generate.config_page().replace("`optim.lr`", "`optim.rate`"))
    (reference / "extra.md").write_text("# Extra\n")
    assert [problem.split(":")[0] for problem in check.stale_pages(tmp_path)] == [
        "docs/reference/config.md",
        "docs/reference/extra.md",
    ]


def test_generated_pages_name_every_option_error_and_format() -> None:
    pages = generate.pages()
    for option in generate.options():
        assert f"`{option.path}`" in pages["config.md"]
    for kind in generate.errors.IngleError.__subclasses__():
        assert f"`{kind.__name__}`" in pages["errors.md"]
    assert "| `nf4` | 4.127 |" in pages["formats.md"]  # 4 + (8 + 32/256) / 64 bits
    assert "## ingle train" in pages["cli.md"]


def test_dead_links_and_lost_pages_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text("")
    text = {
        "docs/index.md": "# Start here\n[a](a.md#two-words-x) [b](a.md#three) [c](gone.md)\n"
        "[d](../code.py) [e](#start-here) [web](https://example.org/gone) `[code](gone.md)`\n",
        "docs/a.md": "# Two `words` x\n",
        "docs/lost.md": "# Lost\n",
    }
    for name, content in text.items():
        (tmp_path / name).write_text(content)
    problems = list(check.dead_links([Page(name, content) for name, content in text.items()], tmp_path))
    assert len(problems) == 3
    assert "a.md#three" in problems[0]
    assert "gone.md" in problems[1]
    assert problems[2] == "docs/lost.md: no page links here"


def test_equal_headings_get_numbered_anchors() -> None:
    assert Page("a.md", "# Same\n\n# Same\n").anchors == {"same", "same-1"}


def test_placeholders_and_a_long_readme_are_found() -> None:
    mark = "FI" + "LL"
    assert list(check.placeholders([Page("README.md", f"fine\n{mark}: tokens/s\nFULFILLED\n")])) == [
        f"README.md:2: {mark} marks missing text"
    ]
    assert list(check.long_readme([Page("README.md", "x\n" * 200)])) == []
    assert len(list(check.long_readme([Page("README.md", "x\n" * 201)]))) == 1


@pytest.mark.parametrize(
    "text",
    ["see /wor" + "k/main/x.py", "/hom" + "e/ann/x", "https://pyp" + "i.org/p", "https://downloa" + "d.pytorch.org/w"],
)
def test_leaks_are_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.md").write_text(f"fine\n{text}\n")
    assert len(list(check.leaks(tmp_path, ["a.md"]))) == 1


def test_ordinary_paths_are_not_leaks(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("docs/wor" + "k/x, runs/demo, ../wor" + "k/y, https://pytorch.org/get-started\n")
    assert list(check.leaks(tmp_path, ["a.md"])) == []


def test_an_undocumented_raise_is_found(tmp_path: Path) -> None:
    (tmp_path / "ingle").mkdir()
    body = '    """Does it.{}"""\n    raise DataError("no")\n'
    text = "def documented():\n" + body.format("\n\n    Raises:\n        DataError: Always.\n    ")
    text += "def silent():\n" + body.format("") + "def _private():\n" + body.format("")
    (tmp_path / "ingle" / "a.py").write_text(text)
    problems = list(check.silent_raises(tmp_path, ["ingle/a.py"]))
    assert len(problems) == 1
    assert "silent raises DataError" in problems[0]


def test_names_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "ingle" / "b").mkdir(parents=True)
    (tmp_path / "ingle" / "__init__.py").write_text("")
    (tmp_path / "ingle" / "b" / "__init__.py").write_text("def here(): ...\n")
    roles = ("func:`ingle.b.here`", "mod:`ingle.b`", "func:`ingle.b.gone`", "mod:`ingle.gone`")
    (tmp_path / "ingle" / "a.py").write_text("".join(f'""":{role}"""\n' for role in roles))
    problems = list(check.dead_references(tmp_path, ["ingle/a.py"]))
    assert [problem.split()[3] for problem in problems] == ["ingle.b.gone,", "ingle.gone,"]
    page = Page("a.md", "`ingle/a.py`, `b/__init__.py`, `b/gone.py`")
    assert list(check.missing_files([page], tmp_path)) == ["a.md: names b/gone.py, which is not there"]


def test_a_loose_constraint_is_found(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\nnumpy>=2\nx @ file:///a\n")
    assert len(list(check.unpinned(tmp_path))) == 2


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("ingle train examples/demo/demo.yaml --optim.lr=1e-4", None),
        (".venv/bin/ingle config show examples/demo/demo.yaml --base.format=nf4", None),
        ("make demo && ingle --help", None),
        ("ingle generate runs/demo --prompt 'a | b && c; d'", None),
        ("ingle generate runs/demo --prompt $'a\\nb' | frobnicate", "frobnicate is not in the list"),
        ("ingle train examples/demo/demo.yaml --optim.rl=1e-4", "there is no option optim.rl"),
        ("ingle train examples/demo/none.yaml", "examples/demo/none.yaml does not exist"),
        ("ingle trian x.yaml", "there is no command"),
        ("ingle generate runs/demo --prompt Hi --max-tokens 3", "has no option --max-tokens"),
        ("make everything", "make has no target everything"),
        ("apt install x", "apt is not in the list"),
    ],
)
def test_commands_that_do_not_exist_are_found(command: str, problem: str | None) -> None:
    problems = list(commands.wrong_command(command, ROOT))
    assert len(problems) == (problem is not None), problems
    assert problem is None or problem in problems[0]


def test_commands_are_read_from_console_blocks() -> None:
    text = "$ ingle train \\\n    a.yaml\nstep 1\n$ ls\n"
    assert [command.split() for command in commands.shown_commands(block("console", text))] == [
        ["ingle", "train", "a.yaml"],
        ["ls"],
    ]


@pytest.mark.parametrize(
    ("language", "text", "wrong"),
    [
        ("python", "import ingle\n", 0),
        ("python", "import ingle(\n", 1),
        ("jsonl", '{"a": 1}\n{"a": 2}\n', 0),
        ("jsonl", '{"a": 1}\n{"a": 2\n', 1),
        ("yaml", "optim: {lr: 1.0e-4}\n", 0),
        ("yaml", "optim: {rate: 1.0e-4}\n", 1),
        ("yaml", "data: {sources: [{path: a.jsonl, columns: {prompt: q}}]}\n", 0),
        ("yaml", "model: {id: m}\ndata: {sources: [a.jsonl]}\noutput: runs/a\n", 0),
        ("yaml", "model: {id: m}\ndata: {sources: []}\noutput: runs/a\n", 1),
        ("yaml", "services: {anything: goes}\n", 0),
        ("bash", "ls\n", 1),
    ],
)
def test_blocks_that_cannot_be_used_are_found(language: str, text: str, wrong: int) -> None:
    assert len(problems_of(Page("page.md", f"```{language}\n{text}```\n"))) == wrong


def test_commands_that_fail_are_found(tmp_path: Path) -> None:
    text = (
        "```text file=a/b.txt\nhello\n```\n```console\n$ cat a/b.txt\n$ ls nowhere\n$ ollama create m -f a/none\n```\n"
    )
    runner = Runner(None, ROOT, verifies=False)  # type: ignore[arg-type]  # the page has no command of ingle
    failures = list(runner.run_page(Page("page.md", text), tmp_path))
    assert [failure.split("\n")[0] for failure in failures] == [
        "page.md:4: ls nowhere",
        "page.md:4: ollama create m -f a/none",
    ]
    assert "'a/none'" in failures[1]


def test_the_project_is_listed_through_git(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("ignored.md\n")
    for name in ("new.md", "ignored.md"):
        (tmp_path / name).write_text("# x\n")
    assert [page.name for page in check.read_pages(tmp_path)] == ["new.md"]
