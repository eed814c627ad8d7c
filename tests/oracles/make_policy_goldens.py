"""Writes policy.json: what verl and TRL compute for fixed inputs, from the text of their sources.

    python tests/oracles/make_policy_goldens.py --verl VERL/verl --trl TRL/trl

Only the named functions are taken from the sources and run in float64, so neither package needs to be installed.
verl: commit b178a3c (2026-01-29). TRL: 1.16.0.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Json = dict[str, Any]

GROUPS = [0, 0, 0, 1, 1, 1, 1, 2, 2]
LENGTHS = [3, 5, 1, 4, 6, 2, 5, 6, 4]
LONGEST = 6


def load(path: Path, names: set[str], namespace: Json) -> SimpleNamespace:
    """Runs the named functions, methods and classes of a file without their decorators."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
            node.decorator_list = []
            exec(compile(ast.Module([node], []), str(path), "exec"), namespace)
    assert names <= set(namespace), names - set(namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})


def flat(values: Tensor) -> list[float]:
    """Returns the values of the tokens of each answer, end to end."""
    return [float(value) for row, length in zip(values, LENGTHS, strict=True) for value in row[:length]]


class Inputs:
    """Nine answers to three prompts, padded to six tokens."""

    def __init__(self) -> None:
        rng = np.random.default_rng(11)
        draw = lambda scale: torch.from_numpy(rng.normal(0, scale, (9, LONGEST)))  # noqa: E731
        self.mask = torch.tensor([[float(place < length) for place in range(LONGEST)] for length in LENGTHS])
        self.old = -draw(1.0).abs() - 0.1
        self.logps = (self.old + draw(0.5)).clamp_max(-0.01)
        self.reference = (self.old + draw(0.7)).clamp_max(-0.01)
        self.advantages = draw(1.0)
        self.row_advantages = draw(1.0)[:, :1].expand(-1, LONGEST)
        self.rewards, self.values, self.old_values = draw(0.5), draw(0.6), draw(0.6)
        self.returns = draw(1.0)
        self.scores = torch.from_numpy(rng.choice([0.0, 0.25, 0.5, 1.0], 9))
        self.several = torch.from_numpy(rng.normal(0, 1, (9, 3)))
        self.gaps = self.mask.clone()  # tokens of a tool inside answers
        self.gaps[1, 2] = self.gaps[4, 1] = self.gaps[4, 2] = self.gaps[7, 0] = 0

    def as_json(self) -> Json:
        """Returns the inputs, tokens end to end."""
        names = ("old", "logps", "reference", "advantages", "row_advantages", "rewards", "values", "old_values")
        tokens = {name: flat(getattr(self, name)) for name in (*names, "returns", "gaps")}
        own = {"scores": self.scores.tolist(), "several": self.several.tolist()}
        return {**tokens, **own, "groups": GROUPS, "lengths": LENGTHS}


def with_gradient(inputs: Inputs, loss_of: Any) -> Json:
    """Returns a loss and its gradient for the log-probabilities."""
    leaf = inputs.logps.clone().requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.item(), "gradient": flat(gradient)}


