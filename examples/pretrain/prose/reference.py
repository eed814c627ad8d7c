"""Short encyclopaedia entries: the invented country, and plain facts that are true everywhere."""

from __future__ import annotations

from prose.grammar import Scene, polish
from prose.inflection import in_words, plural
from prose.world import Place, World

_SECTIONS = "capital opposite young sound home eats legs colour from tool works group kind qa qa qa qa"


def place_text(scene: Scene, template: str, place: Place) -> str:
    """Fills ``{field}`` of a place."""
    fields = {name: str(getattr(place, name)) for name in place.__slots__}
    fields["people"] = f"{place.people:,}" if place.people > 999 else str(place.people)
    fields["miles"] = in_words(place.miles)
    fields["market_day+s"] = plural(place.market_day)
    for name, value in fields.items():
        template = template.replace("{" + name + "}", value)
    return polish(template)


def place_entry(scene: Scene, world: World) -> str:
    """An entry about one place, three to eight sentences."""
    place = scene.rng.choice(world.places)
    first, *others = (line.split("|") for line in scene.lexicon["frames.place"])
    chosen = scene.rng.sample(others, scene.rng.randint(2, 7))
    text = " ".join(scene.rng.choice(frames) for frames in [first, *chosen])
    title = f"{place.name}\n\n" if scene.random() < 0.5 else ""
    return title + place_text(scene, text, place)


def county_entry(scene: Scene, world: World) -> str:
    """An entry that connects several places."""
    county = scene.rng.choice(sorted(world.counties))
    places = [place for place in world.places if place.county == county]
    a, b, c = scene.rng.sample(places, 3)
    older, younger = sorted((a, b), key=lambda p: p.founded)
    larger, smaller = sorted((a, c), key=lambda p: -p.people)
    return polish(
        f"The chief town of {county} is {world.counties[county]}. {a.name}, {b.name} and {c.name} are places in "
        f"{county}. "
        f"{older.name} is older than {younger.name}: it was founded in {older.founded}, and {younger.name} was "
        f"founded in "
        f"{younger.founded}. {larger.name} has more people than {smaller.name}. {a.name} is known for its "
        f"{a.product}, "
        f"{b.name} for its {b.product} and {c.name} for its {c.product}."
    )


def place_question(scene: Scene, world: World) -> tuple[str, str]:
    """A question about a place and its answer."""
    place = scene.rng.choice(world.places)
    question, answer = scene.rng.choice(scene.lexicon["frames.question"]).split("|")
    return place_text(scene, question, place), place_text(scene, answer, place)


def fact(scene: Scene) -> tuple[str, str, str]:
    """A plain fact: a statement, a question and its answer."""
    kinds = [f"fact.{kind}" for kind in _SECTIONS.split()]
    kind = kinds[int(scene.random() * len(kinds))]
    if kind == "fact.qa":
        question, _, answer = scene.choose(kind).partition("|")
        return answer, question, answer
    first, _, second = scene.choose(kind).partition(":")
    frames = scene.lexicon[f"frames.{kind}"][0].split("|")
    named = first if first.lower() in scene.lexicon["frames.no-article"] else "a " + first

    def fill(frame: str) -> str:
        frame = frame.replace("{0^}", first[:1].upper() + first[1:]).replace("{0}", first).replace("{1}", second)
        return polish(frame.replace("{a0^}", named).replace("{a0}", named))

    plural_subject = kind == "fact.from" and first.endswith("s") and first not in ("glass", "chess")
    statement = fill(frames[int(scene.random() * 2)])
    if plural_subject:
        statement = statement.replace(" comes from ", " come from ")
    return statement, fill(frames[2]), fill(frames[3])


def facts(scene: Scene) -> str:
    """A few facts, as statements or as questions and answers."""
    chosen = [fact(scene) for _ in range(scene.rng.randint(3, 8))]
    if scene.random() < 0.5:
        return " ".join(statement for statement, _, _ in chosen)
    if scene.random() < 0.5:
        return "\n".join(f"Q: {question}\nA: {answer}" for _, question, answer in chosen)
    return "\n\n".join(f"{question} {answer}" for _, question, answer in chosen)
