"""Filling a skeleton: weights are read tensor by tensor, converted, quantized on the way and put in place.

No more than one group of tensors (mostly one tensor) is in memory besides the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ingle.config.model import ModelConfig
from ingle.errors import ModelError, QuantizationError
from ingle.events import Progress, Sink, Warned
from ingle.models.boundary import COMPARE_CONFIG, read_object, reading
from ingle.models.loading.architecture import bitnet_divides, build, config_path, read_json
from ingle.models.loading.computed import compute, seeded
from ingle.models.loading.gguf_model import is_gguf, open_gguf, plan_gguf, read_gguf_generation_config
from ingle.models.loading.gguf_weights import GgufWeight
from ingle.models.loading.hub import Part, locate
from ingle.models.loading.placement import Destination
from ingle.models.loading.reading_plan import (
    Converted,
    Experts,
    Group,
    Plain,
    QuantizedWeight,
    ReadingPlan,
    plan_reading,
    refuse_other_shapes,
)
from ingle.models.loading.safetensors_files import read_index
from ingle.wording import some

_COMPARE_GENERATION = "remove the file, or compare it with the one that the model was published with"


def load_weights(
    model: PreTrainedModel,
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    sink: Sink | None = None,
) -> None:
    """Gives every parameter and buffer of a skeleton its value.

    Args:
        model: A skeleton, perhaps with packed and adapted modules.
        config: Which weights.
        device: Where they go.
        dtype: Compute type.
        seed: Of the random initialisation (``init: random``), which needs the whole model in float32 besides.
        sink: Told of progress and of weights that fit nowhere.

    Raises:
        ModelError: A file is missing or damaged, or a weight is missing or of another shape.
        QuantizationError: When a weight cannot be packed.
    """
    twin = build(model.config, dtype, trust_remote_code=config.trust_remote_code)
    if config.init == "random":
        _read_generation_config(model, config, part="small")
        destination = Destination(model, twin, torch.device(device), sink)
        _fill_random(destination, twin, seed)
    else:
        plan, folder = plan_weights(model, config, twin)
        refuse_other_shapes(plan, twin)  # before memory is asked for
        destination = Destination(model, twin, torch.device(device), sink)
        for done, group in enumerate(plan.groups):
            read_group(group, destination, twin, folder)
            if sink is not None and (done % 32 == 0 or done + 1 == len(plan.groups)):
                sink(Progress("reading weights", done + 1, len(plan.groups)))
        _refuse_missing(destination, twin, plan, folder, sink)
    with reading(config_path(config), "transformers cannot compute what these settings ask for.", fix=COMPARE_CONFIG):
        computed = compute(twin, destination.device, known=destination.filled, seed=seed)
    for name in computed:
        destination.put(name, twin.get_parameter_or_buffer(name).detach())
    destination.finish()
    assert destination.left() == 0, f"{destination.left()} parameters got no value"
    assert not any(buffer.is_meta for buffer in model.buffers()), "a buffer got no value"


def plan_weights(model: PreTrainedModel, config: ModelConfig, twin: PreTrainedModel) -> tuple[ReadingPlan, Path]:
    """What is to be read, and the folder or file it lies in; the model gets the generation settings found there.

    Raises:
        ModelError: When a file is missing or damaged.
        HubUnavailable: When the hub is needed and cannot be reached.
    """
    place = _read_generation_config(model, config, part="weights")
    if is_gguf(config.id):
        from ingle.gguf import read_gguf

        return plan_gguf(twin, read_gguf(place)), place
    return plan_reading(twin, read_index(place), bitnet_divides=bitnet_divides(read_json(place, config))), place


def read_group(group: Group, destination: Destination, twin: PreTrainedModel, folder: Path) -> None:
    """Reads one group of tensors and puts it in its place."""
    match group:
        case Plain():
            destination.read(group.target, group.stored)
        case Experts():
            for expert, parts in enumerate(group.parts):
                value = torch.cat([part.read() for part in parts]) if len(parts) > 1 else parts[0].read()
                destination.put_expert(group.target, expert, value)
            destination.finish_experts(group.target, len(group.parts))
        case Converted():
            for name, value in _convert(group, twin, folder):
                destination.put(name, value)
        case QuantizedWeight():
            tensors = {key: part.read() for key, part in group.parts.items()}
            destination.put_quantized(group.target, tensors, divides=group.divides)
        case GgufWeight():
            destination.put_gguf(group)


def _convert(group: Converted, twin: PreTrainedModel, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors of a group and runs transformers' conversion."""
    try:
        values = group.transform.convert(group.target, model=twin, config=twin.config)
    except (ModelError, QuantizationError):
        raise
    except Exception as error:
        raise ModelError(
            f"The weights of {group.target} cannot be converted.",
            where=str(folder),
            why=f"{type(error).__name__}: {error}",
            fix="check that the files belong to this config.json",
        ) from error
    while values:
        name, value = values.popitem()
        yield name, value[0] if isinstance(value, list) else value


def _refuse_missing(
    destination: Destination, twin: PreTrainedModel, plan: ReadingPlan, folder: Path, sink: Sink | None
) -> None:
    destination.finish()
    missing = sorted(set(twin.state_dict()) - destination.filled)
    known = tuple(twin._keys_to_ignore_on_load_missing or ())
    missing = [name for name in missing if not any(re.search(pattern, name) for pattern in known)]
    lost = f": {some(plan.unexpected)}" if plan.unexpected else ""
    if missing:
        raise ModelError(
            f"{len(missing)} weights of the model are not in its files: {some(missing)}.",
            where=str(folder),
            why=f"{len(plan.unexpected)} weights in the files fit nowhere{lost}",
            fix="check that the files belong to this config.json",
        )
    if plan.unexpected and sink is not None:
        sink(Warned(f"Weights that fit nowhere were left out{lost}", str(folder), len(plan.unexpected)))


def _fill_random(destination: Destination, twin: PreTrainedModel, seed: int) -> None:
    """The architecture's own initialisation, in float32 on the CPU, so that it is the same on every device."""
    with seeded(seed):
        source = type(twin)(deepcopy(twin.config)).float()
    values = source.state_dict()
    for name in list(values):
        destination.put(name, values.pop(name))


def _read_generation_config(model: PreTrainedModel, config: ModelConfig, *, part: Part) -> Path:
    """Gives the model the generation settings that its files hold; the folder or file they lie in."""
    if is_gguf(config.id):
        file = open_gguf(config.id, revision=config.revision)
        model.generation_config = read_gguf_generation_config(file)
        return file.path
    folder = locate(config.id, revision=config.revision, part=part, code=config.trust_remote_code)
    path = folder / "generation_config.json"
    if path.is_file():
        read_object(path)
        with reading(path, "transformers cannot read generation_config.json.", fix=_COMPARE_GENERATION):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return folder
