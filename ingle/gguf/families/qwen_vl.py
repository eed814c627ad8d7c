"""The text parts of Qwen 2 VL, 2.5 VL and 3 VL: Qwen 2 and 3 whose rotary embeddings have a section for each axis.

A text has the same position on all axes, so a file is read as the plain text model. The sections stay in its config:
they only matter together with images, and tell its architecture when it is written again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.family import Config, GgufFamily
from ingle.gguf.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from ingle.gguf.rotary import rotary_parameters

SECTIONS = "mrope_section"


def with_axes(plain: GgufFamily, architecture: str, *model_types: str) -> GgufFamily:
    """Returns the family of a text model as the part of a multimodal one.

    Args:
        plain: The family of the text model.
        architecture: llama.cpp's name.
        model_types: Model types of the text part.

    Raises:
        GgufError: By its reader: the file lacks the sections of the rotary embeddings.
    """

    def read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
        config, sections = plain.read_config(file, values), values.get("rope.dimension_sections")
        if not isinstance(sections, list) or len(sections) < 3:
            raise GgufError(
                "The sections of the rotary embeddings are missing.",
                where=f"{file.path}, {architecture}.rope.dimension_sections",
            )
        config["rope_parameters"][SECTIONS] = sections[:3]
        return config | {"model_type": plain.model_type}

    def metadata(config: Config) -> dict[str, Any]:
        sections = rotary_parameters(config).get(SECTIONS)
        if sections is None:
            raise GgufError("The config has no sections of the rotary embeddings.", where=f"rope_parameters.{SECTIONS}")
        return dict(plain.write_metadata(config)) | {"rope.dimension_sections": [*sections, 0]}

    first, *others = model_types
    return replace(
        plain,
        architecture=architecture,
        model_type=first,
        also=tuple(others),
        read_config=read,
        write_metadata=metadata,
    )


QWEN2_VL = with_axes(QWEN2, "qwen2vl", "qwen2_5_vl_text", "qwen2_vl_text")
QWEN3_VL = with_axes(QWEN3, "qwen3vl", "qwen3_vl_text")
QWEN3_VL_MOE = with_axes(QWEN3_MOE, "qwen3vlmoe", "qwen3_vl_moe_text")

#: By model type of the plain text model.
WITH_AXES = {QWEN2.model_type: QWEN2_VL, QWEN3.model_type: QWEN3_VL, QWEN3_MOE.model_type: QWEN3_VL_MOE}
