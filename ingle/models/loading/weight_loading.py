"""Loads weights into a model on the meta device: reads, converts, quantizes and places them tensor by tensor.

Besides the model, at most one group of tensors (mostly one tensor) is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache as cached
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ingle.config.base import BaseConfig, NoBase
from ingle.config.model import ModelConfig
from ingle.errors import IngleError, ModelError
from ingle.events import Event, Progress, Sink, Warned
from ingle.models.boundary import COMPARE_CONFIG, read_object, reading
from ingle.models.forward.mixers import base_of
from ingle.models.forward.verification import verify
from ingle.models.kinds import ModelTask, task_of
from ingle.models.loading.config_json import bitnet_divides, config_path, read_json, stored_task
from ingle.models.loading.gguf_model import convert_base, is_gguf, open_gguf, plan_gguf, read_gguf_generation_config
from ingle.models.loading.gguf_weights import GgufWeight
from ingle.models.loading.hub import Part, locate
from ingle.models.loading.meta_device import build, compute_dtype, compute_rest, meta_model, seeded
from ingle.models.loading.quantized_cache import QuantizedCache
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
from ingle.models.loading.safetensors_files import StoredTensor, read_index
from ingle.models.loading.turns import Describe, Turn, Turns, Write
from ingle.models.loading.weight_writer import WeightWriter
from ingle.models.text_part import build_wrapper, is_wrapper
from ingle.parallel import Mesh, is_sharded
from ingle.quant.task_heads import is_in_head
from ingle.wording import plural, some


def load_model(
    model: ModelConfig,
    base: BaseConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    sink: Sink | None = None,
    task: ModelTask | None = None,
) -> PreTrainedModel:
    """Loads and verifies a model, in evaluation mode.

    Args:
        model: The config section of the model.
        base: The format of its weights; unquantized if None.
        device: Device of the model.
        seed: Seed of random weights (``init: random``, or a head that the files do not contain).
        sink: Receives progress and warnings.
        task: What its head predicts; tokens if None.

    Raises:
        ModelError: The model cannot be found or read, or is not supported.
        QuantizationError: A weight cannot be quantized to the format.
    """
    dtype = compute_dtype(model.dtype, device)
    loaded = meta_model(model, device, dtype, task or ModelTask())
    convert_base(loaded, model, base if base is not None else NoBase())
    load_weights(loaded, model, device, dtype, seed=seed, sink=sink)
    verify(loaded)
    loaded.eval()
    return loaded


def load_weights(
    model: PreTrainedModel,
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    sink: Sink | None = None,
    mesh: Mesh | None = None,
    offload: bool = False,
    describe: Describe | None = None,
    cache: QuantizedCache | None = None,
) -> dict[str, Any]:
    """Allocates every parameter and buffer of a model on the meta device, and reads or computes its value.

    Modules may be quantized, adapters may wrap them, and FSDP may have sharded them. Parameters of adapters are
    allocated and keep ``requires_grad``, but stay uninitialized. Call :func:`ingle.models.verify` afterwards.

    Args:
        model: The model on the meta device.
        config: The config section of the model.
        device: Device of the weights.
        dtype: Compute dtype.
        seed: Seed of random weights (``init: random``), which temporarily need the whole model in float32 as well.
        sink: Receives progress, and warnings about unused weights.
        mesh: The ranks that load the model together; this process alone if None.
        offload: Keep sharded parameters in host memory.
        describe: Describes each parameter of a model that several ranks load, while one of them has all its rows.
        cache: Where ranks keep the quantized weights of a large model for the next run; nowhere if None.

    Returns:
        The descriptions by the parameters' paths in the model, on every rank.

    Raises:
        ModelError: A file is missing or damaged, or a weight is missing or has another shape.
        QuantizationError: A weight cannot be quantized.
    """
    device = torch.device(device)
    mesh = mesh or Mesh(device)
    architecture = build(model.config, dtype, trust_remote_code=config.trust_remote_code, task=task_of(model))
    with mesh.together():
        if config.init == "random":
            _read_generation_config(model, config, part="small")
            plan, folder = ReadingPlan((), ()), Path()
        else:
            plan, folder = plan_weights(model, config, architecture)
            plan = without_other_heads(plan, architecture, config, sink if mesh.is_main else None)
            refuse_other_shapes(plan, architecture)  # before memory is allocated
    events: list[Event] = []
    shared = mesh.world_size > 1 or any(is_sharded(parameter) for parameter in model.parameters())
    writer = WeightWriter(model, architecture, device, events.append if shared else sink, offload=offload)
    ranks = Turns(mesh, model, writer, events, sink, describe, cache) if shared else None
    if config.init == "random":
        _load(_random_turns(writer, architecture, seed), ranks, None, num_owners=1)
    else:
        # The first of tied weights decides their value; a head with a value of its own then leaves them.
        owners = set((architecture.all_tied_weights_keys or {}).values())
        turns = [
            Turn(each.target, partial(_writes, each, writer, architecture, folder), _sources(each))
            for each in sorted(plan.groups, key=lambda group: group.target not in owners)
        ]
        _load(turns, ranks, sink)
        with mesh.together():
            _refuse_missing(writer, architecture, plan, folder, sink if mesh.is_main else None)
    names = writer.missing()
    with reading(config_path(config), "transformers cannot compute with these settings.", fix=COMPARE_CONFIG):
        compute_rest(architecture, device, names, seed=seed)
    rest = [Turn(name, partial(_rest_writes, writer, architecture, name)) for name in names]
    _load(rest, ranks, None, num_owners=1)
    assert not writer.missing(), f"{writer.missing()} have no value"
    return ranks.facts() if ranks is not None else {}


def _load(turns: Sequence[Turn], ranks: Turns | None, sink: Sink | None, *, num_owners: int | None = None) -> None:
    """Loads all turns on this process alone, or on all ranks."""
    if ranks is not None:
        ranks.load(turns, sink, num_owners=num_owners)
        return
    for done, turn in enumerate(turns, start=1):
        for write in turn.writes():
            write.run()
        if sink is not None and (done % 32 == 1 or done == len(turns)):
            sink(Progress("Reading weights", done, len(turns)))


def plan_weights(
    model: PreTrainedModel, config: ModelConfig, architecture: PreTrainedModel
) -> tuple[ReadingPlan, Path]:
    """Plans the reading of a checkpoint; sets the model's generation config from its files.

    Returns:
        The plan, and the folder or file of the weights.

    Raises:
        ModelError: A file is missing or damaged.
        HubUnavailable: The hub is needed and cannot be reached.
    """
    path = _read_generation_config(model, config, part="weights")
    if is_gguf(config.id):
        return plan_gguf(architecture, open_gguf(str(path))), path
    divides = bitnet_divides(read_json(path, config))
    whole = build_wrapper(model.config, torch.float32) if is_wrapper(model.config) else None
    return plan_reading(architecture, read_index(path), whole=whole, bitnet_divides=divides), path


def without_other_heads(
    plan: ReadingPlan, architecture: PreTrainedModel, config: ModelConfig, sink: Sink | None = None
) -> ReadingPlan:
    """Leaves out the head of a checkpoint that predicts other labels than the model."""
    task = task_of(architecture)
    if task.kind == "lm":
        return plan
    stored = stored_task(config)
    same = stored.kind == task.kind and (stored.labels, stored.problem) == (task.labels, task.problem)
    if stored.kind == "lm" or same:
        return plan
    groups = tuple(group for group in plan.groups if not is_in_head(architecture, group.target))
    if sink is not None and len(groups) < len(plan.groups):
        predicts = some(stored.labels) if stored.labels else stored.problem or "answers"
        sink(Warned(f"The head of the checkpoint is not used, because it predicts {predicts}.", where="model.id"))
    return replace(plan, groups=groups)


def read_group(group: Group, writer: WeightWriter, architecture: PreTrainedModel, folder: Path) -> None:
    """Reads one group of tensors and writes it into the model."""
    for write in _writes(group, writer, architecture, folder):
        write.run()


def _writes(group: Group, writer: WeightWriter, architecture: PreTrainedModel, folder: Path) -> Iterator[Write]:
    """Yields the parameters of a group."""
    match group:
        case Plain():
            yield Write(group.target, partial(writer.read, group.target, group.stored))
        case Experts():
            yield Write(group.target, partial(writer.put_experts, group.target, len(group.parts), group.read))
        case Converted():
            for name, value in _convert(group, architecture, folder):
                yield Write(name, partial(writer.put, name, value))
        case QuantizedWeight():
            tensors = {key: part.read() for key, part in group.parts.items()}
            yield Write(group.target, partial(writer.put_quantized, group.target, tensors, divides=group.divides))
        case GgufWeight():
            yield Write(group.target, partial(writer.put_gguf, group))


def _sources(group: Group) -> tuple[StoredTensor, ...]:
    """Returns the tensors that are encoded as one parameter; none if they need no encoding, or a conversion."""
    match group:
        case Plain():
            return (group.stored,)
        case Experts():
            return tuple(chain.from_iterable(group.parts))
        case _:
            return ()


def _rest_writes(writer: WeightWriter, architecture: PreTrainedModel, name: str) -> Iterator[Write]:
    """Yields a value that no file contains."""
    yield Write(name, partial(writer.put, name, architecture.get_parameter_or_buffer(name).detach()))


def _convert(group: Converted, architecture: PreTrainedModel, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors of a group and runs transformers' conversion."""
    try:
        values = group.transform.convert(group.target, model=architecture, config=architecture.config)
    except IngleError:
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
    writer: WeightWriter, architecture: PreTrainedModel, plan: ReadingPlan, folder: Path, sink: Sink | None
) -> None:
    optional = tuple(architecture._keys_to_ignore_on_load_missing or ())
    missing = sorted(set(writer.missing()) & architecture.state_dict().keys())
    missing = [name for name in missing if not any(re.search(pattern, name) for pattern in optional)]
    missing = [name for name in missing if not is_in_head(architecture, name)]
    unused = some(plan.unexpected)
    if missing and _are_outside_base(architecture, missing):
        raise ModelError(
            "The files contain a model without its output layer, so it cannot predict tokens.",
            where=str(folder),
            why=f"{plural(len(missing), 'weight')} are missing: {some(missing)}",
            fix="choose a checkpoint with this layer, or --objective.kind=classify, tag or answer: they add their own",
        )
    if missing:
        raise ModelError(
            f"{len(missing)} weights of the model are missing from its files: {some(missing)}.",
            where=str(folder),
            why=f"{len(plan.unexpected)} weights in the files belong to no parameter: {unused}",
            fix="check that the files belong to this config.json",
        )
    # A model for a task reads the base; the file's output layer belongs to nothing.
    if plan.unexpected and sink is not None and task_of(architecture).kind == "lm":
        sink(Warned(f"Weights that belong to no parameter are ignored: {unused}.", str(folder), len(plan.unexpected)))


