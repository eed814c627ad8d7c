"""What to do with a finished run, as commands that work when they are pasted."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path


def print_next_steps(folder: Path) -> None:
    """Prints how to read the report of a run, talk with its model, and export it."""
    steps = list(next_steps(folder))
    if steps:
        print("Next:")
        width = max(len(purpose) for purpose, _ in steps)
        for purpose, line in steps:
            print(f"  {purpose:<{width}}  {line}")


def next_steps(folder: Path) -> list[tuple[str, str]]:
    """Purposes and commands; those that the trained model cannot follow are left out."""
    run, ingle = shlex.quote(str(folder)), command_name()
    steps = []
    if (folder / "report.html").is_file():
        page = shlex.quote(str(folder / "report.html"))
        opener = next((name for name in ("xdg-open", "open") if shutil.which(name)), None)
        steps.append(("report", f"{opener} {page}" if opener else f"{page} (open it in a browser)"))
    trained = next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), None)
    if trained is None:
        return steps
    if _has_template(trained):
        steps.append(("chat", f"{ingle} chat {run}"))
        steps.append(("answer", f"{ingle} generate {run} --prompt 'Hello'"))
    else:
        steps.append(("continue a text", f"{ingle} generate {run} --raw --prompt 'Hello'"))
    out = shlex.quote(str(_free(folder / "export")))
    steps.append(("export", f"{ingle} export {run} --to gguf --out {out}"))
    return steps


def command_name() -> str:
    """``ingle`` as the user called it: its name, the path of its script, or ``python -m ingle``."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return f"{shlex.quote(_short(Path(sys.executable)))} -m ingle"
    found = shutil.which("ingle")
    if found is not None and Path(found).resolve() == script.resolve():
        return "ingle"
    return shlex.quote(_short(script)) if script.name == "ingle" else "ingle"


def _short(path: Path) -> str:
    """A path from the current folder, where it lies in it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def _has_template(trained: Path) -> bool:
    """Whether the tokenizer that was saved with a model has a chat template."""
    if (trained / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((trained / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError):
        return False


def _free(path: Path) -> Path:
    """``path``, or one like it where nothing is yet; an export overwrites nothing."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free
