"""English forms: verbs, plurals, articles, numbers in words, lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


_IRREGULAR_VERBS = """
be was been, beat beat beaten, become became become, begin began begun, bend bent bent, bind bound bound, bite bit
bitten, blow blew blown, break broke broken, bring brought brought, build built built, burn burnt burnt, buy bought
bought, catch caught caught, choose chose chosen, come came come, cut cut cut, dig dug dug, do did done, draw drew
drawn, drink drank drunk, drive drove driven, eat ate eaten, fall fell fallen, feed fed fed, feel felt felt, fight
fought fought, find found found, fly flew flown, forget forgot forgotten, freeze froze frozen, get got got, give
gave given, go went gone, grind ground ground, grow grew grown, hang hung hung, have had had, hear heard heard, hide
hid hidden, hit hit hit, hold held held, keep kept kept, know knew known, lay laid laid, lead led led, learn learnt
learnt, leave left left, lend lent lent, let let let, lie lay lain, light lit lit, lose lost lost, make made made,
mean meant meant, meet met met, mow mowed mown, pay paid paid, put put put, read read read, ride rode ridden, ring
rang rung, rise rose risen, run ran run, say said said, see saw seen, sell sold sold, send sent sent, set set set,
sew sewed sewn, shake shook shaken, shear sheared shorn, shine shone shone, show showed shown, shut shut shut, sing
sang sung, sink sank sunk, sit sat sat, sleep slept slept, slide slid slid, sow sowed sown, speak spoke spoken,
spell spelt spelt, spend spent spent, spin spun spun, spread spread spread, stand stood stood, steal stole stolen,
stick stuck stuck, string strung strung, sweep swept swept, swim swam swum, swing swung swung, take took taken,
teach taught taught, tear tore torn, tell told told, think thought thought, throw threw thrown, tread trod trodden,
understand understood understood, wake woke woken, wear wore worn, weave wove woven, wind wound wound, win won won,
write wrote written
"""
IRREGULAR_VERBS = {
    words[0]: (words[1], words[2]) for words in (item.split() for item in _IRREGULAR_VERBS.split(",")) if words
}
_DOUBLING = _words(
    """
    stop plan chop stir pat hug rub trim knit drop clap hop wrap scrub mop tap grab slip sip dig pin dip skip
    beg nod grin chat step trot jog run sit put cut get set swim win begin let shut spin hit whip peg plug strap
    scrap drag snap tug strum hum skim fit bat net pot sag shop ship sled thin pad blot plot spot tot travel
    label shovel swap hem forget jot cram zip wag tip slam scan snip rot
    """
)
_PLURALS = _pairs(
    """
    loaf:loaves leaf:leaves knife:knives shelf:shelves wolf:wolves calf:calves half:halves scarf:scarves
    thief:thieves wife:wives life:lives child:children man:men woman:women foot:feet tooth:teeth goose:geese
    mouse:mice ox:oxen sheep:sheep deer:deer fish:fish trout:trout salmon:salmon person:people scissors:scissors
    trousers:trousers potato:potatoes tomato:tomatoes hero:heroes echo:echoes penny:pence fisherman:fishermen
    postman:postmen craftsman:craftsmen herring:herring mackerel:mackerel hoof:hooves elf:elves sheaf:sheaves
    series:series boatman:boatmen milkman:milkmen policeman:policemen
    """
)
_AN = re.compile(r"\b([Aa]) (?=([aeiouAEIOU][\w'-]*|ho(?:ur|nest)\w*|8\d*|11|18)\b)")
_SOUNDS_LIKE_CONSONANT = re.compile(r"(?:one|once|eu|uni(?!n)|use|usual|useful|ukulele|ute)", re.IGNORECASE)


@cache
def inflect(verb: str, form: str) -> str:
    """A verb's ``base``, ``past``, ``s``, ``ing`` or ``pp``."""
    if form == "base":
        return verb
    if form == "s":
        if verb in ("have", "be"):
            return {"have": "has", "be": "is"}[verb]
        if re.search(r"(s|sh|ch|x|z|o)$", verb):
            return verb + "es"
        return verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else verb + "s"
    if form == "ing":
        if verb.endswith("ie"):
            return verb[:-2] + "ying"
        if re.search(r"[^eoy]e$", verb) and verb != "be":
            return verb[:-1] + "ing"
        return verb + (verb[-1] if verb in _DOUBLING else "") + "ing"
    if verb in IRREGULAR_VERBS:
        return IRREGULAR_VERBS[verb][form == "pp"]
    if verb.endswith("e"):
        return verb + "d"
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ied"
    return verb + (verb[-1] if verb in _DOUBLING else "") + "ed"


@cache
def plural(noun: str) -> str:
    """The plural of a noun or of ``noun of something``."""
    head, of, rest = noun.partition(" of ")
    before, space, last = head.rpartition(" ")
    if last in _PLURALS:
        last = _PLURALS[last]
    elif re.search(r"(s|sh|ch|x|z)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return before + space + last + of + rest


def with_articles(text: str) -> str:
    """Turns ``a`` into ``an`` before a vowel sound."""
    return _AN.sub(lambda m: m[0] if _SOUNDS_LIKE_CONSONANT.match(m[2]) else m[1] + "n ", text)


_ONES = _words(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen
    """
)
_TENS = _words(
    """
    - - twenty thirty forty fifty sixty seventy eighty ninety
    """
)
_ORDINALS = _pairs("one:first two:second three:third five:fifth eight:eighth nine:ninth twelve:twelfth")


@cache
def in_words(n: int) -> str:
    """A whole number from 0 to 999,999 in words."""
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + ("-" + _ONES[n % 10] if n % 10 else "")
    if n < 1000:
        return _ONES[n // 100] + " hundred" + (" and " + in_words(n % 100) if n % 100 else "")
    rest = n % 1000
    return in_words(n // 1000) + " thousand" + ((" and " if rest < 100 else " ") + in_words(rest) if rest else "")


@cache
def ordinal(n: int) -> str:
    """``first``, ``second``, ... in words, up to 99."""
    stem, dash, last = in_words(n).rpartition("-")
    last = _ORDINALS.get(last, last.removesuffix("y") + "ieth" if last.endswith("y") else last.removesuffix("t") + "th")
    return stem + dash + last


def listing(items: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" {last} " + items[-1]
