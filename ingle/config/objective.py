"""``objective:`` the training objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ingle.config.section import Section, tagged


class Clm(Section):
    """Causal language modelling: the loss covers every token."""

    kind: Literal["clm"]


class Sft(Section):
    """Supervised fine-tuning: the loss covers only the answers."""

    kind: Literal["sft"] = "sft"


_Objective = Annotated[Clm | Sft, Field(discriminator="kind")]
ObjectiveConfig = Annotated[_Objective, tagged("kind", default="sft", input_type=_Objective | Literal["clm", "sft"])]
