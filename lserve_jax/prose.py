"""Endless varied English prose from a seed, and lists of common words: what long prompts are made of.

The prose is expanded from a grammar (data/prose.txt). A paragraph keeps a topic, a person, a place and a few things, so
that a language model finds it natural; the shape of a sentence and the words in it hardly repeat. It holds no digits
and no number words, which would collide with what tasks hide in it.
"""

import itertools
import random
import re
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources

type _Grammar = Mapping[str, tuple[str, ...]]

_SENTENCES_A_PARAGRAPH = (5, 11)
_SHAPES_APART = 24
"""Of so many neighbouring sentences no two have the same shape."""
_DRAWS = 8
"""How often another wording is drawn where the one before stands in the paragraph already."""
_PEOPLE = {
    "woman": {"HE": "she", "HIM": "her", "HIS": "her"},
    "man": {"HE": "he", "HIM": "him", "HIS": "his"},
}
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")
_FIRST_LETTER = re.compile(r"[a-zA-Z]")


def sentences(rng: random.Random) -> Iterator[str]:
    """Yields grammatical English sentences for ever; neighbouring ones belong together."""
    return itertools.chain.from_iterable(paragraphs(rng))


def paragraphs(rng: random.Random) -> Iterator[list[str]]:
    """Yields the same sentences for ever, a list of those about one person and topic at a time."""
    grammar = _read_grammar()
    recent_shapes: deque[str] = deque(maxlen=_SHAPES_APART)
    while True:
        paragraph = _Paragraph(grammar, rng)
        shapes = [_other_than(recent_shapes, grammar["opening"], rng)]
        for _ in range(rng.randint(*_SENTENCES_A_PARAGRAPH) - 1):
            shapes.append(_other_than(recent_shapes, grammar["sentence"], rng))
        yield [_finish(paragraph.expand(shape)) for shape in shapes]


class _Paragraph:
    """What sentences of one paragraph share: `kept` by slots in capitals, and which wordings have been used."""

    def __init__(self, grammar: _Grammar, rng: random.Random) -> None:
        self._grammar = grammar
        self._rng = rng
        self._topic = rng.choice(grammar["topic"])
        self._used: set[str] = set()
        kind = rng.choice(list(_PEOPLE))
        self._kept = {**_PEOPLE[kind], "PERSON": self._draw(kind)}

    def expand(self, template: str) -> str:
        """Returns a template with all its slots filled."""
        return _SLOT.sub(lambda slot: self._fill(slot[1]), template)

    def _fill(self, slot: str) -> str:
        if not slot.isupper():
            return self._draw(slot)
        if slot not in self._kept:
            self._kept[slot] = self._draw(slot.lower())
        return self._kept[slot]

    def _draw(self, symbol: str) -> str:
        """Returns an expansion of a symbol, if possible one that the paragraph has not had."""
        alternatives = self._grammar.get(f"{self._topic}.{symbol}") or self._grammar[symbol]
        text = ""
        for _ in range(_DRAWS):
            text = self.expand(self._rng.choice(alternatives))
            if text not in self._used:
                break
        self._used.add(text)
        return text


def _other_than(recent: deque[str], shapes: tuple[str, ...], rng: random.Random) -> str:
    """Returns a shape that is not among the recent ones, and remembers it."""
    fresh = [shape for shape in shapes if shape not in recent]
    shape = rng.choice(fresh or shapes)
    recent.append(shape)
    return shape


def _finish(text: str) -> str:
    text = _ARTICLE_BEFORE_VOWEL.sub(r"\1n ", text)
    return _FIRST_LETTER.sub(lambda letter: letter[0].upper(), text, count=1)


