"""Tries every type of models: ``python -m tests.contract.models.model_survey`` writes the table of the release."""

from __future__ import annotations

import transformers

from ingle.models.kinds import ModelKind
from ingle.models.survey import default_config, known_types, survey
from ingle.planning.model_types import ModelType, write_table
from tests.contract.models.tiny_types import small_config, small_encoder_config, small_encoder_decoder_config


def survey_type(name: str, kind: ModelKind) -> ModelType:
    """Returns how Ingle trains a type with a small config, or else with its default config."""
    small = {
        "causal": small_config,
        "encoder": small_encoder_config,
        "encoder_decoder": small_encoder_decoder_config,
    }[kind]
    found = ModelType(name, kind)
    for make in (small, lambda name: default_config(name, kind)):
        try:
            found = survey(make(name), kind)
        except Exception as error:  # configs fail in many ways with sizes that they do not expect
            found = ModelType(name, kind, reason=f"no small config of it can be made ({type(error).__name__})")
        if found.layout is not None:
            break
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write_table(transformers.__version__, [survey_type(name, kind) for name, kind in known_types()])
