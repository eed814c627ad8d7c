"""One plain document: a genre by weight, then its text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from prose import numbers, questions, records, reference
from prose.grammar import Scene
from prose.people import add_person
from prose.world import World


def _sums(scene: Scene) -> str:
    pairs = [numbers.exercise(scene) for _ in range(scene.rng.randint(2, 6))]
    if scene.random() < 0.5:
        return "\n".join(f"Q: {question}\nA: {answer}" for question, answer in pairs)
    return "\n\n".join(f"{question}\n{answer}" for question, answer in pairs)


def _story(scene: Scene) -> str:
    chapters = [scene.section("story")]
    while len(chapters) < 4 and scene.random() < 0.35:
        add_person(scene, "q")
        chapters.append(
            scene.write(
                "[The next {season}|Some time later|A year later|In {month}|Later that year|One {daypart}], {p} "
                "{act:past}. [|{here.sense} |{weather.line} ]{plot}"
            )
        )
    return "\n\n".join(chapters)


def _forms(scene: Scene) -> str:
    lines = []
    for _ in range(scene.rng.randint(2, 5)):
        source, target, result = questions.forms(scene)
        lines.append(
            f"{source} In {target}: {result}"
            if target.startswith("the")
            else f"{source} {target[0].upper()}{target[1:]}: {result}"
        )
    return "\n".join(lines)


def _sorting(scene: Scene) -> str:
    return "\n".join(" ".join(questions.sorting(scene)) for _ in range(scene.rng.randint(1, 4)))


Genre = Callable[[Scene, World], str]
GENRES: dict[str, tuple[float, Genre]] = {
    "story": (34, lambda scene, world: _story(scene)),
    "passage": (16, lambda scene, world: scene.section("free")),
    "describe": (13, lambda scene, world: scene.section("describe")),
    "diary": (7, lambda scene, world: scene.section("diary")),
    "letter": (7, lambda scene, world: scene.section("letter")),
    "dialogue": (8, lambda scene, world: scene.section("dialogue")),
    "howto": (3, lambda scene, world: scene.section("howto")),
    "place": (5, reference.place_entry),
    "county": (2, reference.county_entry),
    "facts": (6, lambda scene, world: reference.facts(scene)),
    "sums": (6, lambda scene, world: _sums(scene)),
    "counting": (1, lambda scene, world: numbers.counting(scene)),
    "record": (9, records.record),
    "shopping": (3, lambda scene, world: records.shopping(scene)),
    "word list": (2, lambda scene, world: records.word_list(scene)),
    "reading": (6, lambda scene, world: questions.reading(scene)),
    "paraphrase": (4, lambda scene, world: questions.paraphrases(scene)),
    "forms": (3, lambda scene, world: _forms(scene)),
    "comparison": (2, lambda scene, world: questions.comparison(scene)),
    "sorting": (1, lambda scene, world: _sorting(scene)),
}
_NAMES = tuple(GENRES)
_BOUNDS = tuple(accumulate(weight for weight, _ in GENRES.values()))


def document(scene: Scene, world: World) -> str:
    """A document of a random genre."""
    at = scene.random() * _BOUNDS[-1]
    name = next(name for name, bound in zip(_NAMES, _BOUNDS, strict=True) if at < bound)
    return GENRES[name][1](scene, world)
