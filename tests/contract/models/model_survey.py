"""Tries every type of models: ``python -m tests.contract.models.model_survey`` writes the table of the release."""

from __future__ import annotations

from dataclasses import replace

import transformers

from ingle.models.kinds import ModelKind
from ingle.models.survey import as_kind, known_types, survey
from ingle.planning.model_types import ModelType, write_table
from tests.contract.models.tiny_types import (
    default_config,
    small_config,
    small_encoder_config,
    small_encoder_decoder_config,
)


def survey_type(name: str, kind: ModelKind) -> ModelType:
    """Returns how Ingle trains a type with a small config, or else with its default config."""
    small = {
        "causal": small_config,
        "encoder": small_encoder_config,
        "encoder_decoder": small_encoder_decoder_config,
    }[kind]
    found = ModelType(name, kind)
    for make in (small, default_config):
        try:
            config = as_kind(make(name), kind)
            found = replace(survey(config, kind), name=name)  # some share the config of another type
        except Exception as error:  # configs fail in many ways with sizes that they do not expect
            found = ModelType(name, kind, reason=f"no small config of it can be made ({type(error).__name__})")
        if found.layout is not None:
            break
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write_table(transformers.__version__, [survey_type(name, kind) for name, kind in known_types()])