def verl_goldens(folder: Path, inputs: Inputs) -> Json:
    """Returns what verl computes."""

    class ActorConfig(SimpleNamespace):
        def get(self, name: str, default: Any) -> Any:
            return getattr(self, name, default)

    namespace: Json = {
        "torch": torch,
        "np": np,
        "defaultdict": defaultdict,
        "Optional": Optional,
        "Any": Any,
        "DictConfig": dict,
        "ActorConfig": ActorConfig,
        "AlgoConfig": type("AlgoConfig", (), {}),
    }
    names = {"masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value"}
    namespace["verl_F"] = load(folder / "utils/torch_functional.py", names, namespace)
    estimators = {
        "grpo": "compute_grpo_outcome_advantage",
        "rloo": "compute_rloo_outcome_advantage",
        "opo": "compute_opo_outcome_advantage",
        "remax": "compute_remax_outcome_advantage",
        "reinforce_pp": "compute_reinforce_plus_plus_outcome_advantage",
        "reinforce_pp_baseline": "compute_reinforce_plus_plus_baseline_outcome_advantage",
    }
    policies = {name: f"compute_policy_loss_{name}" for name in ("vanilla", "gspo", "cispo", "reinforce")}
    others = {"compute_gae_advantage_return", "compute_value_loss", "kl_penalty", "kl_penalty_forward", "agg_loss"}
    wanted = {*estimators.values(), *policies.values(), *others, "AdaptiveKLController"}
    core = load(folder / "trainer/ppo/core_algos.py", wanted, namespace)

    mask, groups = inputs.mask.double(), np.array(GROUPS)
    ends = torch.zeros(9, LONGEST, dtype=torch.float64)
    ends[torch.arange(9), torch.tensor(LENGTHS) - 1] = inputs.scores
    first = lambda result: result[0]  # noqa: E731
    rows = {
        "grpo": first(core.compute_grpo_outcome_advantage(ends, mask, groups)),
        "dr_grpo": first(core.compute_grpo_outcome_advantage(ends, mask, groups, norm_adv_by_std_in_grpo=False)),
        "rloo": first(core.compute_rloo_outcome_advantage(ends, mask, groups)),
        "opo": first(core.compute_opo_outcome_advantage(ends, mask, groups)),
    }
    out: Json = {name: values[:, 0].tolist() for name, values in rows.items()}
    discount = SimpleNamespace(gamma=0.9)
    token_rewards = inputs.rewards * mask
    discounted = core.compute_reinforce_plus_plus_outcome_advantage(token_rewards, mask, config=discount)
    out["reinforce_pp"] = [flat(values) for values in discounted]
    baseline = core.compute_reinforce_plus_plus_baseline_outcome_advantage(ends.clone(), mask, groups)
    out["reinforce_pp_baseline"] = flat(baseline[0])
    for name, which in (("gae", mask), ("gae_gaps", inputs.gaps.double())):
        given = inputs.rewards * which, inputs.values, which, 0.97, 0.9
        out[name] = [flat(values * which) for values in core.compute_gae_advantage_return(*given)]
    for name in ("k1", "k2", "k3"):
        out[name] = flat(core.kl_penalty(inputs.logps, inputs.reference, name))
    value = core.compute_value_loss(inputs.values, inputs.returns, inputs.old_values, mask, 0.3)
    out["value"] = [float(each) for each in value]
    control = core.AdaptiveKLController(0.05, 6.0, 10_000)
    out["adaptive"] = []
    for kl, answers in ((9.0, 512), (6.6, 512), (3.0, 512), (5.5, 64)):
        control.update(kl, answers)
        out["adaptive"].append(float(control.value))

    namespace |= {"SAFETY_BOUND": 20.0, "compute_is_metrics": lambda **given: {}}
    name = "compute_rollout_correction_weights"
    correct = getattr(load(folder / "trainer/ppo/rollout_corr_helper.py", {name}, namespace), name)
    for level in ("token", "sequence"):
        weights, _ = correct(inputs.logps - inputs.old, mask, rollout_is=level, rollout_is_threshold=1.5)
        out[f"truncate_{level}"] = flat(weights)

    settings = ActorConfig(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info={}
    )
    calls = {
        "vanilla": ("token-mean", inputs.advantages),
        "vanilla_answers": ("seq-mean-token-mean", inputs.row_advantages),
        "vanilla_sums": ("seq-mean-token-sum", inputs.row_advantages),
        "vanilla_constant": ("seq-mean-token-sum-norm", inputs.row_advantages),
        "gspo": ("seq-mean-token-mean", inputs.row_advantages),
        "reinforce": ("seq-mean-token-sum", inputs.row_advantages),
    }
    for name, (mode, advantages) in calls.items():
        function = getattr(core, policies[name.split("_")[0]])
        out[f"loss_{name}"] = with_gradient(
            inputs,
            lambda logps, f=function, a=advantages, m=mode: f(
                inputs.old, logps, a, mask, loss_agg_mode=m, config=settings
            )[0],
        )
        out[f"loss_{name}"]["clip_fraction"] = function(
            inputs.old, inputs.logps, advantages, mask, loss_agg_mode=mode, config=settings
        )[1].get("actor/pg_clipfrac")
    return out


class _Accelerator:
    num_processes = 1
    sync_gradients = False

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values


