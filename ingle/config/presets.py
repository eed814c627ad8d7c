"""The published values of preference losses: what an option that is null means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ingle.config.policy import SampledConfig
from ingle.config.policy_presets import describe_policy
from ingle.config.preferences import Dpo, JudgedConfig, PairConfig
from ingle.config.section import Section

Preference = PairConfig | JudgedConfig
_P = TypeVar("_P", bound=Section)


@dataclass(frozen=True)
class Preset:
    """The values of a method.

    Attributes:
        title: Its name.
        options: Values of options of ``objective``.
        source: Where they are from.
        checked: Whether they were read in that source; otherwise they are those that are commonly used.
        lr: The learning rates that the source recommends, for full fine-tuning; None if it names none.
    """

    title: str
    options: Mapping[str, float]
    source: str
    checked: bool = False
    lr: tuple[float, float] | None = None


#: By the loss of ``dpo``, and by the kind of the other objectives.
PRESETS: Mapping[str, Preset] = {
    "sigmoid": Preset(
        "DPO", {"beta": 0.1, "label_smoothing": 0.0}, "Rafailov et al. 2023, arXiv 2305.18290", lr=(5e-7, 1e-6)
    ),
    "robust": Preset(
        "robust DPO", {"beta": 0.1, "label_smoothing": 0.1}, "Ray Chowdhury et al. 2024, arXiv 2403.00409"
    ),
    "hinge": Preset("SLiC", {"beta": 0.1}, "Zhao et al. 2023, arXiv 2305.10425"),
    "ipo": Preset("IPO per token", {"beta": 0.1}, "Azar et al. 2023, arXiv 2310.12036"),
    "ipo_sum": Preset("IPO", {"beta": 0.1}, "Azar et al. 2023, arXiv 2310.12036"),
    "exo": Preset("EXO", {"beta": 0.1, "label_smoothing": 1e-3}, "Ji et al. 2024, arXiv 2402.00856"),
    "nca": Preset("NCA", {"beta": 0.01}, "Chen et al. 2024, arXiv 2402.05369"),
    "bco_pair": Preset("BCO on pairs", {"beta": 0.1}, "Jung et al. 2024, arXiv 2404.04656"),
    "sppo": Preset("SPPO", {"beta": 0.1}, "Wu et al. 2024, arXiv 2405.00675"),
    "apo_zero": Preset("APO-zero", {"beta": 0.1}, "D'Oosterlinck et al. 2024, arXiv 2408.06266"),
    "apo_down": Preset("APO-down", {"beta": 0.1}, "D'Oosterlinck et al. 2024, arXiv 2408.06266"),
    "discopop": Preset("DiscoPOP", {"beta": 0.05, "temperature": 0.05}, "Lu et al. 2024, arXiv 2406.08414"),
    "sigmoid_norm": Preset(
        "length-normalized DPO", {"beta": 0.1, "label_smoothing": 0.0}, "Lambert et al. 2024, arXiv 2411.15124"
    ),
    "tdpo1": Preset("TDPO1", {"beta": 0.1}, "Zeng et al. 2024, arXiv 2404.11999"),
    "tdpo2": Preset("TDPO2", {"beta": 0.1, "kl_weight": 0.5}, "Zeng et al. 2024, arXiv 2404.11999"),
    "dpop": Preset("DPOP", {"beta": 0.3, "penalty": 50.0}, "Pal et al. 2024, arXiv 2402.13228"),
    "simpo": Preset(
        "SimPO", {"beta": 2.0, "gamma": 1.0}, "Meng et al. 2024, arXiv 2405.14734", checked=True, lr=(3e-7, 1e-6)
    ),
    "cpo": Preset("CPO", {"beta": 0.1, "sft_weight": 1.0}, "Xu et al. 2024, arXiv 2401.08417"),
    "orpo": Preset("ORPO", {"beta": 0.1}, "Hong et al. 2024, arXiv 2403.07691", lr=(5e-6, 8e-6)),
    "kto": Preset("KTO", {"beta": 0.1}, "Ethayarajh et al. 2024, arXiv 2402.01306", lr=(5e-7, 5e-6)),
    "bco": Preset("BCO", {"beta": 0.1}, "Jung et al. 2024, arXiv 2404.04656", lr=(5e-7, 5e-7)),
    "reward": Preset("reward model", {}, "Ouyang et al. 2022, arXiv 2203.02155"),
}


def preset_of(objective: Preference) -> Preset:
    """Returns the published values of an objective."""
    return PRESETS[objective.loss if isinstance(objective, Dpo) else objective.kind]


def suit_preferences(objective: _P) -> _P:
    """Returns the objective with the published value in the place of every option that is null and has one."""
    published = preset_of(objective).options  # type: ignore[arg-type] # of those sections
    filled = {name: value for name, value in published.items() if getattr(objective, name) is None}
    return objective.model_copy(update=filled)


def describe_difference(objective: Section) -> str | None:
    """Returns a sentence about the options that differ from the published ones; None if there are none."""
    if isinstance(objective, SampledConfig):
        found: str | None = describe_policy(objective)
    else:
        found = describe_preset(objective) if isinstance(objective, Preference) else None
    return found if found is not None and "differs" in found else None


def describe_preset(objective: Preference) -> str | None:
    """Returns a sentence that names the method and the options that differ from it; None without published values."""
    preset = preset_of(objective)
    if not preset.options:
        return None
    values = ", ".join(f"{name} {value:g}" for name, value in preset.options.items())
    own = suit_preferences(objective)
    others = [name for name in preset.options if getattr(own, name) != preset.options[name]]
    changed = ", ".join(f"{name} {getattr(own, name):g}" for name in others)
    sentence = f"{preset.title} {'as published' if preset.checked else 'as commonly used'} ({preset.source}): {values}."
    return f"{sentence} This run differs: {changed}." if changed else sentence
