"""Loads a model and prints the memory it needed.  Arguments: a tiny model's folder, the folder, the base as JSON."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from pydantic import TypeAdapter

from ingle import models
from ingle.config import BaseConfig, ModelConfig
from ingle.models.loading.safetensors_files import read_index


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(tiny: str, folder: str, base: str) -> None:
    config: BaseConfig = TypeAdapter(BaseConfig).validate_json(base)
    models.load_model(ModelConfig(id=tiny, dtype="bfloat16"), config)  # imports, kernels and thread pools
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    model = models.load_model(ModelConfig(id=folder, dtype="bfloat16"), config)
    peak = status("VmHWM") - before
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    final = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    largest = max(entry.num_bytes for entry in read_index(Path(folder)).values())
    print(json.dumps({"peak": peak, "final": final, "largest": largest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
