"""Adds the image and audio towers of a multimodal checkpoint to a model that was saved without them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from ingle.config.model import ModelConfig
from ingle.models.loading.hub import locate
from ingle.models.loading.meta_device import build
from ingle.models.loading.reading_plan import plan_reading
from ingle.models.loading.safetensors_files import INDEX_NAME, SINGLE_NAME, StoredTensor, read_index
from ingle.models.text_part import build_wrapper

#: What a processor reads besides the tokenizer.
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
#: The tensors of a shard are in memory together.
_SHARD_BYTES = 1_000_000_000


def stored_towers(source: ModelConfig, config: PretrainedConfig) -> dict[str, StoredTensor]:
    """Returns the tensors of a multimodal checkpoint that are no part of its text model, by their keys on disk.

    Args:
        source: Which model.
        config: Its config.

    Raises:
        ModelError: A file is missing or damaged.
    """
    folder = locate(source.id, revision=source.revision, part="weights", code=source.trust_remote_code)
    stored = read_index(folder)
    plan = plan_reading(build(config, torch.float32), stored, whole=build_wrapper(config, torch.float32))
    return {key: stored[key] for key in plan.towers}


def add_towers(source: ModelConfig, config: PretrainedConfig, folder: Path) -> None:
    """Copies the towers of a checkpoint, byte for byte, and its processor files into the folder of a saved text model.

    Args:
        source: The checkpoint that the model was loaded from.
        config: Its config.
        folder: Contains the text model as safetensors.
    """
    saved = read_index(folder)
    files: dict[Path, list[str]] = {}
    for key, tensor in saved.items():
        files.setdefault(tensor.path, []).append(key)
    num_bytes = sum(tensor.num_bytes for tensor in saved.values())
    # A text model that shares its output head with the embedding may have been published with both.
    towers = {key: tensor for key, tensor in stored_towers(source, config).items() if key not in saved}
    for number, keys in enumerate(_shards(towers)):
        path = folder / f"towers-{number}.safetensors"
        tensors = {key: towers[key].read() for key in keys}
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, path, metadata={"format": "pt"})
        files[path] = keys
    weight_map: dict[str, str] = {}
    for number, (path, keys) in enumerate(files.items(), start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else SINGLE_NAME
        os.replace(path, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    copy_processor(source, folder)


def copy_processor(source: ModelConfig, folder: Path) -> None:
    """Copies the files from which transformers makes a model's processor, unless the folder has them."""
    origin = locate(source.id, revision=source.revision, code=source.trust_remote_code)
    for name in _PROCESSOR_FILES:
        if (origin / name).is_file() and not (folder / name).exists():
            shutil.copyfile(origin / name, folder / name)


def _shards(tensors: Mapping[str, StoredTensor]) -> Iterator[list[str]]:
    """Yields groups of keys whose tensors are written into one file."""
    keys: list[str] = []
    size = 0
    for key, tensor in tensors.items():
        if keys and size + tensor.num_bytes > _SHARD_BYTES:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor.num_bytes
    if keys:
        yield keys
