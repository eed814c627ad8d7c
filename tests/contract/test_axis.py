"""What holds for the training of every objective in every layout, on one process."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ingle import flow, models, parallel
from ingle.assembly import Assembled, assemble
from ingle.config.run import Run
from ingle.data.batch import Batch, round_up
from ingle.events import Event, Saved, Warned
from ingle.models.forward.layout import layout_of
from ingle.training.steps import compute_gradients
from tests.axis import POINTS, config_of, next_batches

#: Short tests take a point for each objective and for each layout.
LEAN = {"clm, dealt states", "sft, dealt attention", "mlm, equal rows", "span, packed", "seq2seq, rows"} | {
    "classify, packed, full", "tag, dealt", "answer, packed",
    "sft, packed, dora", "clm, galore, full", "clm, lisa, full",
    "dpo, packed, prefix", "grpo, packed", "span, packed, prompt",
}  # fmt: skip


#: These call ``forward`` of their layers or parts of them, so that hooks on layers have no effect.
_CALL_NO_LAYERS = {"funnel", "squeezebert"}


def _cases(lean: set[str]) -> list[object]:
    return [pytest.param(name, marks=() if name in lean else pytest.mark.sweep) for name in POINTS]


class _Step(NamedTuple):
    """The first step: its loss, its denominator, and its gradients by name."""

    loss: float
    count: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("axis")


@pytest.fixture(scope="module")
def assembled(folder: Path, request: pytest.FixtureRequest) -> Assembled:
    name: str = request.param
    events: list[Event] = []
    parts = assemble(Run.model_validate(config_of(folder, POINTS[name])), events.append)
    assert layout_of(parts.model).kind == POINTS[name].layout
    _require_told(parts, [event for event in events if isinstance(event, Warned)])
    generator = torch.Generator().manual_seed(0)
    for parameter in parts.model.parameters():
        if parameter.requires_grad:  # an adapter of zeros has gradients of zero
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    parts.objective.module.train()
    return parts


def _require_told(parts: Assembled, warned: Sequence[Warned]) -> None:
    """A run says what its layout computes in vain, once; positions that are looked up by row cost nothing."""
    layout = layout_of(parts.model)
    told = [event.message for event in warned if "grouped by length" in event.message or "each length" in event.message]
    assert len(told) == (layout.kind != "packed" and not all("Embedding" in name for name in layout.dealt or ("rows",)))
    assert all(name in told[0] for name in layout.dealt if told and "Embedding" not in name)


def _step(parts: Assembled, batches: Sequence[Batch]) -> _Step:
    parts.optimizer.clear()
    sums, counts = compute_gradients(parts.objective, batches, parts.mesh, seed=0, step=1)
    gradients = {name: gradient.detach().clone() for name, gradient in parts.optimizer.gradients()}
    term = parts.objective.module.terms[0]
    return _Step(sums[term.name], counts[term.denominator], gradients)


def _require_equal(found: _Step, expected: _Step, tolerance: float) -> None:
    assert found.count == pytest.approx(expected.count, rel=1e-9)
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    largest = max(float(gradient.norm()) for gradient in expected.gradients.values())
    assert largest > 0
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= tolerance * largest, name


@pytest.mark.parametrize("assembled", _cases(LEAN), indirect=True)
def test_a_step_does_not_depend_on_what_computes_it(assembled: Assembled) -> None:
    """Micro-batches, packing, recomputed layers, and activations in host memory."""
    parts, objective = assembled, assembled.objective
    whole = next_batches(parts, 1)
    documents = [round_up(document) for batch in whole for document in batch.split(10**6)]
    assert len(documents) >= 4
    expected = _step(parts, whole)

    with torch.no_grad():
        tables = [objective.module.per_document(batch) for batch in whole]
        alone = torch.cat([objective.module.per_document(document) for document in documents])
    together = torch.cat(tables)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together[:, :2].sum(0).tolist() == pytest.approx([expected.loss, expected.count], rel=1e-5)

    for num_parts in (1, 2, 3):
        cut = [round_up(part) for batch in whole for part in batch.split(num_parts)]
        _require_equal(_step(parts, cut), expected, 1e-5)
    _require_equal(_step(parts, documents), expected, 1e-5)

    # Last, because neither can be turned off.
    offload = parallel.offload_activations(list(models.decoder_layers(parts.model)), least_bytes=1)
    _require_equal(_step(parts, whole), expected, 1e-6)
    assert offload.held_bytes == 0
    assert offload.peak_bytes > 0 or parts.model.config.model_type in _CALL_NO_LAYERS
    if models.can_recompute(parts.model):
        models.recompute_layers(parts.model)
        _require_equal(_step(parts, whole), expected, 1e-6)


@pytest.mark.parametrize("name", _cases(LEAN | {"sft, packed, adalora"}))
def test_a_run_that_ends_after_a_checkpoint_resumes_to_the_same_bytes(folder: Path, name: str, tmp_path: Path) -> None:
    config = config_of(folder, POINTS[name])
    resumed = tmp_path / "resumed"

    def copy(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 2:
            shutil.copytree(tmp_path / "whole", resumed)

    flow.finetune(Run.model_validate(config | {"output": str(tmp_path / "whole")}), copy)
    assert not any(resumed.glob("*/*.safetensors"))
    flow.resume(resumed)
    (expected,) = (tmp_path / "whole").glob("*/*model.safetensors")
    assert (resumed / expected.relative_to(tmp_path / "whole")).read_bytes() == expected.read_bytes()
