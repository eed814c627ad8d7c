"""Objectives over answers: a step depends neither on how it is cut nor on shared prompts; rewards are HF's scores."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from ingle.adapters import attach, disabled, lora_modules
from ingle.config import ModelConfig
from ingle.config.adapter import LoraAdapter
from ingle.config.objective import ObjectiveConfig
from ingle.data import TokenDataset
from ingle.data.dataset import FlatTokens, Origins, TextGroups
from ingle.data.packing import Sequences
from ingle.data.sampler import SequenceSampler
from ingle.models import Model, ModelTask, forward_reward, load_model
from ingle.objectives.judged import JudgedLoss
from ingle.objectives.pairs import PairLoss
from ingle.objectives.preferences import JudgedObjective, PreferenceObjective, Sharing
from ingle.objectives.reference_cache import ReferenceCache, answer_keys, open_cache
from ingle.objectives.reward import RewardLoss
from ingle.parallel import Mesh
from ingle.training.steps import compute_gradients, prepare, weighted_mean
from tests.axis import Plenty, write_model

MESH = Mesh(torch.device("cpu"))
ROWS = 8
#: Objectives with every option that adds a term or a weight.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "sigmoid", "tail_weight": 0.5, "sft_weight": 0.3},
    "dpo weighted": {"kind": "dpo", "loss": "robust", "weighting": "wpo"},
    "dpo of tokens": {"kind": "dpo", "loss": "tdpo2"},
    "simpo": {"sft_weight": 0.2},
    "orpo": {"pairs": "neighbours"},
    "kto": {},
    "bco": {"desirable_weight": 1.2, "undesirable_weight": 0.8},
    "reward": {"margin": "scores", "centering": 0.1},
}
#: Those that every run of the tests includes.
_LEAN = {"dpo", "kto", "reward"}


def make_dataset() -> TokenDataset:
    """Rows of a prompt with two to four scored answers; one row has equal scores, and one answer has no token."""
    rng = np.random.default_rng(0)
    documents, scores, sizes = [], [], []
    for row in range(ROWS):
        prompt = rng.integers(3, 90, 18 + row)
        sizes.append(2 + row % 3)
        for number in range(sizes[-1]):
            answer = rng.integers(3, 90, 0 if (row, number) == (5, 1) else rng.integers(2, 12))
            documents.append((prompt, answer))
            scores.append(0.0 if row == 2 else float(number == row % 2))
    offsets = np.cumsum([0, *(len(prompt) + len(answer) for prompt, answer in documents)])
    ids = np.concatenate([np.concatenate(document) for document in documents]).astype(np.int32)
    supervised = np.concatenate([np.arange(len(p) + len(a)) >= len(p) for p, a in documents])
    origins = Origins()
    origins.extend(["rows:1"] * len(documents))
    stats: Any = None
    names = np.concatenate([np.arange(size) for size in sizes]).astype(np.int16)
    groups = TextGroups(np.cumsum([0, *sizes]), tuple(f"answer_{n}" for n in range(4)), names)
    tokens = FlatTokens(ids, supervised, offsets, origins)
    return TokenDataset(tokens, stats, groups, {"scores": np.array(scores, np.float32)})


DATASET = make_dataset()
assert DATASET.groups is not None
SEQUENCES = Sequences(np.arange(len(DATASET)), DATASET.groups.offsets, 1, 64)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A language model and one that scores, in float64, whose adapters have moved."""
    folder = tmp_path_factory.mktemp("preferences") / "llama"
    write_model(folder, "llama")
    made = {}
    for name, task in (("lm", ModelTask()), ("reward", ModelTask("classify", (), "regression"))):
        model = load_model(ModelConfig(id=str(folder), dtype="float32"), task=task)
        attach(model, LoraAdapter(kind="lora", rank=2), seed=0)
        model.double()
        generator = torch.Generator().manual_seed(0)
        for layer in lora_modules(model).values():
            layer.lora_b.data += 0.1 * torch.randn(layer.lora_b.shape, generator=generator, dtype=torch.float64)
        made[name] = model
    return made


def make_objective(
    models: dict[str, Model], name: str, *, micro: int, shares: bool, **more: Any
) -> PreferenceObjective:
    """The objective over a model."""
    config: Any = TypeAdapter(ObjectiveConfig).validate_python({"kind": name.split()[0], **OBJECTIVES[name]})
    model = models["reward" if config.kind == "reward" else "lm"]
    options: dict[str, Any] = {
        "corrupt": Sharing() if shares else None,
        "global_batch_size": ROWS,
        "micro_batch_size": micro,
        "mesh": MESH,
    }
    options |= more
    arguments = DATASET, SequenceSampler(SEQUENCES, 0, True)
    initial = partial(disabled, model)
    if config.kind == "reward":
        return PreferenceObjective(RewardLoss(model, config), *arguments, initial=None, **options)
    if config.kind in ("kto", "bco"):
        baseline: Any = {"kto": "mismatched", "bco": "running"}[config.kind]
        module = JudgedLoss(model, config, (1.2, 0.8))
        options |= {"baseline": baseline, "sequences": SEQUENCES, "seed": 0}
        return JudgedObjective(module, *arguments, initial=initial, **options)
    pairs = PairLoss(model, config)
    return PreferenceObjective(pairs, *arguments, initial=initial if pairs.has_reference else None, **options)


