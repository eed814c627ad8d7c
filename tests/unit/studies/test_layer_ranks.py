"""Directions that layers use, from saved adapters of known changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ingle.studies.layer_ranks import distribute, layer_ranks, read_spectra


def _save(folder: Path, values: dict[str, list[float]]) -> Path:
    """An adapter whose changes have these singular values."""
    folder.mkdir()
    tensors = {}
    for path, singular in values.items():
        u, _ = torch.linalg.qr(torch.randn(9, len(singular)))
        v, _ = torch.linalg.qr(torch.randn(7, len(singular)))
        mix = torch.randn(len(singular), len(singular)) + 3 * torch.eye(len(singular))
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_B.weight"] = (u * torch.tensor(singular)) @ torch.linalg.inv(mix)
        tensors[f"{prefix}.lora_A.weight"] = (mix @ v.t()).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_directions_and_ranks_of_known_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flat, steep = [2.0, 2.0, 2.0, 2.0], [3.0, 0.3, 0.1, 0.0]
    seeds = [_save(tmp_path / str(seed), {"a.q": flat, "b.q": steep}) for seed in range(3)]
    spectra = [read_spectra(folder) for folder in seeds]
    np.testing.assert_allclose(spectra[0]["a.q"], np.square(flat), rtol=1e-3)
    rows = {row.path: row for row in layer_ranks(spectra)}
    assert (rows["a.q"].rank, rows["a.q"].low, rows["a.q"].high) == (4, 4, 4)
    assert rows["b.q"].rank == 1
    assert rows["a.q"].energy + rows["b.q"].energy == 1
    assert distribute(spectra, 2) == {"a.q": 3, "b.q": 1}