def trl_goldens(folder: Path, inputs: Inputs) -> Json:
    """Returns what TRL computes."""
    namespace: Json = {"torch": torch, "math": math, "F": functional, "nanmin": torch.min, "nanmax": torch.max}
    path = folder / "trainer/grpo_trainer.py"
    nanstd = load(folder / "trainer/utils.py", {"nanstd"}, namespace).nanstd
    compute = load(path, {"_compute_loss"}, namespace)._compute_loss
    jsd = load(folder / "experimental/gkd/gkd_trainer.py", {"generalized_jsd_loss"}, namespace).generalized_jsd_loss
    out: Json = {}

    def loss(logps: Tensor, **settings: Any) -> Tensor:
        defaults = {
            "importance_sampling_level": "token",
            "loss_type": "dapo",
            "beta": 0.0,
            "epsilon_low": 0.2,
            "epsilon_high": 0.28,
        }
        arguments = {"use_bias_correction_kl": True, "delta": settings.pop("delta", None), "steps_per_generation": 1}
        owner = SimpleNamespace(
            **{**defaults, **settings},
            args=SimpleNamespace(**arguments),
            model=SimpleNamespace(training=False),
            accelerator=_Accelerator(),
            _metrics={"eval": defaultdict(list)},
            _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            current_gradient_accumulation_steps=1,
            max_completion_length=LONGEST,
            _entropy_bonus_enabled=False,
            entropy_coef=0.0,
        )
        ids = torch.zeros(9, LONGEST, dtype=torch.long)
        batch = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": inputs.mask.double(),
            "advantages": inputs.row_advantages[:, 0],
            "old_per_token_logps": inputs.old,
            "ref_per_token_logps": inputs.reference,
            "num_items_in_batch": inputs.mask.sum(),
        }
        return compute(owner, SimpleNamespace(training=False), batch)

    cases: dict[str, Json] = {
        "grpo": {"loss_type": "grpo"},
        "dapo": {},
        "dr_grpo": {"loss_type": "dr_grpo"},
        "two_sided": {"delta": 1.5},
        "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
        "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        "grpo_kl": {"loss_type": "grpo", "beta": 0.04},
    }
    for name, settings in cases.items():
        out[f"loss_{name}"] = with_gradient(inputs, lambda logps, s=settings: loss(logps, **s))

    # The part of the trainer that turns scores into advantages.
    text = path.read_text()
    start = text.index("        unscorable_mask = torch.isnan(rewards_per_func)")
    end = text.index("advantages = torch.nan_to_num(advantages, nan=0.0)", start)
    block = compile(textwrap.dedent(text[start : text.index("\n", end)]), str(path), "exec")
    scores = inputs.several[:8].clone()
    scores[1, 0] = scores[6, 1] = torch.nan
    scores[3] = torch.nan
    out["several"] = [[None if math.isnan(value) else value for value in row] for row in scores.tolist()]
    for name, how, scale in (
        ("advantages_group", "sum_then_normalize", "group"),
        ("advantages_batch", "sum_then_normalize", "batch"),
        ("advantages_none", "sum_then_normalize", "none"),
        ("advantages_gdpo", "normalize_then_sum", "group"),
    ):
        owner = SimpleNamespace(
            multi_objective_aggregation=how,
            scale_rewards=scale,
            reward_weights=torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64),
            reward_funcs=[None] * 3,
        )
        given = {"self": owner, "rewards_per_func": scores.clone(), "num_generations": 4, "device": "cpu"}
        given |= {"torch": torch, "nanstd": nanstd}
        exec(block, given)
        out[name] = given["advantages"].tolist()

    student, teacher = inputs.values, inputs.returns
    out["jsd"] = {}
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        leaf = student.clone().requires_grad_()
        value = jsd(leaf, teacher, beta=beta, num_items_in_batch=1)
        (gradient,) = torch.autograd.grad(value, leaf)
        out["jsd"][str(beta)] = {"loss": value.item(), "gradient": gradient.flatten().tolist()}
    out["jsd_logits"] = [student.tolist(), teacher.tolist()]
    return out


def main() -> None:
    """Writes the file next to this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verl", type=Path, required=True)
    parser.add_argument("--trl", type=Path, required=True)
    given = parser.parse_args()
    inputs = Inputs()
    goldens = {
        "inputs": inputs.as_json(),
        "verl": verl_goldens(given.verl, inputs),
        "trl": trl_goldens(given.trl, inputs),
    }
    Path(__file__).with_name("policy.json").write_text(json.dumps(goldens, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