@cache
def _read_grammar() -> _Grammar:
    text = (resources.files("lserve_jax") / "data" / "prose.txt").read_text(encoding="utf-8")
    grammar: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            symbol, alternatives = line.split(": ", maxsplit=1)
            grammar[symbol] = (*grammar.get(symbol, ()), *alternatives.split(" | "))
    return grammar


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """
    anchor apple apron arch armchair arrow attic autumn badge bag balcony ball banana bank banner barn barrel basin
    basket bath battery beach beard beaver bed bell belt bench bicycle bird biscuit blanket blossom board boat bone
    bonnet book boot bottle bowl box bracelet branch brass bread breakfast breeze brick bridge broom brush bucket
    building bulb bus butter button cabin cabinet cable cactus cake calendar camel camera candle canoe canvas cape
    captain caravan card carpet carriage castle cat cave ceiling cellar chain chair chalk chapel cheese cherry chest
    chimney choir church cinema circle circus city clay cliff cloak clock cloud coast coat coffee coin collar comb
    compass concert copper coral corner cottage cotton couch cousin cow cradle crane crayon cream creek cricket crown
    crystal cup cupboard curtain cushion daisy dance dawn deer desert desk diamond diary dish doctor doll dolphin donkey
    door dragon drawer dream dress drum duck dust eagle earth egg elbow elephant engine envelope evening eye fabric
    factory fairy falcon farm farmer feather fence fern ferry fiddle field finger fire fish flag flame flask flower
    flute fog forest fork fountain fox frame friend frog fruit garden garlic gate ginger giraffe glacier glass globe
    glove goat gold goose grain grape grass guitar hammer hand harbour harp hat hawk hay heart hedge helmet herb hill
    hinge holiday honey hook horn horse hotel house ice ink insect iron island ivory jacket jar jewel journey judge jug
    juice jungle kettle kitchen kite kitten knee knife ladder lake lamb lamp lantern lawn leaf leather lemon letter
    library lighthouse lily lion lizard lobster lock log loom luggage machine magnet mango map maple marble market mask
    meadow medal melody melon metal milk mill mirror mist mitten monkey moon morning moss mountain mouse mouth museum
    mushroom music napkin neck necklace needle nest net newspaper night nut oak oar ocean olive onion orange orchard
    orchestra otter oven owl ox oyster paint painter palace palm panther paper parade parcel park parrot path pea peach
    pear pearl pebble pelican pen pencil penguin pepper piano picnic picture pie pigeon pillow pilot pine pipe plane
    planet plant plate platform plum pocket poem poet pond pony porch potato prince pumpkin puppet puzzle queen quilt
    rabbit radio railway rain rainbow raven ribbon rice ring river road robe robin rock roof room rope rose rug sail
    sailor salad salt sand sandal saucer saw scarf school scissors sculptor sea seal shadow sheep shelf shell ship shirt
    shoe shore silk silver sink sister skirt sky sleeve snail snow soap sock soup spade sparrow spice spider spoon
    spring squirrel stable stage stair stamp star station statue steam stone stool storm stove straw stream street
    string sugar suit summer sun swan sweater sword table tailor tea teacher temple tent theatre thimble thread throne
    thumb thunder tiger tile toast tomato tooth towel tower town toy train tray tree trumpet trunk tulip tunnel turkey
    turtle umbrella uncle valley van vase velvet violin voice wagon wall walnut watch water wave wax weather well whale
    wheat wheel whistle willow wind window wing winter wolf wood wool worm wreath writer yard yarn
    """
)

