"""An invented country with facts that stay the same in every document.

A model this small learns some of them by heart and, more to the point, learns that a fact is answered as it was told.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from prose.grammar import Lexicon


@dataclass(frozen=True, slots=True)
class Place:
    """A village or town."""

    name: str
    kind: str
    county: str
    river: str
    founded: int
    people: int
    product: str
    sight: str
    market_day: str
    neighbour: str
    miles: int
    direction: str
    person: str
    trade: str
    is_female: bool
    animal: str
    dish: str


@dataclass(frozen=True, slots=True)
class World:
    """All places, and the counties with their chief towns."""

    places: tuple[Place, ...]
    counties: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all places."""
        return tuple(place.name for place in self.places)


@cache
def invent(words: tuple[tuple[str, tuple[str, ...]], ...], num_places: int = 96) -> World:
    """The country; always the same, whatever the corpus seed."""
    lexicon = dict(words)
    rng = Random("the country")
    names: list[str] = []
    while len(names) < num_places:
        name = rng.choice(lexicon["prefix"]) + rng.choice(lexicon["suffix"])
        if name not in names and not any(name[:4] == other[:4] and name[-3:] == other[-3:] for other in names):
            names.append(name)
    rivers = sorted({rng.choice(lexicon["riverstem"]) + rng.choice(lexicon["riverend"]) for _ in range(24)})
    counties = [
        f"the {kind} of {rng.choice(lexicon['riverstem'])}{end}"
        for kind, end in (
            ("Vale", "den"),
            ("Isle", "sea"),
            ("Forest", "wood"),
            ("Hundred", "low"),
            ("Marches", "land"),
            ("Downs", "dale"),
        )
    ]
    places = []
    for index, name in enumerate(names):
        kind = ("village", "village", "small town", "market town", "harbour town")[index % 5]
        is_female = rng.random() < 0.5
        person = rng.choice(lexicon["female" if is_female else "male"]) + " " + rng.choice(lexicon["surname"])
        places.append(
            Place(
                name=name,
                kind=kind,
                county=counties[index % len(counties)],
                river=rng.choice(rivers),
                founded=rng.randrange(900, 1890),
                people=rng.randrange(120, 990) * (1 if kind == "village" else 7),
                product=rng.choice(lexicon["product"]),
                sight=rng.choice(lexicon["sight"]),
                market_day=rng.choice(lexicon["weekday"]),
                neighbour=names[(index + rng.randrange(1, 5)) % num_places],
                miles=rng.randrange(2, 30),
                direction=rng.choice(("north", "south", "east", "west")),
                person=person,
                trade=rng.choice(lexicon["calling"]),
                is_female=is_female,
                animal=rng.choice(lexicon["emblem"]),
                dish=rng.choice(lexicon["food"]),
            )
        )
    chief = {county: next(p.name for p in places[i:] if p.county == county) for i, county in enumerate(counties)}
    return World(tuple(places), chief)


def country(lexicon: Lexicon) -> World:
    """The country of a lexicon."""
    keys = (
        *("prefix", "suffix", "riverstem", "riverend", "female", "male", "surname", "weekday", "food"),
        *("product", "sight", "calling", "emblem"),
    )
    return invent(tuple((key, tuple(lexicon[key])) for key in keys))
