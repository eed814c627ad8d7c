"""An invented country with facts that stay the same in every document.

A model this small learns some of them by heart and, more to the point, learns that facts are answered as they were told.
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


PRODUCTS = (
    "cheese, cider, wool, glass, clocks, baskets, rope, honey, pottery, paper, boots, candles, salt, apples, lace, bells, "
    "soap, knives, violins, blankets, mustard, tiles, barrels, umbrellas, toys, ink, smoked fish, oatcakes, carts, buttons"
).split(", ")
SIGHTS = (
    "a round tower, a stone bridge with seven arches, a clock with only one hand, a very old yew tree, a covered market, "
    "a wooden church, a white lighthouse, a windmill with six sails, a walled garden, a library with a glass roof, "
    "a fountain in the shape of a fish, a crooked spire, a hall with a painted ceiling, a ferry that is pulled by a rope, "
    "a museum of bells, a wall that goes round the whole town, a bronze statue of a goose, a maze of hedges, "
    "a cave full of bats, a bridge made of iron"
).split(", ")


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
    counties = [f"the {kind} of {rng.choice(lexicon['riverstem'])}{end}" for kind, end in (
        ("Vale", "den"), ("Isle", "sea"), ("Forest", "wood"), ("Hundred", "low"), ("Marches", "land"), ("Downs", "dale"))]
    places = []
    for index, name in enumerate(names):
        kind = ("village", "village", "small town", "market town", "harbour town")[index % 5]
        is_female = rng.random() < 0.5
        person = rng.choice(lexicon["female" if is_female else "male"]) + " " + rng.choice(lexicon["surname"])
        places.append(Place(
            name=name, kind=kind, county=counties[index % len(counties)], river=rng.choice(rivers),
            founded=rng.randrange(900, 1890), people=rng.randrange(120, 990) * (1 if kind == "village" else 7),
            product=rng.choice(PRODUCTS), sight=rng.choice(SIGHTS), market_day=rng.choice(lexicon["weekday"]),
            neighbour=names[(index + rng.randrange(1, 5)) % num_places], miles=rng.randrange(2, 30),
            direction=rng.choice(("north", "south", "east", "west")), person=person,
            trade=rng.choice(("painter", "poet", "clockmaker", "explorer", "composer", "boatbuilder", "doctor", "engineer",
                              "gardener", "teacher", "map maker", "singer", "bellmaker", "astronomer", "weaver")),
            is_female=is_female, animal=rng.choice(("goose", "heron", "hare", "otter", "ram", "fox", "bear", "swan", "owl", "trout")),
            dish=rng.choice(lexicon["food"]),
        ))  # fmt: skip
    chief = {county: next(p.name for p in places[i:] if p.county == county) for i, county in enumerate(counties)}
    return World(tuple(places), chief)


def country(lexicon: Lexicon) -> World:
    """The country of a lexicon."""
    keys = ("prefix", "suffix", "riverstem", "riverend", "female", "male", "surname", "weekday", "food")
    return invent(tuple((key, tuple(lexicon[key])) for key in keys))
