"""Passages with questions, paraphrases and small exercises with language; the answers follow from the text."""

from __future__ import annotations

from prose.grammar import Scene, conjugate, polish
from prose.inflection import listing

QuestionAnswers = list[tuple[str, str]]


def passage(scene: Scene) -> tuple[str, QuestionAnswers]:
    """A passage about one or two people and questions that it answers."""
    p, q, he = scene["p"], scene["q"], scene["p.he"]
    days = list(scene.lexicon["weekday"])
    start = int(scene.random() * 5)
    first, second, third = scene.action(), scene.action(), scene.action("q")
    past = [conjugate(action, "past") for action in (first, second, third)]
    town, food, trade = scene["village"], scene.choose("food"), scene.choose("trade")
    place = scene.pick(f"{scene.domain}.place")
    match scene.rng.randrange(4):
        case 0:
            text = (
                f"On {days[start]}, {p} {past[0]}. On {days[start + 1]}, {he} {past[1]}. {q} came on "
                f"{days[start + 2]} and "
                f"{past[2]}."
            )
            asked = [
                (f"What did {p} do on {days[start]}?", f"On {days[start]}, {p} {past[0]}."),
                (f"What did {p} do on {days[start + 1]}?", f"On {days[start + 1]}, {p} {past[1]}."),
                (f"When did {q} come?", f"{q} came on {days[start + 2]}."),
                (f"Who came on {days[start + 2]}?", f"{q} came on {days[start + 2]}."),
            ]
        case 1:
            text = (
                f"{p} is a {trade} and lives in {town}. Every {days[start]}, {he} likes to "
                f"{conjugate(first, 'base')}. Afterwards, "
                f"{he} eats {food} with {q}, who {conjugate(third, 's')}."
            )
            asked = [
                (f"What does {p} do for a living?", f"{p} is a {trade}."),
                (f"Where does {p} live?", f"{p} lives in {town}."),
                (f"What does {p} eat?", f"{p} eats {food}."),
                (f"With whom does {p} eat?", f"{p} eats with {q}."),
                (f"What does {q} do?", f"{q} {conjugate(third, 's')}."),
            ]
        case 2:
            trouble = scene.pick(f"{scene.domain}.trouble")
            text = (
                f"{p} and {q} were {place}. {p} wanted to {conjugate(first, 'base')}, but {trouble}. So {he} "
                f"{past[1]} instead. "
                f"{q} {past[2]}."
            )
            asked = [
                (f"Where were {p} and {q}?", f"They were {place}."),
                (f"What did {p} want to do?", f"{p} wanted to {conjugate(first, 'base')}."),
                ("What went wrong?", f"{trouble}."),
                (f"What did {p} do instead?", f"{p} {past[1]}."),
                (f"What did {q} do?", f"{q} {past[2]}."),
            ]
        case _:
            thing, colour, other = scene.choose("thing"), scene.choose("colour"), scene.choose("colour")
            room = scene.choose("room")
            text = (
                f"{p} has a {colour} {thing}, and {q} has a {other} one. {p} keeps {scene['p.his']} {thing} in "
                f"the {room}. "
                f"Yesterday {he} {past[0]}, and {q} {past[2]}."
            )
            asked = [
                (f"What colour is {p}'s {thing}?", f"{p}'s {thing} is {colour}."),
                (f"Who has a {other} {thing}?", f"{q} has a {other} {thing}."),
                (f"Where does {p} keep the {thing}?", f"{p} keeps it in the {room}."),
                (f"What did {q} do yesterday?", f"Yesterday {q} {past[2]}."),
            ]
    chosen = scene.rng.sample(asked, scene.rng.randint(1, min(3, len(asked))))
    return polish(text), [(polish(question), polish(answer)) for question, answer in chosen]


def reading(scene: Scene) -> str:
    """A passage with its questions as one document."""
    text, asked = passage(scene)
    if scene.random() < 0.5:
        return text + "\n\n" + "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in asked)
    return text + "\n" + "\n".join(f"{question} {answer}" for question, answer in asked)


def paraphrase(scene: Scene) -> tuple[str, str]:
    """Two sentences that mean the same."""
    p, q, his = scene["p"], scene["q"], scene["p.his"]
    action = scene.action()
    base, past, ing = (conjugate(action, form) for form in ("base", "past", "ing"))
    day, trade, town, gift = scene.choose("weekday"), scene.choose("trade"), scene["village"], scene.choose("gift")
    trouble = scene.pick(f"{scene.domain}.trouble")
    groups = (
        (f"{p} {past} on {day}.", f"On {day}, {p} {past}.", f"It was on {day} that {p} {past}."),
        (f"{p} likes to {base}.", f"What {p} likes to do is {base}.", f"{p} enjoys {ing}."),
        (
            f"{p} is a {trade} in {town}.",
            f"{p} works as a {trade} in {town}.",
            f"There is a {trade} in {town} called {p}.",
        ),
        (f"{p} gave {q} a {gift}.", f"{q} got a {gift} from {p}.", f"A {gift} was given to {q} by {p}."),
        (
            f"{p} was sad because {trouble}.",
            f"Because {trouble}, {p} was sad.",
            f"The reason why {p} was sad was that {trouble}.",
        ),
        (
            f"{p} did not {base}, because {trouble}.",
            f"Because {trouble}, {p} did not {base}.",
            f"{trouble}, so {p} did not {base}.",
        ),
        (f"{p} began to {base}.", f"{p} started {ing}."),
        (f"After {ing}, {p} went home.", f"First {p} {past}, and then {scene['p.he']} went home."),
        (
            f"{p} lives in {town} with {his} {scene.choose('pet')}.",
            f"{p}'s home is in {town}, where {scene['p.he']} lives with a pet.",
        ),
    )
    first, second = scene.rng.sample(scene.rng.choice(groups), 2)
    return polish(first), polish(second)


