"""Everyday conversations in the chat template: questions, explanations, small tasks."""

from __future__ import annotations

from prose import numbers, questions, records, reference
from prose.grammar import Scene, polish
from prose.world import World

Message = dict[str, str]

_ASK_STORY = (
    "Tell me a story.",
    "Tell me a short story.",
    "Can you tell me a story about {p}?",
    "Write a story about {p} and {q}.",
    "Please write a short story about {p}, who lives in {v}.",
    "I would like to hear a story.",
    "A story about {p}, please.",
)
_ASK_HOWTO = (
    "Explain it to me: {t}.",
    "Can you explain {t}?",
    "Can you tell me {t}?",
    "Please tell me {t}.",
    "I want to know {t}.",
)
_HELLO = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi!", "Hello! What can I do for you?"),
    ("Good morning!", "Good morning! How are you today?"),
    ("Good evening!", "Good evening! What would you like to know?"),
    ("How are you?", "I am well, thank you. How can I help you?"),
    ("Who are you?", "I am a small language model. I can tell stories and answer simple questions."),
    (
        "What can you do?",
        "I can tell stories, answer simple questions and do small sums. I am small, so I make mistakes.",
    ),
    ("What is your name?", "My name is Ember. I am a small language model."),
    ("Are you a person?", "No, I am a computer program that has learnt to write simple English."),
    ("Can you help me?", "Yes, gladly. What do you need?"),
    ("Do you know everything?", "No, I know only a little, and I can be wrong."),
)
_THANKS = (
    ("Thank you!", "You are welcome!"),
    ("Thanks a lot.", "You are welcome. Is there anything else?"),
    ("Thank you, that is all.", "Goodbye! Have a good day."),
    ("Great, thank you.", "I am glad that I could help."),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("That was nice.", "Thank you! I am glad that you liked it."),
)


def _story(scene: Scene, world: World) -> list[tuple[str, str]]:
    ask = scene.rng.choice(_ASK_STORY).format(p=scene["p"], q=scene["q"], v=scene["village"])
    return [(ask, scene.section("story"))]


def _facts(scene: Scene, world: World) -> list[tuple[str, str]]:
    return [reference.fact(scene)[1:] for _ in range(scene.rng.randint(1, 3))]


def _sums(scene: Scene, world: World) -> list[tuple[str, str]]:
    return [numbers.exercise(scene) for _ in range(scene.rng.randint(1, 3))]


def _places(scene: Scene, world: World) -> list[tuple[str, str]]:
    if scene.random() < 0.3:
        entry = reference.place_entry(scene, world).rpartition("\n\n")[2]
        name = next((n for n in world.names if n in entry), "this place")
        return [
            (
                scene.rng.choice(
                    (f"Tell me about {name}.", f"What do you know about {name}?", f"Describe {name}, please.")
                ),
                entry,
            )
        ]
    return [reference.place_question(scene, world) for _ in range(scene.rng.randint(1, 3))]


def _reading(scene: Scene, world: World) -> list[tuple[str, str]]:
    text, asked = questions.passage(scene)
    (first, answer), *more = asked
    return [(f"{text} {first}", answer), *more]


def _howto(scene: Scene, world: World) -> list[tuple[str, str]]:
    text = scene.section("howto")
    title, _, body = text.partition("\n\n")
    if not body:
        return _facts(scene, world)
    return [(polish(scene.rng.choice(_ASK_HOWTO).format(t=title[0].lower() + title[1:])), body)]


def _rewrite(scene: Scene, world: World) -> list[tuple[str, str]]:
    if scene.random() < 0.5:
        first, second = questions.paraphrase(scene)
        ask = scene.rng.choice(("Say this in another way: ", "Put this differently: ", "How else can you say this? "))
        return [(ask + first, second)]
    source, target, result = questions.forms(scene)
    verb = "Turn this into " if target.startswith("a ") else "Put this into "
    return [(f"{verb}{target}: {source}", result)]


def _small(scene: Scene, world: World) -> list[tuple[str, str]]:
    if scene.random() < 0.5:
        return [questions.sorting(scene)]
    key = scene.rng.choice(("animal", "fruit", "vegetable", "tree", "flower", "colour", "herb"))
    number = scene.rng.choice(("two", "three", "four"))
    count = {"two": 2, "three": 3, "four": 4}[number]
    items = list(dict.fromkeys(scene.choose(key) for _ in range(12)))[:count]
    noun = {
        "animal": "animals",
        "fruit": "fruits",
        "vegetable": "vegetables",
        "tree": "trees",
        "flower": "flowers",
        "colour": "colours",
        "herb": "herbs",
    }[key]
    return [
        (
            scene.rng.choice((f"Name {number} {noun}.", f"Can you name {number} {noun}?", f"Give me {number} {noun}.")),
            polish(", ".join(items[:-1]) + " and " + items[-1] + "."),
        )
    ]


def _letter(scene: Scene, world: World) -> list[tuple[str, str]]:
    ask = scene.rng.choice(
        (
            "Write a letter from {q} to {p}.",
            "{q} wants to write to {p}. Please write the letter.",
            "Please write a short letter to {p} from {q}.",
        )
    )
    return [(ask.format(p=scene["p"], q=scene["q"]), scene.section("letter"))]


def _describe(scene: Scene, world: World) -> list[tuple[str, str]]:
    what, key = scene.rng.choice(
        (
            ("a place", "d.place"),
            ("the weather", "d.weather"),
            ("a meal", "d.meal"),
            ("a person", "d.person"),
            ("a room", "d.room"),
            ("a thing", "d.thing"),
            ("a day", "d.day"),
            ("a season", "d.season"),
        )
    )
    return [
        (
            scene.rng.choice(("Describe {w}.", "Write a few sentences about {w}.", "Can you describe {w}?")).format(
                w=what
            ),
            scene.section(key),
        )
    ]


def _list(scene: Scene, world: World) -> list[tuple[str, str]]:
    text = records.shopping(scene)
    head, _, said = text.rpartition("\n\n")
    return [(f"Write this as a sentence.\n{head}", said)] if head else _small(scene, world)


_KINDS = (
    _story,
    _story,
    _facts,
    _facts,
    _facts,
    _sums,
    _sums,
    _places,
    _places,
    _reading,
    _reading,
    _howto,
    _rewrite,
    _rewrite,
    _small,
    _letter,
    _describe,
    _describe,
    _list,
)


def conversation(scene: Scene, world: World) -> list[Message]:
    """One conversation of one to five exchanges."""
    turns: list[tuple[str, str]] = []
    if scene.random() < 0.12:
        turns.append(scene.rng.choice(_HELLO))
    turns += scene.rng.choice(_KINDS)(scene, world)
    if scene.random() < 0.12:
        turns.append(scene.rng.choice(_THANKS))
    return [
        message
        for asked, answered in turns
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    ]
