"""Short encyclopaedia entries: the invented country, and plain facts that are true everywhere."""

from __future__ import annotations

from prose.grammar import Scene, polish
from prose.inflection import in_words, plural
from prose.world import Place, World

_PLACE = """
{name} is a {kind} in {county}. | {name} is a {kind} on the {river}. | The {kind} of {name} lies in {county}, on the river {river}.
It has {people} people. | About {people} people live there. | {people} people live in {name}.
It was founded in {founded}. | {name} was founded in the year {founded}. | The oldest part was built in {founded}.
It is known for its {product}. | {name} is famous for {product}. | Many people there live by {product}.
Visitors come to see {sight}. | In the middle there is {sight}. | The best-known sight is {sight}.
Market day is {market_day}. | The market is held on {market_day+s}. | On {market_day+s}, there is a market.
The nearest place is {neighbour}, {miles} miles to the {direction}. | {neighbour} is {miles} miles {direction} of {name}.
The {trade} {person} was born there. | Its most famous child is the {trade} {person}. | {person}, the {trade}, came from {name}.
There is a {animal} in the arms of {name}. | Its sign is a {animal}. | The flag of {name} shows a {animal}.
The favourite dish in {name} is {dish}. | People there like to eat {dish}. | For a feast, they make {dish}.
""".strip().splitlines()
_PLACE_FRAMES = [[frame.strip() for frame in line.split("|")] for line in _PLACE]

_PLACE_QUESTIONS = """
Where is {name}?|{name} is in {county}.
Which river flows through {name}?|The {river} flows through {name}.
How many people live in {name}?|{people} people live in {name}.
When was {name} founded?|{name} was founded in {founded}.
What is {name} known for?|{name} is known for its {product}.
What can you see in {name}?|In {name}, you can see {sight}.
When is market day in {name}?|Market day in {name} is {market_day}.
Which place is near {name}?|{neighbour} is {miles} miles {direction} of {name}.
Who was born in {name}?|The {trade} {person} was born in {name}.
Who was {person}?|{person} was a {trade} from {name}.
Which animal is in the arms of {name}?|There is a {animal} in the arms of {name}.
What do people eat in {name}?|People in {name} like to eat {dish}.
""".strip().splitlines()
PLACE_QUESTIONS = [tuple(line.split("|")) for line in _PLACE_QUESTIONS]

_PAIR_FRAMES = {
    "fact.capital": "The capital of {0} is {1}.|{1} is the capital of {0}.|What is the capital of {0}?|The capital of {0} is {1}.",
    "fact.opposite": "The opposite of {0} is {1}.|{0^} is the opposite of {1}.|What is the opposite of {0}?|The opposite of {0} is {1}.",
    "fact.young": "A young {0} is called a {1}.|A {1} is a young {0}.|What is a young {0} called?|A young {0} is called a {1}.",
    "fact.sound": "A {0} {1}.|The {0} {1}.|Which sound does a {0} make?|A {0} {1}.",
    "fact.home": "A {0} lives in a {1}.|The home of a {0} is called a {1}.|Where does a {0} live?|A {0} lives in a {1}.",
    "fact.eats": "A {0} eats {1}.|The food of a {0} is {1}.|What does a {0} eat?|A {0} eats {1}.",
    "fact.legs": "A {0} has {1} legs.|The {0} has {1} legs.|How many legs has a {0}?|A {0} has {1} legs.",
    "fact.colour": "{0^} is {1}.|The colour of {0} is {1}.|What colour is {0}?|{0^} is {1}.",
    "fact.from": "{0^} comes from {1}.|We get {0} from {1}.|Where do we get {0} from?|We get {0} from {1}.",
    "fact.tool": "You use a {0} to {1}.|A {0} is used to {1}.|What is a {0} for?|You use a {0} to {1}.",
    "fact.works": "A {0} {1}.|The {0} {1}.|What does a {0} do?|A {0} {1}.",
    "fact.group": "Many {0} together are called a {1}.|A {1} is a group of {0}.|What do you call a group of {0}?|A group of {0} is called a {1}.",
    "fact.kind": "{a0^} is a {1}.|{a0^} is a kind of {1}.|What is {a0}?|{a0^} is a {1}.",
}  # fmt: skip
_UNCOUNTABLE = {"iron", "red", "winter", "monday", "may", "tea", "football", "mars", "africa", "gold", "copper", "chess",
                "granite", "europe"}  # fmt: skip


def place_text(scene: Scene, template: str, place: Place) -> str:
    """Fill ``{field}`` of a place."""
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
    first, *others = _PLACE_FRAMES
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
        f"The chief town of {county} is {world.counties[county]}. {a.name}, {b.name} and {c.name} are places in {county}. "
        f"{older.name} is older than {younger.name}: it was founded in {older.founded}, and {younger.name} was founded in "
        f"{younger.founded}. {larger.name} has more people than {smaller.name}. {a.name} is known for its {a.product}, "
        f"{b.name} for its {b.product} and {c.name} for its {c.product}."
    )


def place_question(scene: Scene, world: World) -> tuple[str, str]:
    """A question about a place and its answer."""
    place = scene.rng.choice(world.places)
    question, answer = scene.rng.choice(PLACE_QUESTIONS)
    return place_text(scene, question, place), place_text(scene, answer, place)


def fact(scene: Scene) -> tuple[str, str, str]:
    """A plain fact: a statement, a question and its answer."""
    kinds = (*_PAIR_FRAMES, "fact.qa", "fact.qa", "fact.qa", "fact.qa")
    kind = kinds[int(scene.random() * len(kinds))]
    if kind == "fact.qa":
        question, _, answer = scene.choose(kind).partition("|")
        return answer, question, answer
    first, _, second = scene.choose(kind).partition(":")
    frames = _PAIR_FRAMES[kind].split("|")
    named = first if first.lower() in _UNCOUNTABLE else "a " + first

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