def paraphrases(scene: Scene) -> str:
    """Sentences said in another way."""
    pairs = [paraphrase(scene) for _ in range(scene.rng.randint(1, 3))]
    joint = scene.rng.choice(("In other words: ", "That is to say: ", "This means: "))
    if scene.random() < 0.5:
        return "\n".join(f"{first} {joint}{second}" for first, second in pairs)
    return "\n\n".join(f"{first}\n{second}" for first, second in pairs)


def forms(scene: Scene) -> tuple[str, str, str]:
    """A sentence in one form, the name of another form, and the sentence in it."""
    p, action = scene["p"], scene.action()
    base, past, third, ing, done = (conjugate(action, form) for form in ("base", "past", "s", "ing", "pp"))
    sentences = {
        "the past": f"{p} {past}.",
        "the present": f"{p} {third}.",
        "the future": f"{p} will {base}.",
        "a question": f"Did {p} {base}?",
        "the negative": f"{p} did not {base}.",
    }
    extra = {"now": f"{p} is {ing}.", "already": f"{p} has {done}."}
    names = sorted(sentences)
    source, target = scene.rng.sample(names, 2)
    if scene.random() < 0.2:
        word = scene.rng.choice(sorted(extra))
        return (
            polish(sentences["the past"]),
            f"a sentence with the word {word}",
            polish(extra[word].replace(" has ", " has already ").replace(" is ", " is now ", 1)),
        )
    return polish(sentences[source]), target, polish(sentences[target])


def comparison(scene: Scene) -> str:
    """Two things or people compared."""
    rng = scene.rng
    p, q = scene["p"], scene["q"]
    short, more = rng.choice(
        (
            ("old", "older"),
            ("tall", "taller"),
            ("fast", "faster"),
            ("strong", "stronger"),
            ("young", "younger"),
            ("quiet", "quieter"),
        )
    )
    thing, other = scene.choose("thing"), scene.choose("thing")
    price, higher = sorted(rng.sample(range(2, 40), 2))
    trade, trade2 = scene.choose("trade"), scene.choose("trade")
    return polish(
        rng.choice(
            (
                f"{p} is {more} than {q}, and {q} is {more} than {scene['q2']}. So {p} is the "
                f"{short.removesuffix('e')}est of the three.",
                f"The {thing} costs {price} pounds, and the {other} costs {higher} pounds. The {other} is more "
                f"expensive than the {thing}. "
                f"It costs {higher - price} pounds more.",
                f"{p} is a {trade}, and {q} is a {trade2}. Both live in {scene['village']}. {p} likes "
                f"{scene.choose('food')}, but {q} likes "
                f"{scene.choose('food')}. {p} is {scene.choose('kind')}, while {q} is {scene.choose('kind')}.",
                f"{p} has {price} buttons, and {q} has {higher}. {q} has more buttons than {p}. {p} has fewer.",
                f"A {thing} and a {other} are both useful, but not for the same thing. {p} uses the {thing} every "
                f"day and the {other} only in "
                f"{scene.choose('season')}.",
            )
        )
    )


def sorting(scene: Scene) -> tuple[str, str]:
    """Words to sort, or the one that does not belong; and the answer."""
    rng = scene.rng
    keys = ("animal", "fruit", "vegetable", "tree", "colour", "furniture", "herb")
    names = {
        "animal": "an animal",
        "fruit": "a fruit",
        "vegetable": "a vegetable",
        "tree": "a tree",
        "colour": "a colour",
        "furniture": "a piece of furniture",
        "herb": "a herb",
    }
    key, odd_key = rng.sample(keys, 2)
    words = [word for word in dict.fromkeys(scene.choose(key) for _ in range(6))][:3]
    if rng.random() < 0.5:
        odd = scene.choose(odd_key)
        if odd in scene.lexicon[key]:
            odd = "lantern"
        shown = rng.sample([*words, odd], len(words) + 1)
        kind = names[odd_key] if odd != "lantern" else "a thing"
        return f"Which word does not belong: {', '.join(shown)}?", polish(
            f"{odd} does not belong, because it is {kind}."
        )
    shown = rng.sample(words, len(words))
    return f"Put these words in alphabetical order: {', '.join(shown)}.", polish(f"{listing(sorted(shown))}.")
