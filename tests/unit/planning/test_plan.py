"""The plan's arithmetic, against counts written out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ingle.config import Run
from ingle.errors import ConfigError, DoesNotFit
from ingle.planning import (
    DataShape,
    DeviceTable,
    LayerShape,
    LinearShape,
    ModelShape,
    Plan,
    Problem,
    find_better_batch,
    make_plan,
)

MODEL = ModelShape(
    layers=(LayerShape((LinearShape(64, 64, count=6, active=6, adapted=6),), count=2),),
    hidden_size=64,
    vocab_size=1000,
    embedding_parameters=1000 * 64,
    tied=True,
)
DATA = DataShape(num_sequences=100, num_tokens=40_000, longest=512)


TABLE = DeviceTable.read()


def _run(**sections: Any) -> Run:
    base = {"model": {"id": "m"}, "data": {"sources": [{"path": "d.jsonl"}]}, "output": "o"}
    return Run.model_validate(base | sections)


def _problem(run: Run, model: ModelShape = MODEL, data: DataShape = DATA, **facts: Any) -> Problem:
    facts = {"device": TABLE.devices["cpu-amx"], "free_bytes": 1 << 40, "dtype_bytes": 2} | facts
    return Problem(run, model, data, **facts)


def _plan(run: Run, can_compile: bool = True, process_bytes: int = 0, **facts: Any) -> Plan:
    problem = _problem(run, **facts)
    return make_plan(problem, process_bytes=process_bytes, can_compile=can_compile, nominal=TABLE.devices["cpu-avx2"])


def test_steps_from_epochs_and_batch() -> None:
    plan = _plan(_run(train={"num_epochs": 2.0, "global_batch_size": 16}))
    assert plan.num_steps == 13  # 200 sequences in steps of 16, the last one reaches into a third epoch
    assert plan.tokens_per_step == 6400
    assert plan.num_tokens == 13 * 6400
    assert plan.num_epochs == pytest.approx(2.08)


def test_sampled_answers_are_planned_in_whole_iterations() -> None:
    """Of 16 answers and two passes in steps of 4, so 8 steps: an epoch of 100 answers takes 7 iterations."""
    objective = {"kind": "grpo", "rewards": ["r.py"], "num_prompts": 4, "num_generations": 4, "num_passes": 2}
    sections: dict[str, Any] = {"objective": objective, "train": {"global_batch_size": 4}}
    plan = _plan(_run(**sections))
    assert plan.num_steps == 7 * 8
    assert plan.num_epochs == pytest.approx(7 * 16 / 100)
    assert 0 < plan.rollout_hours < plan.hours
    more = {"max_new_tokens": 512, "num_slots": 4}
    longer = _plan(_run(**sections | {"objective": objective | {"rollout": more}}))
    assert longer.rollout_hours > 4 * plan.rollout_hours
    # Keys and values of both layers and the scores, where they need more than a step.
    slots = _plan(_run(**sections | {"objective": objective | {"rollout": {"num_slots": 65_536}}}))
    assert slots.memory["total"] > plan.memory["total"] + 0.9 * 65_536 * 1000 * 2


def test_num_steps_overrides_epochs() -> None:
    assert _plan(_run(train={"num_steps": 7})).num_steps == 7


@pytest.mark.parametrize(
    ("global_batch", "longest", "size"), [(16, 512, 8), (12, 1024, 4), (7, 1024, 1), (16, 100_000, 1), (16, 100, 8)]
)
def test_one_process_on_a_cpu_takes_equal_micro_batches(global_batch: int, longest: int, size: int) -> None:
    plan = _plan(_run(train={"global_batch_size": global_batch}), data=replace(DATA, longest=longest))
    assert plan.micro_batch_size >= size and global_batch % plan.micro_batch_size == 0
    assert plan.micro_batch_size * longest <= 4096 or plan.micro_batch_size == 1
    assert plan.grad_accum_steps == global_batch // plan.micro_batch_size


def test_a_given_micro_batch_need_not_divide_the_global_one() -> None:
    plan = _plan(_run(train={"global_batch_size": 16, "micro_batch_size": 5}))
    assert (plan.micro_batch_size, plan.grad_accum_steps) == (5, 4)


@pytest.mark.parametrize(("every", "expected"), [(None, 2), (7, 7), (0.5, 3), (0.01, 1)])
def test_validations_are_planned(every: float | None, expected: int) -> None:
    """Ten in a run of 13 steps, a number of steps, or a share of the 6.25 steps of an epoch."""
    data = replace(DATA, validation_tokens=40_000)
    sections: dict[str, Any] = {"train": {"num_epochs": 2.0, "global_batch_size": 16}}
    without = _plan(_run(**sections), data=data)
    held_out = {"sources": [{"path": "d.jsonl"}], "validation": 0.1}
    plan = _plan(_run(**sections, data=held_out, evaluate={"every": every}), data=data)
    assert (without.validate_every, without.validation_hours) == (0, 0.0)
    assert plan.validate_every == expected
    assert plan.hours == pytest.approx(without.hours + plan.validation_hours)
    epochs = 13 // expected + 1  # a validation reads as many tokens as an epoch of training
    forward = 2 * MODEL.active_parameters / plan.flops_per_token
    assert plan.validation_hours == pytest.approx(epochs * 40_000 / plan.tokens_per_s * forward / 3600)
    assert 0.3 < forward < 0.5
    kept = _plan(_run(**sections | {"train": {**sections["train"], "keep_best": True}}, data=held_out), data=data)
    assert kept.disk_bytes > plan.disk_bytes


def test_lora_counts() -> None:
    plan = _plan(_run(adapter={"kind": "lora", "rank": 4}))
    assert plan.trainable_parameters == 12 * 4 * (64 + 64)
    assert plan.flops_per_token == 4 * (12 * 64 * 64 + 64 * 1000) + 6 * plan.trainable_parameters


def test_dora_has_a_magnitude_for_each_output() -> None:
    assert _plan(_run(adapter={"kind": "dora", "rank": 4})).trainable_parameters == 12 * (4 * (64 + 64) + 64)


def test_full_fine_tuning_counts_weight_gradients() -> None:
    plan = _plan(_run(adapter={"kind": "none"}))
    assert plan.trainable_parameters == MODEL.num_parameters
    assert plan.flops_per_token == 6 * (12 * 64 * 64 + 64 * 1000)


def test_modules_trained_in_full_are_counted() -> None:
    run = _run(adapter={"kind": "lora", "rank": 4, "trainable_modules": ["embed_tokens"]})
    plan = _plan(run, model=replace(MODEL, saved_parameters=1000 * 64))
    assert plan.trainable_parameters == 12 * 4 * (64 + 64) + 1000 * 64


def test_total_is_the_sum() -> None:
    memory = dict(_plan(_run(), process_bytes=123).memory)
    total = memory.pop("total")
    assert total == sum(memory.values())


def test_what_does_not_fit_is_refused_with_numbers_and_a_way_out() -> None:
    with pytest.raises(DoesNotFit) as caught:
        _plan(_run(), free_bytes=1 << 20)
    text = str(caught.value)
    assert "of additional memory; 1.0 MiB are free" in text
    assert text.endswith("use a smaller model or a shorter data.max_seq_len")
    assert "--base.format=nf4" not in text, "the weights of so small a model are not what takes the memory"
    assert "overhead" in text
    wide = replace(MODEL, layers=(LayerShape((LinearShape(4096, 4096, 6, 6, 6),), count=2),))
    with pytest.raises(DoesNotFit, match=r"none of these is enough on its own: --adapter\.kind=lora"):
        _plan(_run(adapter={"kind": "none"}), model=wide, free_bytes=1 << 20)


@pytest.mark.parametrize(
    ("sections", "width", "flag"),
    [
        ({"adapter": {"kind": "lora", "rank": 2000}}, 512, "--adapter.rank=1000"),
        ({"adapter": {"kind": "lora", "rank": 4}}, 4096, "--base.format=nf4"),
        ({"adapter": {"kind": "none"}}, 4096, "--adapter.kind=lora"),
        ({"parallel": {"recompute": False}, "train": {"global_batch_size": 1}}, 64, "--parallel.recompute=true"),
    ],
)
def test_a_flag_is_proposed_when_the_run_fits_with_it(sections: dict[str, Any], width: int, flag: str) -> None:
    shape = replace(MODEL, layers=(LayerShape((LinearShape(width, width, 6, 6, 6),), count=20 if width == 64 else 2),))
    data = replace(DATA, longest=100_000 if width == 64 else 8)

    def fit(free_bytes: int, **sections: Any) -> Plan:
        return _plan(_run(**sections), model=shape, data=data, free_bytes=free_bytes)

    settings = sections | {"train": {"micro_batch_size": 1, **sections.get("train", {})}}
    recompute = {"recompute": False} if "parallel" in sections else {"recompute": True}
    settings["parallel"] = recompute
    free = round(0.9 * fit(1 << 60, **settings).memory["total"])
    with pytest.raises(DoesNotFit) as caught:
        fit(free, **settings)
    proposed = [option.split(" (")[0] for option in str(caught.value.fix).split("   or   ")]
    assert proposed[0] == flag
    section, option = flag.removeprefix("--").split(".")
    option, value = option.split("=")
    typed: Any = int(value) if value.isdigit() else {"true": True}.get(value, value)
    fit(free, **settings | {section: settings.get(section, {}) | {option: typed}})


def test_recompute_and_smaller_micro_batches_are_used_only_if_memory_is_short() -> None:
    run, data = _run(), replace(DATA, longest=4096)
    ample = _plan(run, data=data)
    assert not ample.strategy.recompute
    smaller = _plan(run, data=data, free_bytes=ample.memory["total"] - 1)
    assert smaller.strategy.recompute
    with pytest.raises(DoesNotFit):
        _plan(_run(parallel={"recompute": False}), data=data, free_bytes=ample.memory["total"] - 1)


def test_compile_decision_is_a_function_of_the_config() -> None:
    assert _plan(_run()).compile is False
    assert _plan(_run(train={"compile": True})).compile is True
    assert _plan(_run(train={"compile": True}), can_compile=False).compile is False
    big = replace(MODEL, layers=(LayerShape((LinearShape(4096, 4096, 100, 100, 100),), count=2),))
    assert _plan(_run(train={"num_steps": 100}), model=big, free_bytes=1 << 50).compile is True


def test_qa_lora_has_a_column_for_each_group() -> None:
    plan = _plan(_run(base={"format": "q5_1"}, adapter={"kind": "qa_lora", "rank": 4}))
    assert plan.trainable_parameters == 12 * 4 * (2 + 64)
    hqq = {"format": "hqq", "group_size": 16}
    assert _plan(_run(base=hqq, adapter={"kind": "qa_lora", "rank": 4})).trainable_parameters == 12 * 4 * (4 + 64)


def test_a_batch_that_fits_no_memory_is_refused_with_a_smaller_one() -> None:
    with pytest.raises(DoesNotFit) as caught:
        _plan(_run(train={"global_batch_size": 1 << 20}), free_bytes=4 << 30)
    assert "train.global_batch_size = 1048576" in str(caught.value)
    assert caught.value.fix == "--train.global_batch_size=4"


def test_more_steps_than_any_run_makes_are_refused() -> None:
    run = _run(train={"num_epochs": 1e6, "global_batch_size": 1})
    with pytest.raises(ConfigError, match="1e\\+12 steps"):
        _plan(run, data=replace(DATA, num_sequences=1_000_000))


@pytest.mark.parametrize(
    ("num_sequences", "train", "flags"),
    [
        (5, {}, "--train.global_batch_size=1 --train.num_epochs=4"),
        (40, {}, "--train.global_batch_size=2"),
        (40, {"micro_batch_size": 4}, "--train.global_batch_size=2 --train.micro_batch_size=2"),
        (40, {"num_epochs": 8.0}, None),
        (5, {"global_batch_size": 1}, "--train.num_epochs=4"),
        (3200, {}, None),
        (5, {"num_steps": 3}, "--train.global_batch_size=1"),
        (32, {"num_steps": 3}, None),
    ],
)
def test_little_data_gets_a_batch_that_makes_sense(
    num_sequences: int, train: dict[str, Any], flags: str | None
) -> None:
    def advice(train: dict[str, Any]) -> str | None:
        run, data = _run(train=train), replace(DATA, num_sequences=num_sequences)
        return find_better_batch(run, num_sequences, _plan(run, data=data).num_steps)

    found = advice(train)
    assert (found is None) == (flags is None)
    if found is not None and flags is not None:
        assert found.endswith(f" Try {flags}.")
        followed = dict(flag.removeprefix("--train.").split("=") for flag in flags.split())
        assert advice(train | {name: int(value) for name, value in followed.items()} | _epochs(followed)) is None


def _epochs(flags: dict[str, str]) -> dict[str, float]:
    return {"num_epochs": float(flags["num_epochs"])} if "num_epochs" in flags else {}
