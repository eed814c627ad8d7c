"""Writes ``trl-1.16.json``: losses of pairs and their gradients, as TRL 1.16 computes them from log-probabilities.

Run it where TRL is installed: ``python tests/oracles/trl_goldens.py``. The tests read the file only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

#: Supervised tokens of the chosen and of the rejected answer of each pair, behind a prompt of 3 tokens.
LENGTHS = ((5, 7), (8, 2), (1, 6), (4, 4))
#: TRL's name of each loss, the options of Ingle, and those of TRL.
DPO: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("sigmoid", {"loss": "sigmoid"}, {}),
    ("hinge", {"loss": "hinge"}, {}),
    ("ipo", {"loss": "ipo"}, {}),
    ("exo_pair", {"loss": "exo", "label_smoothing": 0.01}, {"label_smoothing": 0.01}),
    ("nca_pair", {"loss": "nca"}, {}),
    ("robust", {"loss": "robust", "label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("bco_pair", {"loss": "bco_pair"}, {}),
    ("sppo_hard", {"loss": "sppo"}, {}),
    ("apo_zero", {"loss": "apo_zero"}, {}),
    ("apo_down", {"loss": "apo_down"}, {}),
    ("discopop", {"loss": "discopop", "temperature": 0.05}, {}),
    ("sigmoid_norm", {"loss": "sigmoid_norm"}, {}),
    ("sigmoid", {"loss": "sigmoid", "divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ("sigmoid", {"loss": "sigmoid", "divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    (
        "sigmoid",
        {"loss": "sigmoid", "divergence": "alpha", "divergence_alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    ("sigmoid", {"loss": "sigmoid", "tail_weight": 0.4}, {"ld_alpha": 0.4}),
    ("sigmoid", {"loss": "sigmoid", "weighting": "wpo"}, {"use_weighting": True}),
)
CPO: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"kind": "cpo", "beta": 0.2}, {"loss_type": "sigmoid", "beta": 0.2}),
    (
        {"kind": "cpo", "beta": 0.2, "label_smoothing": 0.1},
        {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.1},
    ),
    ({"kind": "cpo", "loss": "hinge", "beta": 0.2}, {"loss_type": "hinge", "beta": 0.2}),
    ({"kind": "cpo", "loss": "ipo", "beta": 0.2}, {"loss_type": "ipo", "beta": 0.2}),
    ({"kind": "simpo", "beta": 2.0, "gamma": 1.0}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}),
    (
        {"kind": "simpo", "beta": 2.0, "gamma": 1.0, "alpha": 0.25},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "alpha": 0.25},
    ),
)


class _Accelerator:
    device = torch.device("cpu")

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather


def _rows(seed: int, lengths: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Log-probabilities of two answers, [2, longest], 0 behind their ends."""
    generator = torch.Generator().manual_seed(seed)
    rows = -torch.rand(2, max(lengths), generator=generator) * 2 - 0.05
    return (rows * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])).to(dtype)


def _dpo(name: str, options: dict[str, Any], pair: int) -> tuple[float, list[list[float]]]:
    lengths = LENGTHS[pair]
    width = max(lengths)
    mask = torch.nn.functional.pad((torch.arange(width) < torch.tensor(lengths)[:, None]).long(), (3, 0))
    answer, reference, squares = (_rows(10 * pair + part, lengths) for part in range(3))
    answer.requires_grad_(True)
    prompt = torch.zeros(2, 2)  # a token less than the prompt has, since the first token has no prediction
    outputs = SimpleNamespace(
        log_probs=torch.cat([prompt, answer], 1),
        log_sum_sq_probs=torch.cat([prompt, squares], 1),
        entropy=torch.zeros(2, width + 2),
        mean_logits=torch.zeros(2, width + 2),
        is_top1=torch.zeros(2, width + 2, dtype=torch.bool),
    )
    sums = reference.sum(1)
    if options.get("ld_alpha") is not None:
        tail = torch.arange(width) >= min(lengths)
        sums = (reference * torch.where(tail, options["ld_alpha"], 1.0)).sum(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_types=[name],
        loss_weights=[1.0],
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"eval": defaultdict(list), "train": defaultdict(list)},
        _total_train_tokens=0,
        **{
            "beta": 0.1,
            "label_smoothing": 0.0,
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "use_weighting": False,
            **options,
        },
    )
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": sums[:1],
        "ref_rejected_logps": sums[1:],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    (gradient,) = torch.autograd.grad(loss, answer)
    return float(loss), gradient.tolist()


def _inputs(pair: int) -> dict[str, Any]:
    """What a pair is made of."""
    names = ("logps", "reference", "log_squares")
    rows = {name: _rows(10 * pair + part, LENGTHS[pair]).tolist() for part, name in enumerate(names)}
    return {"lengths": LENGTHS[pair], **rows}


def _sides(pair: int, mean: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    answer = _rows(10 * pair, LENGTHS[pair]).requires_grad_(True)
    sums = answer.sum(1)
    if mean:
        sums = sums / torch.tensor(LENGTHS[pair])
    return answer, sums[:1], sums[1:]


def _cpo(options: dict[str, Any], pair: int) -> tuple[float, list[list[float]]]:
    trainer = SimpleNamespace(accelerator=_Accelerator(), **{"label_smoothing": 0.0, "alpha": 0.0, **options})
    answer, chosen, rejected = _sides(pair, mean=options["loss_type"] == "simpo")
    loss = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].sum()
    return float(loss), torch.autograd.grad(loss, answer)[0].tolist()


def _orpo(pair: int) -> tuple[float, list[list[float]]]:
    trainer = SimpleNamespace(accelerator=_Accelerator(), beta=0.1)
    answer, chosen, rejected = _sides(pair, mean=True)
    loss = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].sum()
    return float(loss), torch.autograd.grad(loss, answer)[0].tolist()


def main() -> None:
    """Writes the file next to this one."""
    pairs = range(len(LENGTHS))
    losses = [({"kind": "dpo", **own}, [_dpo(name, options, pair) for pair in pairs]) for name, own, options in DPO]
    losses += [(own, [_cpo(options, pair) for pair in pairs]) for own, options in CPO]
    losses.append(({"kind": "orpo", "beta": 0.1}, [_orpo(pair) for pair in pairs]))
    content = {
        "version": trl.__version__,
        "pairs": [_inputs(pair) for pair in pairs],
        "losses": [
            {"objective": own, "values": [value for value, _ in found], "gradients": [g for _, g in found]}
            for own, found in losses
        ],
    }
    Path(__file__).with_name("trl-1.16.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
