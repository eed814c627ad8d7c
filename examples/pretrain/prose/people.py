"""Characters of a document: names that differ, pronouns that fit."""

from __future__ import annotations

from prose.grammar import Scene

PRONOUNS = {
    "female": {"he": "she", "him": "her", "his": "her", "self": "herself"},
    "male": {"he": "he", "him": "him", "his": "his", "self": "himself"},
}


def add_person(scene: Scene, slot: str, *, with_surname: bool = False) -> str:
    """Puts a new character into ``slot``: ``p``, ``p.he``, ``p.him``, ``p.his``, ``p.self``, ``p.man``, ``p.rel``."""
    sex = "female" if scene.random() < 0.5 else "male"
    name = scene.choose(sex)
    if with_surname:
        name += " " + scene.choose("surname")
    scene[slot] = name
    scene[f"{slot}.man"] = "woman" if sex == "female" else "man"
    scene[f"{slot}.rel"] = scene.choose("relation.f" if sex == "female" else "relation.m")
    scene[f"{slot}.self.you"] = "yourself"
    for case, pronoun in PRONOUNS[sex].items():
        scene[f"{slot}.{case}"] = pronoun
    return name


def set_scene(scene: Scene, places: tuple[str, ...]) -> Scene:
    """Fills what every genre may use: two or three people, two places, a domain, a date."""
    scene.domain = scene.choose("domain")
    for slot in ("p", "q", "q2"):
        add_person(scene, slot)
    if scene.random() < 0.12:
        for slot in ("p", "q"):
            scene[slot] = ("Mrs " if scene[f"{slot}.he"] == "she" else "Mr ") + scene.choose("surname")
    first = int(scene.random() * len(places))
    scene["village"] = places[first]
    scene["village2"] = places[(first + 1 + int(scene.random() * (len(places) - 1))) % len(places)]
    scene["dayno"] = str(1 + int(scene.random() * 28))
    return scene
