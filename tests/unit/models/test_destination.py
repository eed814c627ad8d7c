from __future__ import annotations

from typing import get_args

import pytest
import yaml
from pydantic import TypeAdapter

from ingle.config.base import BaseConfig, Nf4Base
from ingle.config.ggml import MixBase
from ingle.models.destination import name_options
from ingle.quant import make_format

SECTIONS: TypeAdapter[BaseConfig] = TypeAdapter(BaseConfig)
PACKED = [
    *(
        s(format=get_args(s.model_fields["format"].annotation)[0])
        for s in get_args(get_args(BaseConfig)[0])[1:]
        if not issubclass(s, MixBase)
    ),
    Nf4Base(format="nf4", block_size=128, double_quant=False),
]


@pytest.mark.parametrize("base", PACKED, ids=str)
def test_options_of_a_format_choose_it_again(base: BaseConfig) -> None:
    format = make_format(base)
    assert format is not None
    words = [word.removeprefix("--base.").split("=") for word in name_options(format).split()]
    values = {key: yaml.safe_load(value) for key, value in words}
    assert make_format(SECTIONS.validate_python(values)) == format
