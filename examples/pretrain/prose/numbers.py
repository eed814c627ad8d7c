"""Counting, sums, money, time and dates, with correct answers in digits and in words."""

from __future__ import annotations

from prose.grammar import Scene, polish
from prose.inflection import in_words, listing, ordinal, plural


def _say(scene: Scene, n: int) -> str:
    return in_words(n) if scene.random() < 0.6 else str(n)


def exercise(scene: Scene) -> tuple[str, str]:
    """One question and its answer (a full sentence)."""
    makers = (
        _sum,
        _sum,
        _story_sum,
        _story_sum,
        _money,
        _clock,
        _next,
        _compare,
        _weekday,
        _spell,
        _double,
        _units,
        _ordinal,
    )
    question, answer = makers[int(scene.random() * len(makers))](scene)
    return polish(question), polish(answer)


def _sum(scene: Scene) -> tuple[str, str]:
    rng = scene.rng
    op = rng.choice("+++---xx/")
    a, b = rng.randint(1, 60), rng.randint(1, 40)
    if op == "-" and b > a:
        a, b = b, a
    if op in "x/":
        a, b = rng.randint(1, 12), rng.randint(1, 12)
    if op == "/":
        a = a * b
    value = {"+": a + b, "-": a - b, "x": a * b, "/": a // b}[op]
    word = {"+": "plus", "-": "minus", "x": "times", "/": "divided by"}[op]
    if rng.random() < 0.4:
        sign = {"+": "+", "-": "-", "x": "x", "/": ":"}[op]
        return f"{a} {sign} {b} =", f"{a} {sign} {b} = {value}"
    if rng.random() < 0.5:
        return f"What is {a} {word} {b}?", f"{a} {word} {b} is {value}."
    return f"What is {in_words(a)} {word} {in_words(b)}?", f"{in_words(a)} {word} {in_words(b)} is {in_words(value)}."


def _count(scene: Scene, n: int, noun: str) -> str:
    return f"{_say(scene, n)} {noun if n == 1 else plural(noun)}"


def _story_sum(scene: Scene) -> tuple[str, str]:
    rng = scene.rng
    noun = scene.choose(rng.choice(("fruit", "animal", "thing", "vegetable")))
    p, he, q = scene["p"], scene["p.he"], scene["q"]
    a, b = rng.randint(2, 20), rng.randint(1, 12)
    many = plural(noun)
    match rng.randrange(5):
        case 0:
            return (
                f"{p} has {_count(scene, a, noun)}. {q} gives {scene['p.him']} {_say(scene, b)} more. How many "
                f"{many} does "
                f"{p} have now?",
                f"{p} has {_count(scene, a + b, noun)}.",
            )
        case 1:
            a = max(a, b + 1)
            return (
                f"{p} has {_count(scene, a, noun)}. {he} sells {_say(scene, b)} of them. How many are left?",
                f"{_count(scene, a - b, noun)} {'is' if a - b == 1 else 'are'} left.",
            )
        case 2:
            noun = scene.choose("fruit")
            a, b = rng.randint(2, 9), rng.randint(2, 9)
            return (
                f"There are {_say(scene, a)} baskets with {_count(scene, b, noun)} in each. How many "
                f"{plural(noun)} are there?",
                f"There are {_count(scene, a * b, noun)}.",
            )
        case 3:
            noun = scene.choose("fruit")
            a, b = rng.randint(2, 9), rng.randint(2, 6)
            return (
                f"{p} shares {_count(scene, a * b, noun)} between {_say(scene, b)} children. How many does each "
                f"child get?",
                f"Each child gets {_count(scene, a, noun)}.",
            )
        case _:
            return (
                f"{p} saw {_count(scene, a, noun)} on Monday and {_say(scene, b)} on Tuesday. How many did {he} "
                f"see in all?",
                f"{he} saw {_count(scene, a + b, noun)} in all.",
            )


def _money(scene: Scene) -> tuple[str, str]:
    rng = scene.rng
    thing, price = scene.choose("thing"), rng.randint(2, 19)
    if rng.random() < 0.5:
        paid = price + rng.randint(1, 20)
        return (
            f"A {thing} costs {_say(scene, price)} pounds. {scene['p']} pays with {_say(scene, paid)} pounds. How "
            f"much change "
            f"does {scene['p.he']} get?",
            f"{scene['p.he']} gets {_count(scene, paid - price, 'pound')} back.",
        )
    n = rng.randint(2, 9)
    return (
        f"One {thing} costs {_say(scene, price)} pounds. How much do {_say(scene, n)} {plural(thing)} cost?",
        f"They cost {_count(scene, n * price, 'pound')}.",
    )


def clock_words(minutes: int) -> str:
    """A time of day in words, to five minutes: ``quarter past three``."""
    hour, minute = divmod(minutes % 720, 60)
    now, following = in_words(hour or 12), in_words(hour % 12 + 1)
    if minute == 0:
        return now + " o'clock"
    if minute == 30:
        return "half past " + now
    part = "quarter" if minute in (15, 45) else in_words(minute if minute < 30 else 60 - minute)
    return f"{part} past {now}" if minute < 30 else f"{part} to {following}"


def _clock(scene: Scene) -> tuple[str, str]:
    rng = scene.rng
    start = rng.randrange(84, 240) * 5
    if rng.random() < 0.4:
        hour, minute = divmod(start, 60)
        return f"How do you say {hour % 12 or 12}:{minute:02d} in words?", f"It is {clock_words(start)}."
    step = rng.choice((15, 30, 45, 60, 90, 120, 180))
    length = {
        15: "a quarter of an hour",
        30: "half an hour",
        45: "three quarters of an hour",
        60: "an hour",
        90: "an hour and a half",
        120: "two hours",
        180: "three hours",
    }[step]
    return (
        f"The {rng.choice(('train', 'bus', 'ferry'))} leaves at {clock_words(start)} and takes {length}. When "
        f"does it arrive?",
        f"It arrives at {clock_words(start + step)}.",
    )


def _next(scene: Scene) -> tuple[str, str]:
    rng = scene.rng
    start, step = rng.randint(1, 40), rng.choice((1, 1, 2, 2, 3, 5, 10))
    shown = [start + i * step for i in range(5)]
    names = [in_words(n) for n in shown] if rng.random() < 0.5 else [str(n) for n in shown]
    following = in_words(shown[-1] + step) if names[0].isalpha() else str(shown[-1] + step)
    return f"Which number comes next: {', '.join(names)}?", f"The next number is {following}."


def _compare(scene: Scene) -> tuple[str, str]:
    a, b = scene.rng.sample(range(1, 200), 2)
    big, small = max(a, b), min(a, b)
    if scene.random() < 0.5:
        return f"Which is larger, {a} or {b}?", f"{big} is larger than {small}."
    return f"Which is smaller, {in_words(a)} or {in_words(b)}?", f"{in_words(small)} is smaller than {in_words(big)}."


def _weekday(scene: Scene) -> tuple[str, str]:
    days, months = scene.lexicon["weekday"], scene.lexicon["month"]
    names = days if scene.random() < 0.6 else months
    kind = "day" if names is days else "month"
    index = scene.rng.randrange(len(names))
    if scene.random() < 0.5:
        return (
            f"Which {kind} comes after {names[index]}?",
            f"{names[(index + 1) % len(names)]} comes after {names[index]}.",
        )
    return f"Which {kind} comes before {names[index]}?", f"{names[index - 1]} comes before {names[index]}."


def _spell(scene: Scene) -> tuple[str, str]:
    n = scene.rng.randint(11, 999)
    return f"Write {n} in words.", f"{n} is {in_words(n)}."


def _double(scene: Scene) -> tuple[str, str]:
    n = scene.rng.randint(1, 50)
    if scene.random() < 0.5:
        return f"What is twice {_say(scene, n)}?", f"Twice {in_words(n)} is {in_words(2 * n)}."
    return f"What is half of {_say(scene, 2 * n)}?", f"Half of {in_words(2 * n)} is {in_words(n)}."


def _units(scene: Scene) -> tuple[str, str]:
    rng = scene.rng
    n = rng.randint(2, 9)
    small, large, factor = rng.choice(
        (
            ("days", "weeks", 7),
            ("minutes", "hours", 60),
            ("months", "years", 12),
            ("hours", "days", 24),
            ("pence", "pounds", 100),
            ("seconds", "minutes", 60),
            ("metres", "kilometres", 1000),
            ("grams", "kilograms", 1000),
            ("years", "centuries", 100),
        )
    )
    return (
        f"How many {small} are there in {in_words(n)} {large}?",
        f"There are {n * factor} {small} in {in_words(n)} {large}.",
    )


def _ordinal(scene: Scene) -> tuple[str, str]:
    n = scene.rng.randrange(12)
    month = scene.lexicon["month"][n]
    return f"Which month of the year is {month}?", f"{month} is the {ordinal(n + 1)} month of the year."


def counting(scene: Scene) -> str:
    """A line or two of counting."""
    rng = scene.rng
    start, step = rng.randint(1, 60), rng.choice((1, 1, 1, 2, 5, 10))
    numbers = [start + i * step for i in range(rng.randint(6, 14))]
    if rng.random() < 0.3:
        numbers.reverse()
    words = [in_words(n) for n in numbers] if rng.random() < 0.6 else [str(n) for n in numbers]
    return polish(
        rng.choice(
            (f"{scene['p']} counted: {', '.join(words)}.", f"{', '.join(words)}.", f"Count with me: {listing(words)}.")
        )
    )