ADJECTIVES = _words(
    """
    able absent active actual afraid agile alert alive ancient angry anxious aquatic arid awake aware bald bare basic
    beautiful bent bitter bland blank blind blue blunt bold bouncy brave brief bright brisk broad broken brown bumpy
    busy calm careful careless certain cheap cheerful chilly civil clean clear clever cloudy clumsy coarse cold
    colourful common complete cool correct costly crisp crooked crowded cruel curious curly cute damp dark dear decent
    deep delicate dense dim dirty distant dizzy dry dull dusty eager early earnest easy elastic elegant empty endless
    enormous equal even exact exotic extra faint fair faithful familiar famous fancy fast fat fearless fertile festive
    fierce fine firm fit flat fluffy foggy fond foolish formal fragile free fresh friendly frosty frozen full funny
    fuzzy gentle giant glad gloomy glossy golden good graceful grand grateful grave greasy great greedy green grim happy
    hard harsh hasty healthy heavy helpful hidden high hollow honest hot huge humble hungry icy ideal idle important
    innocent jolly joyful juicy keen kind large late lazy lean light likely little lively local lonely long loose loud
    lovely loyal lucky mad massive mature mellow merry mighty mild modern modest moist muddy naive narrow natural neat
    nervous new nice noble noisy normal odd old open ordinary outer pale patient perfect plain pleasant polite poor
    popular precious pretty private proper proud public pure quick quiet rapid rare raw ready real red regular remote
    rich rigid ripe robust rocky rough round royal rude rural rusty sad safe salty scarce secure selfish sensible
    serious severe shallow sharp shiny short shy silent silky silly simple sincere sleepy slim slippery slow small
    smooth snowy sober soft solemn solid sore sour spare spicy square stale steady steep sticky stiff strange strict
    strong stubborn sturdy sudden sunny super sweet swift tall tame tangy tart tender thick thin thirsty tidy tight tiny
    tired tough tranquil tricky true ugly unique unusual upper urban useful usual vague vain vast violet vivid warm wary
    wasteful weak wealthy weary wet white whole wicked wide wild wise witty wonderful wooden worried worthy yellow young
    """
)

VERBS = _words(
    """
    accept add admire admit advise agree allow amuse announce answer appear applaud argue arrange arrive ask attach
    attend avoid bake balance bathe become beg begin behave believe bend bless blink boil borrow bounce bow breathe
    bring build burn buy call care carry catch cause change charge chase cheat check cheer chew choose clap climb close
    collect come compare complain confess consider contain continue cook copy correct cough cover crash crawl cross cry
    cure dare decide decorate delay deliver depend describe deserve develop dig disagree discover dive divide doubt drag
    draw drink drive drop earn eat employ encourage enjoy enter escape examine excite excuse exist expand expect explain
    explore fade fail fall fasten feed feel fetch fight fill find fix float flow fly fold follow forget forgive gather
    gaze give glow grab grease greet grin grow guard guess guide hang happen harm hate haunt heal hear help hide hope
    hover hug hum hunt hurry identify imagine improve include increase inform inject intend invent invite irritate
    join juggle jump keep kick kneel knit knock know laugh launch lead lean learn leave lend let lick lie lift like
    listen live look lose love manage marry matter measure melt mend mention milk mix mourn move multiply need nod
    notice obey object observe obtain occur offer open order owe own pack pause pay peel perform permit pick plan play
    plead please pluck polish pour practise praise pray preach prefer prepare present preserve pretend prevent produce
    promise protect provide pull pump push put question race raise reach read realise receive recognise record reduce
    refuse regret relax release rely remain remember remind remove repair repeat reply rescue rest return ride rinse
    rise roll rub run sail save say scold scrape scratch see seem sell send settle sew shake share shave shelter shiver
    shout show shut sigh sing sit sleep slip smell smile sneeze sniff snore soak sort speak spell spend spill spin spot
    spread squeeze stand stare start stay steer step stir stop stretch strike stroke succeed suffer suggest support
    suppose surprise surround swim swing take talk taste teach tease tell tempt terrify thank think throw tickle tie
    touch trace trade travel treat tremble trot trust try tug turn twist understand undress unite unlock unpack use
    vanish visit wait wake walk wander want warm warn wash waste weave weep weigh welcome whirl whisper win wink wipe
    wish wobble wonder work worry wrap wrestle write yawn yell
    """
)

WORDS = tuple(dict.fromkeys((*NOUNS, *ADJECTIVES, *VERBS)))
"""All of them, each once."""
