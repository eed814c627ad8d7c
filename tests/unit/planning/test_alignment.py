"""What an alignment run adds to a plan, against counts by hand and against the batches of runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ingle.assembly import assemble
from ingle.config import Run
from ingle.config.objective import rows_of
from ingle.config.policy import Grpo, OnlineDpo
from ingle.planning import (
    DataShape,
    DeviceTable,
    LayerShape,
    LinearShape,
    ModelShape,
    Problem,
    Strategy,
    find_companions,
    sampled_shape,
)
from ingle.planning.activations import Tapes, saved_bytes
from ingle.planning.cost import flops_per_token
from ingle.planning.memory import DeviceMemory, MemoryParts, per_device, trainable_parameters
from ingle.planning.remedies import changes
from ingle.planning.rollout_memory import sampling_bytes
from tests.axis import Point, config_of

LINEAR = LinearShape(64, 64, count=6, active=6, adapted=6, name="self_attn.q_proj")
MODEL = ModelShape(
    layers=(LayerShape((LINEAR,), count=2, num_heads=4, num_kv_heads=2, head_dim=16),), hidden_size=64, vocab_size=1000
)
DATA = DataShape(100, 100 * 64, 64, longest_document=64, mean_document=64)
REWARDS = {"rewards": ["r.py"]}
#: A and B of rank 4 in all twelve layers.
ADAPTER = 12 * 4 * (64 + 64)


def run_of(objective: dict[str, Any], **sections: Any) -> Run:
    sections = {"adapter": {"kind": "lora", "rank": 4}} | sections
    base = {"model": {"id": "m"}, "data": {"sources": ["d.jsonl"]}, "output": "o", "objective": objective}
    return Run.model_validate(base | sections)


def parts(run: Run, model: ModelShape = MODEL, data: DataShape = DATA) -> MemoryParts:
    return per_device(run, model, data, Strategy(micro_batch_size=4), dtype_bytes=4, on_gpu=False)


FEW = {"rollout": {"num_slots": 1, "max_new_tokens": 8}} | REWARDS
GRPO, PPO = (run_of({"kind": kind} | FEW) for kind in ("grpo", "ppo"))


def test_a_value_function_is_an_adapter_a_head_and_a_second_pass() -> None:
    policy, both = parts(GRPO), parts(PPO)
    values = ADAPTER + 64 + 1
    assert trainable_parameters(PPO, MODEL) == ADAPTER + values
    assert both.adapter_bytes - policy.adapter_bytes == 4 * values
    assert both.optimizer_bytes - policy.optimizer_bytes == 8 * values
    tape = Tapes(PPO, MODEL, 4).layer(MODEL.layers[0], 4 * 64)
    kept = both.activation_bytes + both.gradient_bytes - policy.activation_bytes - policy.gradient_bytes
    assert kept == 2 * saved_bytes(tape)
    forward = 2 * 12 * 64 * 64
    assert flops_per_token(PPO, MODEL, recompute=False) - flops_per_token(GRPO, MODEL, recompute=False) == (
        2 * forward + 6 * values
    )
    shared = run_of({"kind": "ppo", "value": {"trunk": "policy"}} | FEW)
    assert trainable_parameters(shared, MODEL) == ADAPTER + 64 + 1


def test_a_copy_of_an_adapter_that_continues_another_is_counted() -> None:
    for kind, copies in (("dpo", 1), ("sft", 0)):
        fresh = run_of({"kind": kind})
        continued = run_of({"kind": kind}, adapter={"kind": "lora", "rank": 4, "path": "other"})
        assert parts(continued).adapter_bytes - parts(fresh).adapter_bytes == 4 * ADAPTER * copies
    subtracting = run_of({"kind": "dpo"}, adapter={"kind": "lora", "rank": 4, "init": "pissa"})
    assert parts(subtracting).adapter_bytes == 2 * 4 * ADAPTER


def test_a_reference_costs_a_forward_pass_and_log_probabilities_the_logits_again() -> None:
    forward, head = 2 * 12 * 64 * 64, 2 * 64 * 1000
    supervised, simpo, dpo, kto = (
        flops_per_token(run_of({"kind": kind}), MODEL, recompute=False) for kind in ("sft", "simpo", "dpo", "kto")
    )
    assert simpo - supervised == head
    assert dpo - simpo == forward + head
    assert kto - dpo == 2 * (forward + head)


def test_a_teacher_and_reward_models_are_counted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "llama", "vocab_size": 100, "tie_word_embeddings": True, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = 100 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    (teacher,), notes = find_companions(run_of({"kind": "distill", "teacher": str(tmp_path)}), 2)
    assert not notes and (teacher.weight_bytes, teacher.hidden_size) == (2 * weights, 32)
    distill = run_of({"kind": "distill", "teacher": str(tmp_path)})
    beside = replace(MODEL, companions=(teacher,))
    assert parts(distill, beside).weights_bytes - parts(distill).weights_bytes == 2 * weights
    states = parts(distill, beside).activation_bytes - parts(distill).activation_bytes
    assert states == 4 * 4 * 64 * 32  # of 4 sequences of 64 tokens
    forward = 2 * (weights - 5 * 32)  # norms are no products
    assert flops_per_token(distill, beside, recompute=False) - flops_per_token(distill, MODEL, recompute=False) == (
        forward
    )

    role, other = tmp_path / "role", tmp_path / "other"
    for folder, base in ((role, "m"), (other, str(tmp_path))):
        folder.mkdir()
        content = {"base_model_name_or_path": base, "r": 8}
        (folder / "adapter_config.json").write_text(json.dumps(content))
    scored = {"kind": "grpo", "rewards": [{"kind": "model", "path": str(path)} for path in (role, other)]}
    (companion,), _ = find_companions(run_of(scored), 2)
    assert (companion.weight_bytes, companion.hidden_size) == (2 * weights, 0)
    assert parts(run_of(scored)).adapter_bytes - parts(GRPO).adapter_bytes == 4 * 2 * ADAPTER
    missing, notes = find_companions(run_of({"kind": "distill", "teacher": str(tmp_path / "nothing")}), 2)
    assert not missing and "nothing" in notes[0]


def test_sampling_keeps_prompts_once_and_every_slot_in_full() -> None:
    rollout = {"max_new_tokens": 48, "num_slots": 32}
    run = run_of({"kind": "grpo", "num_prompts": 4, "num_generations": 8, "rollout": rollout} | REWARDS)
    keys_and_values = 2 * 2 * 16 * 2 * 4
    stored = (4 * (64 - 48) + 32 * 48) * keys_and_values
    assert sampling_bytes(run, DATA, Tapes(run, MODEL, 4), 1) == stored + 32 * 1000 * 4
    assert sampling_bytes(run, DATA, Tapes(run, MODEL, 4), 2) == stored - 2 * 16 * keys_and_values + 32 * 1000 * 4
    prepared = 4 * 12 * 64 * 64
    assert sampling_bytes(run, DATA, Tapes(run, MODEL, 4, fused=True), 1) == stored + 32 * 1000 * 4 + prepared
    few = run_of({"kind": "grpo", "num_prompts": 1, "rollout": {"max_new_tokens": 1, "num_slots": 8}} | REWARDS)
    tapes = Tapes(few, MODEL, 4, fused=True)
    assert sampling_bytes(few, DATA, tapes, 1) == 2 * prepared + 8 * 1000 * 4, "passes are tried with two stores"


def test_shapes_of_sampled_answers() -> None:
    """30 prompts of 100 tokens, at most 120, with answers of 16, at most 32."""
    rollout = {"max_new_tokens": 32}
    grpo = Grpo.model_validate({"kind": "grpo", "num_generations": 8, "rollout": rollout} | REWARDS)
    shared, repeated = (sampled_shape(grpo, 30, 100.0, 120, shares=shares) for shares in (True, False))
    assert (shared.num_sequences, shared.num_tokens) == (240, 30 * (100 + 8 * 16))
    assert [shared.most_tokens(rows) for rows in (1, 8, 9)] == [120 + 32, 120 + 8 * 32, 2 * 120 + 9 * 32]
    memory = DeviceMemory(GRPO, MODEL, shared, Strategy(micro_batch_size=9), 4, on_gpu=False)
    assert memory.step().tokens == 2 * 120 + 9 * 32
    assert (repeated.num_tokens, repeated.most_tokens(9)) == (240 * (100 + 16), 9 * (120 + 32))
    pairs = OnlineDpo.model_validate({"kind": "online_dpo", "num_generations": 4, "rollout": rollout} | REWARDS)
    both = sampled_shape(pairs, 30, 100.0, 120, shares=True)
    assert (both.num_sequences, both.num_tokens, both.most_tokens(2)) == (30, 30 * (100 + 2 * 16), 2 * (120 + 64))


def test_fewer_slots_and_shorter_prompts_are_proposed() -> None:
    run = run_of({"kind": "grpo", "rollout": {"num_slots": 4096}} | REWARDS)
    data = replace(DATA, longest=1024, longest_document=1024, shared_prompt=960, sequences_per_prompt=8)
    device = DeviceTable.read().devices["cpu-avx2"]
    found = dict(changes(Problem(run, MODEL, data, device, free_bytes=1 << 30, dtype_bytes=4)))
    assert rows_of(found["--objective.rollout.num_slots=8"].run.objective).rollout.num_slots == 8  # type: ignore[union-attr]
    lengths = [found[f"--data.max_seq_len={length}"].data.most_tokens(2) for length in (512, 256)]
    assert lengths == [512, 256], "two answers to a prompt that leaves them no room"


def test_distillation_from_the_data_samples_nothing() -> None:
    run = run_of({"kind": "distill", "teacher": "t", "on_policy_share": 0.0})
    assert sampling_bytes(run, DATA, Tapes(run, MODEL, 4), 1) == 0
    sampled = run_of({"kind": "distill", "teacher": "t", "rollout": {"num_slots": 4096}})
    memory = [DeviceMemory(each, MODEL, DATA, Strategy(), 4, on_gpu=False).parts() for each in (run, sampled)]
    assert memory[0].evaluation_bytes == 0 < memory[1].evaluation_bytes


def test_pairs_have_the_tokens_of_their_batches(tmp_path: Path) -> None:
    """Prompts that are long enough are computed once."""
    config = config_of(tmp_path, Point("llama", "packed", {"kind": "dpo"}))
    rows = [
        {"prompt": "fox " * (6 + 3 * number), "chosen": "a dog " * (1 + number % 3), "rejected": "the lazy dog"}
        for number in range(12)
    ]
    (tmp_path / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["data"] |= {"validation": None, "max_seq_len": 128, "packing": False}
    config["train"] |= {"global_batch_size": 12, "micro_batch_size": 12, "num_steps": 1}
    found = assemble(Run.model_validate(config), lambda event: None)
    (batch,) = found.objective.next_batches()
    assert found.plan.tokens_per_step == batch.num_tokens
    assert batch.parents() is not None