def _are_outside_base(architecture: PreTrainedModel, names: Sequence[str]) -> bool:
    base = base_of(architecture)
    inside = {id(tensor) for tensor in chain(base.parameters(), base.buffers())}
    return base is not architecture and not any(
        id(architecture.get_parameter_or_buffer(name)) in inside for name in names
    )


def _random_turns(writer: WeightWriter, architecture: PreTrainedModel, seed: int) -> list[Turn]:
    """Initializes as the architecture does, in float32 on the CPU, so that every device gets the same weights."""

    @cached  # drawn on the rank that reads
    def values() -> dict[str, Tensor]:
        with seeded(seed):
            source = type(architecture)(deepcopy(architecture.config)).float()
        return dict(source.state_dict())

    def writes(name: str) -> Iterator[Write]:
        yield Write(name, partial(writer.put, name, values().pop(name)))

    return [Turn(name, partial(writes, name)) for name in architecture.state_dict()]


def _read_generation_config(model: PreTrainedModel, config: ModelConfig, *, part: Part) -> Path:
    """Sets the model's generation config from its files; returns their folder, or the GGUF file."""
    if is_gguf(config.id):
        file = open_gguf(config.id, revision=config.revision)
        model.generation_config = read_gguf_generation_config(file)
        return file.path
    folder = locate(config.id, revision=config.revision, part=part, code=config.trust_remote_code)
    path = folder / "generation_config.json"
    if path.is_file():
        read_object(path)
        fix = "remove the file, or compare it with the one that the model was published with"
        with reading(path, "transformers cannot read generation_config.json.", fix=fix):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return folder
