from __future__ import annotations

import pytest
import yaml

from ingle.config.base import BaseConfig, Nf4Base, NoBase, base_section, base_sections, format_name
from ingle.config.ggml import MixBase
from ingle.quant import make_format
from ingle.quant.catalog import format_options

PACKED = [
    *(base_section({"format": format_name(s)}) for s in base_sections() if not issubclass(s, MixBase | NoBase)),
    Nf4Base(format="nf4", block_size=128, double_quant=False),
]


@pytest.mark.parametrize("base", PACKED, ids=str)
def test_options_of_a_format_choose_it_again(base: BaseConfig) -> None:
    format = make_format(base)
    assert format is not None
    words = [word.removeprefix("--base.").split("=") for word in format_options(format).split()]
    assert make_format(base_section({key: yaml.safe_load(value) for key, value in words})) == format
