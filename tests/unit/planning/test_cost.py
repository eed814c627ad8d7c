"""Predicted speed, against operations counted by hand and against published runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ingle.config import Run
from ingle.planning import DataShape, DeviceTable, LayerShape, LinearShape, ModelShape, Strategy
from ingle.planning.architecture import read_architecture
from ingle.planning.cost import Work, flops_per_token, predict
from ingle.planning.model_files import shipped_configs

TABLE = DeviceTable.read()
MODEL = ModelShape(
    layers=(LayerShape((LinearShape(64, 64, count=6, active=6, adapted=6),), count=2, num_heads=4, head_dim=16),),
    hidden_size=64,
    vocab_size=1000,
)
LLAMA, LLAMA3 = "meta-llama/llama-2-", "meta-llama/llama-3."


def run_of(**sections: Any) -> Run:
    base = {"model": {"id": "m"}, "data": {"sources": [{"path": "d.jsonl"}]}, "output": "o"}
    return Run.model_validate(base | sections)


def test_operations_are_those_of_a_hand_count() -> None:
    weights, head = 12 * 64 * 64, 64 * 1000
    full, lora = run_of(adapter="none"), run_of(adapter={"rank": 4})
    adapters = 12 * 4 * (64 + 64)
    assert flops_per_token(full, MODEL, recompute=False) == 6 * (weights + head)
    assert flops_per_token(full, MODEL, recompute=True) == 8 * weights + 6 * head
    assert flops_per_token(lora, MODEL, recompute=False) == 4 * (weights + head) + 6 * adapters
    assert flops_per_token(lora, MODEL, recompute=True) == 6 * weights + 4 * head + 8 * adapters
    masked = run_of(adapter="none", objective={"kind": "mlm", "rate": 0.25})
    assert flops_per_token(masked, MODEL, recompute=False) == 6 * (weights + head / 4)
    scores = 2 * 4 * 100 * 64  # two layers, queries times keys and weights times values
    attended = flops_per_token(full, MODEL, recompute=False, context=100) - flops_per_token(
        full, MODEL, recompute=False
    )
    assert attended == 3 * scores
    windowed = replace(MODEL, layers=(replace(MODEL.layers[0], window=10, mixer="sliding_attention"),))
    shorter = flops_per_token(full, windowed, recompute=False, context=100)
    assert shorter - flops_per_token(full, MODEL, recompute=False) == 3 * scores / 10


def tokens_per_s(
    model: str, devices: str, size: int, strategy: str, base: str, adapter: str = "lora", length: int = 2048
) -> float:
    """Predicts tokens per second of all ranks; ``strategy`` is a kind with ``+recompute`` and ``+offload``."""
    kind, *extras = strategy.split("+")
    count, device = TABLE.parse(devices)
    run = run_of(base=base, adapter={"kind": "lora", "rank": 64} if adapter == "lora" else adapter)
    found = read_architecture(shipped_configs()[model])
    assert found is not None
    data = DataShape(1000, 1000 * length, length)
    planned = Strategy(kind, count, count, size, 1, "recompute" in extras, "offload" in extras)  # type: ignore[arg-type]
    cost = predict(Work.of(run, found.shape(run.adapter), data, 2), planned, device, 0)
    return count * size * length / cost.step_s


#: Published tokens per second of all ranks. fsdp_qlora, benchmarks of March 2024; torchtune, README (its A6000 exceeds
#: the peak of the card of 2020, so it is the Ada generation); torchtitan, December 2024, without compilation.
PUBLISHED = [
    ((f"{LLAMA}7b-hf", "2x rtx-3090", 8, "ddp+recompute", "nf4"), 2397),
    ((f"{LLAMA}7b-hf", "2x rtx-3090", 10, "zero3+recompute", "nf4"), 2241),
    (("01-ai/yi-34b", "2x rtx-3090", 2, "zero3+recompute", "nf4"), 416),
    (("01-ai/yi-34b", "2x rtx-3090", 4, "zero3+recompute+offload", "nf4"), 434),
    ((f"{LLAMA}70b-hf", "2x rtx-3090", 2, "zero3+recompute+offload", "nf4"), 178),
    ((f"{LLAMA}7b-hf", "2x rtx-4090", 8, "ddp+recompute", "nf4"), 4660),
    ((f"{LLAMA}7b-hf", "2x rtx-4090", 4, "ddp+recompute", "none"), 4799),
    (("01-ai/yi-34b", "2x rtx-4090", 4, "zero3+recompute+offload", "nf4"), 1018),
    ((f"{LLAMA}70b-hf", "2x rtx-4090", 2, "zero3+recompute+offload", "nf4"), 477),
    ((f"{LLAMA}70b-hf", "2x rtx-a5000", 2, "zero3+recompute+offload", "nf4"), 216),
    ((f"{LLAMA}70b-hf", "8x rtx-a5000", 1, "zero3+recompute", "nf4"), 803),
    ((f"{LLAMA}70b-hf", "2x a100-40gb", 1, "zero3+recompute", "nf4"), 640),
    ((f"{LLAMA}70b-hf", "8x a100-40gb", 4, "zero3+recompute", "nf4"), 3121),
    ((f"{LLAMA}70b-hf", "4x h100", 8, "zero3+recompute", "nf4"), 3144),
    ((f"{LLAMA3}1-8b", "rtx-4090", 2, "none+recompute", "nf4"), 2413),
    ((f"{LLAMA3}1-8b", "rtx-4090", 2, "none+recompute", "none", "none"), 1650),
    ((f"{LLAMA3}1-8b", "rtx-6000-ada", 2, "none+recompute", "none"), 4699),
    ((f"{LLAMA3}1-70b", "8x a100-80gb", 2, "zero3+recompute", "none"), 3497),
    ((f"{LLAMA3}2-3b", "a100-80gb", 2, "none+recompute", "nf4", "lora", 4096), 8035),
    ((f"{LLAMA3}1-8b", "8x h100", 2, "zero3", "none", "none", 8192), 8 * 5762),
]


@pytest.mark.parametrize(("settings", "published"), PUBLISHED, ids=[f"{s[0]}-{s[1]}-{s[3]}" for s, _ in PUBLISHED])
def test_predicted_speed_is_near_published_runs(settings: tuple[Any, ...], published: float) -> None:
    assert 1 / 1.4 < tokens_per_s(*settings) / published < 1.4


#: Real tokens per second on two quiet cores with AMX, from docs/benchmarks.md. That of the small model is from the
#: processor time of steps of 500 to 3,900 tokens: a part per token, which two threads share, and one per step.
_LLAMA: dict[str, Any] = {"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 4}
_WIDE = _LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 32_000}
_SMALL = _LLAMA | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4096}
ON_A_CPU = [
    ("LoRA, wide", _WIDE | {"tie_word_embeddings": True}, {}, 2, 4, 512, 1170),
    ("LoRA, small", _SMALL | {"num_attention_heads": 8, "tie_word_embeddings": True}, {}, 2, 2, 487, 7570),
    ("encoder, bfloat16", "google-bert/bert-base-uncased", {"adapter": "none", "objective": "mlm"}, 2, 32, 89, 1038),
    ("encoder, float32", "google-bert/bert-base-uncased", {"adapter": "none", "objective": "mlm"}, 4, 32, 89, 464),
]


@pytest.mark.parametrize("case", ON_A_CPU, ids=[case[0] for case in ON_A_CPU])
def test_predicted_speed_of_a_cpu_is_near_what_was_measured(case: tuple[Any, ...]) -> None:
    _, config, sections, dtype_bytes, size, length, measured = case
    run = run_of(**sections)
    found = read_architecture(shipped_configs()[config] if isinstance(config, str) else config)
    assert found is not None
    device = replace(TABLE.devices["cpu-amx"].divided(8), cores=2)
    data = DataShape(1000, 1000 * length, length)
    work = Work.of(run, found.shape(run.adapter), data, dtype_bytes)
    predicted = size * length / predict(work, Strategy(micro_batch_size=size), device, 0).step_s
    assert 1 / 1.5 < predicted / measured < 1.5, predicted


def test_transfers_hide_behind_computation_until_they_take_longer() -> None:
    def cost(devices: str, size: int) -> tuple[float, float]:
        count, device = TABLE.parse(devices)
        run = run_of(base="nf4")
        found = read_architecture(shipped_configs()[f"{LLAMA}70b-hf"])
        assert found is not None
        work = Work.of(run, found.shape(run.adapter), DataShape(1000, 1000 * 2048, 2048), 2)
        step = predict(work, Strategy("zero3", count, count, size, 1, True), device, 0)
        return step.compute_s, step.step_s

    compute, step = cost("2x rtx-4090", 4)
    assert step == pytest.approx(compute, rel=0.05)
    slow = replace(TABLE.find("rtx-4090"), host_link=1e9, interconnect=1e9)
    found = read_architecture(shipped_configs()[f"{LLAMA}70b-hf"])
    assert found is not None
    work = Work.of(run_of(base="nf4"), found.shape(run_of().adapter), DataShape(1000, 1000 * 128, 128), 2)
    bound = predict(work, Strategy("zero3", 2, 2, 1, 1, True), slow, 0)
    gathered = work.base_bytes  # half of it, in the forward and in the backward pass
    assert bound.step_s == pytest.approx(gathered / 0.7e9, rel=0.15)
    assert bound.moved_bytes > gathered
