"""Write a tiny data set of one's own kind: orders as customers write them, and the line that goes into the order book.

    python examples/own-data/make_orders.py

The how-to page uses the two files; a real one would come from your own records.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
SYSTEM = "You turn a customer's message into one line of the order book."
GREETINGS = ("Hello,", "Good morning,", "Hi,", "Dear baker,", "Good evening,", "")
CUSTOMERS = (
    "Mrs Bell",
    "Mr Cole",
    "Anna Rush",
    "Tom Fletcher",
    "Miss Frost",
    "Dr Reed",
    "Ivy Chandler",
    "Mr Pike",
    "the school",
    "the Swan Inn",
)
GOODS = (
    "white loaves",
    "rye loaves",
    "cherry tarts",
    "cheese rolls",
    "seed cakes",
    "currant buns",
    "apple pies",
    "honey cakes",
    "oat biscuits",
)
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "eight": 8, "ten": 10, "a dozen": 12, "twenty": 20}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
WAYS = {
    "I shall fetch them": "collect",
    "please bring them round": "deliver",
    "I will pick them up": "collect",
    "please deliver them": "deliver",
}
MESSAGES = (
    "{greeting} this is {customer}. I would like {number} {goods} for {day}, {way}.",
    "{greeting} could I have {number} {goods} on {day}? It is for {customer}; {way}.",
    "{greeting} {number} {goods} by {day} for {customer}, if you can; {way}.",
    "{greeting} {customer} here. We need {number} {goods} on {day}, and {way}. Thank you!",
)


def make_rows(num_rows: int, rng: Random) -> list[dict[str, object]]:
    """Distinct orders in ``messages`` form."""
    rows: dict[str, dict[str, object]] = {}
    while len(rows) < num_rows:
        number, way = rng.choice(list(NUMBERS)), rng.choice(list(WAYS))
        customer, goods, day = rng.choice(CUSTOMERS), rng.choice(GOODS), rng.choice(DAYS)
        message = rng.choice(MESSAGES).format(
            greeting=rng.choice(GREETINGS), customer=customer, number=number, goods=goods, day=day, way=way
        )
        message = message.strip()
        message = message[0].upper() + message[1:]
        answer = f"{day}: {NUMBERS[number]} {goods}, {customer}, {WAYS[way]}"
        rows[answer] = {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": message},
                {"role": "assistant", "content": answer},
            ]
        }
    return list(rows.values())


def main(output: Path = HERE) -> None:
    """Write ``train.jsonl`` and ``heldout.jsonl``; no order is in both."""
    rows = make_rows(280, Random("orders"))
    for name, part in (("train", rows[:240]), ("heldout", rows[240:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