def take_steps(
    objective: PreferenceObjective, parts_of: int = 1, *, num_steps: int = 1
) -> tuple[dict[str, float], Tensor]:
    """The metrics and the gradient of the last step, without an update between steps."""
    for step in range(1, num_steps + 1):
        objective.module.train()
        objective.module.zero_grad()
        parts = [part for batch in objective.next_batches() for part in batch.split(parts_of)]
        with torch.no_grad():
            prepared = prepare(objective, parts)
        sums, counts = compute_gradients(objective, prepared, MESH, seed=0, step=step)
        found = {"loss": weighted_mean(objective.module.terms, sums, counts), **objective.metrics(sums, counts)}
        objective.after_step(sums, counts)
    trained = [p for p in objective.module.parameters() if p.requires_grad and p.grad is not None]
    return found, torch.cat([p.grad.flatten() for p in trained])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _LEAN else pytest.mark.sweep) for name in OBJECTIVES]
)
def test_a_step_does_not_depend_on_how_it_is_cut_or_on_shared_prompts(models: dict[str, Model], name: str) -> None:
    steps = {"num_steps": 2 if name == "bco" else 1}
    expected, gradient = take_steps(make_objective(models, name, micro=ROWS, shares=False), **steps)
    assert gradient.norm() > 0
    for micro, shares, parts in ((3, True, 1), (ROWS, False, 3)):
        found, own = take_steps(make_objective(models, name, micro=micro, shares=shares), parts, **steps)
        # Columns are float32, in which the log-probabilities of the reference are rounded.
        assert found == pytest.approx(expected, rel=2e-6, abs=2e-6), (micro, shares)
        assert (own - gradient).norm() <= 1e-6 * gradient.norm(), (micro, shares)


