"""Documents about invented people and buildings, and questions about them.

They replace those of SQuAD and HotpotQA, which RULER uses: a model needs them just as much, and cannot know them.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lserve_jax.evaluation.qa import Case
from lserve_jax.text import prose

type Draw = Callable[[random.Random], str]

_GIVEN_NAMES = (
    "Adela Anselm Benno Cecily Cosmo Dagmar Edmund Elsbeth Fabian Flora Gideon Gwendolyn Hedwig Hugo Ida Ignatius "
    "Jerome Josephine Kasimir Lavinia Linus Ludwig Marius Minna Nestor Octavia Otto Petra Prosper Rosamund Rufus "
    "Selma Stanislav Tabitha Theodor Ulrike Valentin Viola Wilhelm Winifred"
)
_SURNAMES = (
    "Alder Bram Cald Dorn Ever Fenn Gard Hazel Ivers Kell Lang Mar Nor Oster Pell Quill Raven Stern Thorn Varn Wick",
    "beck bury croft dale feld gate holm kamp ley man mere quist ridge row sand shaw stein strand thwaite worth",
)
_TOWNS = (
    "Ash Brook Clay Dun Elm Fox Glen Hart Iron Jade Kirk Lark Mill North Oak Pine Red Salt Stone Swan West Yew",
    "barrow bourne bridge cliff combe fell ford haven hurst kirk lea mouth port side stead stow ton ville wade wick",
)
_BUILDINGS = "Library Theatre Observatory Museum Hospital Bridge Station Academy Lighthouse Aquarium Brewery Abbey"


@dataclass(frozen=True, kw_only=True)
class _Fact:
    """A fact of documents: wordings of it, its question, and its possible values."""

    told: tuple[str, ...]
    asked: str
    draw: Draw


def _one_of(values: Sequence[str]) -> Draw:
    return lambda rng: rng.choice(values)


def _compound(*parts: str) -> Draw:
    return lambda rng: "".join(rng.choice(part.split(" ")) for part in parts)


def _title(rng: random.Random) -> str:
    return f"The {rng.choice(prose.ADJECTIVES).capitalize()} {rng.choice(prose.NOUNS).capitalize()}"


def _person(rng: random.Random) -> str:
    return f"{_compound(_GIVEN_NAMES)(rng)} {_compound(*_SURNAMES)(rng)}"


def _building(rng: random.Random) -> str:
    return f"{_compound(*_TOWNS)(rng)} {_compound(_BUILDINGS)(rng)}"


_OF_PEOPLE = {
    "birthplace": _Fact(
        told=(
            "{who} was born in {value}.",
            "The birthplace of {who} is {value}.",
            "{who} was born and raised in {value}.",
        ),
        asked="In which town was {who} born?",
        draw=_compound(*_TOWNS),
    ),
    "last_home": _Fact(
        told=("{who} later settled in {value}.", "In old age {who} moved to {value}."),
        asked="To which town did {who} move in the end?",
        draw=_compound(*_TOWNS),
    ),
    "instrument": _Fact(
        told=("{who} played the {value}.", "In the evenings {who} used to play the {value}."),
        asked="Which instrument did {who} play?",
        draw=_one_of(
            (
                "bassoon",
                "harpsichord",
                "mandolin",
                "trombone",
                "viola",
                "zither",
                "clarinet",
                "banjo",
                "accordion",
                "xylophone",
                "lute",
                "tuba",
            )
        ),
    ),
    "book": _Fact(
        told=("{who} wrote the novel {value}.", "The best known book by {who} is {value}."),
        asked="What is the title of the book by {who}?",
        draw=_title,
    ),
    "collection": _Fact(
        told=("{who} collected {value}.", "Friends remember that {who} had a large collection of {value}."),
        asked="What did {who} collect?",
        draw=_one_of(
            (
                "butterflies",
                "postage stamps",
                "sea shells",
                "teapots",
                "door keys",
                "walking sticks",
                "fossils",
                "playing cards",
                "bird feathers",
                "glass marbles",
                "old maps",
                "thimbles",
                "music boxes",
                "snow globes",
                "pocket knives",
                "ship models",
                "chess sets",
                "beetles",
            )
        ),
    ),
    "studies": _Fact(
        told=("{who} studied {value}.", "As a student {who} chose {value}."),
        asked="What did {who} study?",
        draw=_one_of(
            (
                "geology",
                "law",
                "medicine",
                "philosophy",
                "botany",
                "astronomy",
                "theology",
                "mathematics",
                "archaeology",
                "chemistry",
                "Greek",
                "zoology",
                "economics",
                "history",
                "metallurgy",
                "linguistics",
                "geography",
                "anatomy",
            )
        ),
    ),
}
_OF_BUILDINGS = {
    "architect": _Fact(
        told=("The {who} was designed by {value}.", "The plans of the {who} were drawn by {value}."),
        asked="the architect of the {who}",
        draw=_person,
    ),
    "founder": _Fact(
        told=("The {who} was founded by {value}.", "The founder of the {who} was {value}."),
        asked="the founder of the {who}",
        draw=_person,
    ),
}
_BUILDING_DETAILS = (
    "Its brick walls are {adjective}, and on the roof one sees the {noun}.",
    "Visitors praise its {adjective} entrance and the {noun} above the door.",
    "The {noun} in the courtyard is older than the rest.",
    "It was closed for years after a fire, and then restored.",
    "The main hall is known for its {adjective} painting of the {noun}.",
)
_DETAIL_WORDS = {"adjective": prose.ADJECTIVES, "noun": prose.NOUNS}


class _World:
    """People and buildings, in documents without the words reserved for the answer.

    Args:
      has_titles: whether a document begins with a line that names its subject.
    """

    def __init__(self, rng: random.Random, *, has_titles: bool) -> None:
        self._rng = rng
        self._has_titles = has_titles
        self._kept: list[str] = []

    def keep(self, draw: Draw) -> str:
        """Returns a value that no later one contains."""
        self._kept.append(self._draw(draw))
        return self._kept[-1]

    def person(self, name: str | None = None, **given: str) -> str:
        """Returns a document about somebody; ``given`` values stand for facts by their names."""
        return self._document(name or self._draw(_person), _OF_PEOPLE, given, ())

    def building(self, name: str | None = None, **given: str) -> str:
        """Returns a document about a building."""
        detail = self._rng.choice(_BUILDING_DETAILS)
        words = {kind: self._draw(_one_of(words)) for kind, words in _DETAIL_WORDS.items()}
        end = detail.format(**words)
        return self._document(name or self._draw(_building), _OF_BUILDINGS, given, (end,))

    def _document(self, who: str, facts: Mapping[str, _Fact], given: Mapping[str, str], end: Sequence[str]) -> str:
        told = []
        for name in self._rng.sample(list(facts), len(facts)):
            value = given.get(name) or self._draw(facts[name].draw)
            told.append(self._rng.choice(facts[name].told).format(who=who, value=value))
        title = f"{who}\n" if self._has_titles else ""
        return title + " ".join((*told, *end))

    def _draw(self, draw: Draw) -> str:
        value = draw(self._rng)
        while any(kept.lower() in value.lower() for kept in self._kept):
            value = draw(self._rng)
        return value


def one_hop(rng: random.Random, index: int) -> Case:
    """Returns a question whose answer is in one document; other documents state the same of other people."""
    del index
    world = _World(rng, has_titles=False)
    fact = rng.choice(list(_OF_PEOPLE))
    answer = world.keep(_OF_PEOPLE[fact].draw)
    who = world.keep(_person)
    return Case(
        question=_OF_PEOPLE[fact].asked.format(who=who),
        answers=(answer,),
        documents=(world.person(who, **{fact: answer}),),
        distractors=(world.person() for _ in itertools.count()),
    )


def two_hops(rng: random.Random, index: int) -> Case:
    """Returns a question about a building's founder or architect; another document says who that is."""
    del index
    world = _World(rng, has_titles=True)
    role, fact = rng.choice(list(_OF_BUILDINGS)), rng.choice(list(_OF_PEOPLE))
    answer = world.keep(_OF_PEOPLE[fact].draw)
    who, building = world.keep(_person), world.keep(_building)
    return Case(
        question=_OF_PEOPLE[fact].asked.format(who=_OF_BUILDINGS[role].asked.format(who=building)),
        answers=(answer,),
        documents=(world.building(building, **{role: who}), world.person(who, **{fact: answer})),
        distractors=(world.person() if number % 2 else world.building() for number in itertools.count()),
    )
