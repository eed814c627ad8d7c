"""Records and lists, and the sentences that say the same: the model learns to carry values from one to the other."""

from __future__ import annotations

from collections.abc import Callable

from prose.grammar import Scene, polish
from prose.inflection import in_words, listing, plural, with_articles
from prose.world import World

Fields = list[tuple[str, str]]


def _card(scene: Scene, fields: Fields) -> str:
    style = scene.rng.randrange(3)
    if style == 0:
        return "\n".join(f"{key.capitalize()}: {value}" for key, value in fields)
    if style == 1:
        return "\n".join(f"- {key}: {value}" for key, value in fields)
    return "; ".join(f"{key} = {value}" for key, value in fields)


def _person(scene: Scene, world: World) -> tuple[Fields, list[str]]:
    rng = scene.rng
    he, his, name = scene["p.he"], scene["p.his"], f"{scene['p']} {scene.choose('surname')}"
    trade, place, age, pet = scene.choose("trade"), rng.choice(world.names), rng.randint(19, 88), scene.choose("pet")
    petname, food, colour = scene.choose("petname"), scene.choose("food"), scene.choose("colour")
    fields = [
        ("name", name),
        ("trade", trade),
        ("home", place),
        ("age", str(age)),
        ("pet", f"{petname}, a {pet}"),
        ("favourite food", food),
        ("favourite colour", colour),
    ]
    return fields, [
        rng.choice((f"{name} is a {trade} from {place}.", f"{name} lives in {place} and works as a {trade}.")),
        rng.choice((f"{he} is {in_words(age)} years old.", f"{he} is {age}.")),
        rng.choice((f"{he} has a {pet} called {petname}.", f"{his} {pet} is called {petname}.")),
        rng.choice((f"{he} likes {food} best.", f"{his} favourite food is {food}.")),
        rng.choice((f"{his} favourite colour is {colour}.", f"{he} likes the colour {colour}.")),
    ]


def _book(scene: Scene, world: World) -> tuple[Fields, list[str]]:
    rng = scene.rng
    thing, animal = scene.choose("thing"), scene.choose("animal")
    title = rng.choice(
        (
            f"The {thing.title()} of {rng.choice(world.names)}",
            f"The {scene.choose('look').title()} {thing.title()}",
            f"The {animal.title()} and the {thing.title()}",
            f"A {thing.title()} for {scene['q']}",
        )
    )
    author, pages, year = f"{scene['p']} {scene.choose('surname')}", rng.randint(40, 600), rng.randint(1880, 2020)
    topic = with_articles(
        rng.choice(
            (
                f"a {scene.choose('trade')} and a {animal}",
                "a journey to the coast",
                "a long winter",
                "two friends",
                "a lost key",
            )
        )
    )
    fields = [("title", title), ("author", author), ("pages", str(pages)), ("year", str(year)), ("about", topic)]
    return fields, [
        rng.choice((f"{title} is a book by {author}.", f"{author} wrote {title}.")),
        rng.choice((f"It has {pages} pages.", f"The book is {pages} pages long.")),
        rng.choice((f"It came out in {year}.", f"It was printed in {year}.")),
        rng.choice((f"It is about {topic}.", f"The story is about {topic}.")),
    ]


def _weather(scene: Scene, world: World) -> tuple[Fields, list[str]]:
    rng = scene.rng
    place, day, sky = (
        rng.choice(world.names),
        scene.choose("weekday"),
        rng.choice(("cloudy", "sunny", "rainy", "foggy", "clear")),
    )
    degrees, wind = rng.randint(1, 29), rng.choice(("north", "south", "east", "west"))
    fields = [("place", place), ("weekday", day), ("sky", sky), ("temperature", f"{degrees} degrees"), ("wind", wind)]
    return fields, [
        rng.choice((f"On {day}, it was {sky} in {place}.", f"In {place}, {day} was {sky}.")),
        rng.choice(
            (
                f"The temperature was {degrees} degrees.",
                f"It was {in_words(degrees)} degrees." if degrees > 9 else f"It was only {in_words(degrees)} degrees.",
            )
        ),
        rng.choice((f"The wind blew from the {wind}.", f"There was a wind from the {wind}.")),
    ]