def test_tdpo_compares_the_divergences_of_whole_answers(models: dict[str, Model]) -> None:
    """Equation 17 of arXiv 2404.11999 with its stopped gradient, from the logits of both models, in float64."""
    objective = make_objective(models, "dpo of tokens", micro=3, shares=True)
    found, gradient = take_steps(objective)
    model, losses = objective.module.model, []
    for row in range(ROWS):
        answers = []
        for document in SEQUENCES[row]:
            sample = DATASET.sample(int(document))
            ids, places = torch.from_numpy(sample.input_ids)[None].long(), np.flatnonzero(sample.labels >= 0)
            logps = model(ids).logits[0, places - 1].log_softmax(-1)
            with torch.no_grad(), disabled(model):
                reference = model(ids).logits[0, places - 1].log_softmax(-1)
            chosen = torch.arange(len(places)), ids[0, places]
            divergence = (reference.exp() * (reference - logps)).sum()
            answers.append(
                (float(sample.columns["scores"][0]), (logps - reference)[chosen].sum(), divergence, len(places))
            )
        compared = [(a, b) for a in answers for b in answers if a[0] > b[0] and a[3] and b[3]]
        terms = [
            -torch.nn.functional.logsigmoid(0.1 * (a[1] - b[1] - 0.5 * (b[2] - a[2].detach()))) for a, b in compared
        ]
        losses += [torch.stack(terms).mean()] if terms else []
    expected = torch.stack(losses).mean()
    trained = [p for p in objective.module.parameters() if p.requires_grad]
    wanted = torch.cat([each.flatten() for each in torch.autograd.grad(expected, trained)])
    assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    assert (gradient - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", ["dpo", pytest.param("bco", marks=pytest.mark.sweep)])
def test_the_divergence_along_the_answers_is_measured(models: dict[str, Model], name: str) -> None:
    """From the logits of both models; ``kl`` does not depend on how the step is cut, and other steps have none."""
    model, divergences = models["lm"], []
    for document in range(len(DATASET)):
        sample = DATASET.sample(document)
        ids, places = torch.from_numpy(sample.input_ids)[None].long(), np.flatnonzero(sample.labels >= 0)
        with torch.no_grad():
            own = model(ids).logits[0, places - 1].log_softmax(-1)
            with disabled(model):
                reference = model(ids).logits[0, places - 1].log_softmax(-1)
        divergences += [float((own.exp() * (own - reference)).sum())] if len(places) else []
    for micro, shares in ((3, True), (ROWS, False)):
        objective = make_objective(models, name, micro=micro, shares=shares, kl_steps={2})
        for step, expected in ((2, np.mean(divergences)), (3, None)):
            assert objective.collect(step, Plenty(), lambda event: None)
            found, _ = take_steps(objective)
            assert found.get("kl") == (expected and pytest.approx(expected, rel=1e-6)), (micro, step)


def test_the_baseline_of_kto_is_the_mean_log_ratio_of_answers_to_other_prompts(models: dict[str, Model]) -> None:
    objective = make_objective(models, "kto", micro=2, shares=True)
    assert isinstance(objective, JudgedObjective)
    found, _ = take_steps(objective)
    model, ratios = objective.module.model, []
    mismatches = objective._mismatches[False]
    for document in range(len(DATASET)):
        (sample,) = mismatches.samples([document])
        answer = sample.labels >= 0
        if not answer.any():
            continue
        logps = []
        for initial in (False, True):
            with torch.no_grad(), disabled(model) if initial else torch.no_grad():
                logits = model(torch.from_numpy(sample.input_ids)[None].long()).logits[0].log_softmax(-1)
            places = np.flatnonzero(answer)
            logps.append(float(logits[places - 1, sample.labels[places]].sum()))
        ratios.append(logps[0] - logps[1])
        own = DATASET.sample(document)
        assert not np.array_equal(sample.input_ids[places[0] :], own.input_ids[own.labels >= 0])
    assert found["kl"] == pytest.approx(np.mean(ratios), rel=1e-5)


def test_the_baseline_of_bco_is_the_mean_of_the_rewards_before_and_is_resumed(models: dict[str, Model]) -> None:
    objective = make_objective(models, "bco", micro=4, shares=True)
    found, _ = take_steps(objective, num_steps=2)
    state = objective.state_dict()
    assert state["num_rewards"] == 2 * (len(DATASET) - 1)
    assert found["delta"] == pytest.approx(state["reward_sum"] / state["num_rewards"], rel=1e-5) != 0
    resumed = make_objective(models, "bco", micro=4, shares=True)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_values_of_the_reference_are_found_by_content(models: dict[str, Model], name: str, tmp_path: Path) -> None:
    def gone() -> Any:
        raise AssertionError("the reference is computed again")

    first = make_objective(models, name, micro=3, shares=False)
    first.cache = ReferenceCache(tmp_path)
    expected, _ = take_steps(first)
    state = first.state_dict()
    (file,) = state["files"]
    content = (tmp_path / file).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-7])
    (tmp_path / "damaged.safetensors").write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])

    # Other micro-batches, shared prompts, and a process that cannot compute the reference.
    second = make_objective(models, name, micro=ROWS, shares=True)
    second.cache, second._initial = ReferenceCache(tmp_path), gone
    assert second.cache.files == [file]
    found, _ = take_steps(second)
    assert found == pytest.approx(expected, rel=2e-6, abs=2e-6) and found["loss"] != math.log(2)

    second.load_state_dict({**state, "counter": 0, "files": []})
    with pytest.raises(AssertionError, match="computed again"):
        take_steps(second)


def test_a_reference_is_its_weights_and_what_is_computed_with_them(
    models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INGLE_CACHE", str(tmp_path))
    config = copy.deepcopy(models["lm"].config)

    def folder(digest: str = "a", dtype: torch.dtype = torch.float32) -> Path:
        return open_cache(digest, config, dtype, MESH.device)._folder

    first = folder()
    config._name_or_path = "elsewhere"
    assert folder() == first
    assert len({first, folder("b"), folder(dtype=torch.bfloat16)}) == 3
    config.rms_norm_eps *= 2
    assert folder() != first


def test_keys_of_answers_tell_every_token_and_not_the_batch(models: dict[str, Model]) -> None:
    keys = []
    for micro, shares in ((ROWS, False), (3, True)):
        batches = make_objective(models, "dpo", micro=micro, shares=shares).next_batches()
        keys.append([key for each in batches for key in answer_keys(each)])
    assert keys[0] == keys[1] and len(set(keys[0])) == len(DATASET)
    (batch,) = make_objective(models, "dpo", micro=ROWS, shares=True).next_batches()
    ids = batch.input_ids.clone()
    ids[0, 2] += 1  # in the prompt of the first row
    edited = answer_keys(replace(batch, columns={**batch.columns, "input_ids": ids}))
    changed = [a != b for a, b in zip(keys[1], edited, strict=True)]
    row = batch.columns["group_ids"][batch.answers()]
    assert changed == (row == row[0]).tolist()


@pytest.mark.parametrize("shares", [False, True])
def test_rewards_are_the_scores_of_the_architecture(models: dict[str, Model], shares: bool) -> None:
    objective = make_objective(models, "reward", micro=ROWS, shares=shares)
    (batch,) = objective.next_batches()
    model = objective.module.model
    with torch.no_grad():
        found = forward_reward(model, batch)
        expected = []
        for sequence in objective._sampler.take(0, ROWS):
            for document in sequence:
                ids = torch.from_numpy(DATASET.sample(int(document)).input_ids)[None].long()
                expected.append(float(model(ids).logits[0, 0]))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
