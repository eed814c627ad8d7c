from __future__ import annotations

import yaml

from ingle.config.loader import load_run
from ingle.config.origin import to_yaml


def test_comments_stand_behind_their_options_and_change_nothing() -> None:
    loaded = load_run(None, ["--model.id=m", "--data.sources=[a, b]", "--output=o # p", "--data.system='x # y'"])
    text = to_yaml(loaded.run, loaded.origins)
    assert "  lr: 0.0002  # default\n" in text
    assert "  id: m  # flag\n" in text
    assert "    - path: a  # flag\n" in text
    assert "      layout: auto  # default\n" in text
    assert "  system: 'x # y'  # flag\n" in text
    assert yaml.safe_load(text)["data"] == loaded.run.model_dump(mode="json")["data"]
    assert all("  # " in line for line in text.splitlines() if not line.endswith(":"))