def _pet(scene: Scene, world: World) -> tuple[Fields, list[str]]:
    rng = scene.rng
    name, pet, colour, age = scene.choose("petname"), scene.choose("pet"), scene.choose("colour"), rng.randint(1, 14)
    owner, likes = scene["p"], scene.choose("food")
    fields = [("pet", name), ("kind", pet), ("colour", colour), ("age", str(age)), ("owner", owner), ("likes", likes)]
    return fields, [
        rng.choice((f"{name} is a {colour} {pet}.", f"{owner} has a {colour} {pet} called {name}.")),
        f"{name} is {in_words(age)} {'year' if age == 1 else 'years'} old.",
        rng.choice((f"{name} belongs to {owner}.", f"The owner is {owner}.")),
        rng.choice((f"{name} likes {likes}.", f"What {name} likes best is {likes}.")),
    ]


def _tool(scene: Scene, world: World) -> tuple[Fields, list[str]]:
    rng = scene.rng
    kind, materials = rng.choice(
        (
            ("woodthing", "wood oak pine ash"),
            ("metalthing", "iron brass copper tin"),
            ("claything", "clay china glass"),
            ("cloththing", "wool cotton linen silk"),
        )
    )
    thing, material, colour, room = (
        scene.choose(kind),
        rng.choice(materials.split()),
        scene.choose("colour"),
        scene.choose("room"),
    )
    maker, weight = f"{scene['q']} {scene.choose('surname')}", rng.randint(1, 20)
    fields = [
        ("object", thing),
        ("material", material),
        ("colour", colour),
        ("maker", maker),
        ("weight", f"{weight} kg"),
        ("kept in", f"the {room}"),
    ]
    return fields, [
        rng.choice((f"The {thing} is made of {material}.", f"It is a {thing} made of {material}.")),
        f"It is {colour} and weighs {in_words(weight)} {'kilogram' if weight == 1 else 'kilograms'}.",
        rng.choice((f"It was made by {maker}.", f"{maker} made it.")),
        rng.choice((f"It is kept in the {room}.", f"You can find it in the {room}.")),
    ]


_KINDS: tuple[Callable[[Scene, World], tuple[Fields, list[str]]], ...] = (_person, _book, _weather, _pet, _tool)


def record(scene: Scene, world: World) -> str:
    """A record and its description, in either order; or a record with questions."""
    rng = scene.rng
    fields, sentences = rng.choice(_KINDS)(scene, world)
    text = polish(" ".join(sentences))
    match rng.randrange(4):
        case 0:
            return f"{text}\n\n{_card(scene, fields)}"
        case 1:
            asked = rng.sample(fields, 2)
            return f"{_card(scene, fields)}\n\n" + "\n".join(
                f"{key.capitalize()}? {value[:1].upper() + value[1:]}." for key, value in asked
            )
        case _:
            return f"{_card(scene, fields)}\n\n{text}"


def shopping(scene: Scene) -> str:
    """A list and the sentence that says it."""
    rng = scene.rng
    n = rng.randint(3, 7)
    counted = [
        (rng.randint(2, 12), plural(scene.choose(rng.choice(("fruit", "vegetable", "thing"))))) for _ in range(n)
    ]
    lines = "\n".join(f"- {count} {noun}" for count, noun in counted)
    said = listing([f"{in_words(count)} {noun}" for count, noun in counted])
    verb = rng.choice(("bought", "needed", "brought home", "wrote down"))
    head = rng.choice(("Shopping list", f"{scene['p']}'s list", "To buy", f"For {scene['q']}"))
    if rng.random() < 0.3:
        return polish(f"{scene['p']} {verb} {said}. There were {in_words(sum(c for c, _ in counted))} things in all.")
    return f"{head}:\n{lines}\n\n" + polish(f"{scene['p']} {verb} {said}.")


def word_list(scene: Scene) -> str:
    """A list of things of a kind."""
    kinds = {
        "animal": "animals",
        "fruit": "fruits",
        "vegetable": "vegetables",
        "tree": "trees",
        "flower": "flowers",
        "colour": "colours",
        "trade": "jobs",
        "food": "things to eat",
        "clothes": "things to wear",
        "furniture": "things in a house",
        "herb": "herbs",
        "building": "buildings",
    }
    key = scene.rng.choice(sorted(kinds))
    items = [scene.choose(key) for _ in range(scene.rng.randint(3, 8))]
    items = list(dict.fromkeys(items))
    if scene.random() < 0.5:
        return f"Some {kinds[key]}:\n" + "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    return (
        polish(f"{in_words(len(items))} {kinds[key]}: {listing(items)}.")
        if len(items) > 1
        else f"Some {kinds[key]}: {items[0]}."
    )
