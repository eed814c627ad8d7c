"""Runs ``ingle`` commands and programs of pages in one process, which loads the libraries once.

Each line of standard input is a request as JSON: ``words`` of a command line or ``python`` source, and a ``folder``.
Each answer is a line with the exit code. Output of the commands goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    """Answers requests until the end of input."""
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for line in requests:
        request = json.loads(line)
        os.chdir(request["folder"])
        code = _run(request)
        sys.stdout.flush()
        sys.stderr.flush()
        print(code, file=answers, flush=True)


def _run(request: dict[str, Any]) -> int:
    if "words" in request:
        from ingle.cli.exit_status import run_command

        return run_command(request["words"])
    try:
        exec(compile(request["python"], "<page>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
