"""The commands and programs that the pages tell a reader to run do run."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import check, commands
from docs.markdown import Page, read_pages

ROOT = Path(check.ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in read_pages(ROOT) if commands.runnable(page)], ids=lambda page: page.name
)
def test_a_page_runs_from_top_to_bottom(page: Page, tmp_path: Path) -> None:
    commands.run_page(page, tmp_path, ROOT)
