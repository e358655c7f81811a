"""Pictures and clips of coloured shapes, and the questions with their right answers that the demo model is taught.

A picture has one to four shapes, at most one in each quarter. A clip has four frames of a shape changing quarters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 205),
    "yellow": (240, 205, 40),
    "purple": (145, 50, 170),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}
NUMBERS = ("none", "one", "two", "three", "four")
# pixels
SIDE = 224
# what the processor brings a picture or frame down to: four merged patches, one for each place
AREA = 56 * 56
# where a moving shape is in each frame, in pixels from the middle: the model sees frames in pairs
_ALONG = (-60, -52, 52, 60)

GREETINGS = ("Hello", "Hello!", "Hi", "Hi!", "hello", "hi", "Hello there.", "Who are you?", "What can you do?")
WELCOME = "Hello! Show me a picture of coloured shapes and ask me about it."
ASK_COLOUR = ("What colour is the {shape}?", "Which colour is the {shape}?", "Tell me the colour of the {shape}.")
ASK_SHAPE = ("What shape is {colour}?", "Which shape is {colour}?", "What is the {colour} thing?")
ASK_COUNT = ("How many {things} are there?", "How many {things} do you see?", "Count the {things}.")
ASK_PLACE = ("Where is the {thing}?", "Where do you see the {thing}?", "Tell me where the {thing} is.")
ASK_ALL = ("Describe the picture.", "What is this?", "What do you see?", "What is in the picture?")
ASK_MOVE = ("Which way does it move?", "Where does it move?", "Which way does the {thing} move?")
ASK_CLIP = ("Describe the video.", "What happens?", "What is in the video?")


@dataclass(frozen=True)
class Thing:
    """One shape; `where` is one of PLACES in a picture, one of DIRECTIONS in a clip."""

    colour: str
    shape: str
    where: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Turn:
    """A question, its one right answer, and what it is about, by which evaluation counts."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """What a picture or clip shows; `seed` settles sizes, exact places, shades and background."""

    things: tuple[Thing, ...]
    seed: int

    @property
    def moves(self) -> bool:
        return self.things[0].where in DIRECTIONS


def kept_from_training(thing: Thing) -> bool:
    """Whether this combination of colour, shape and place (or direction) is only ever shown in evaluation.

    A fifth of all, spread so that training has every colour with every shape, and both at every place.
    """
    places = PLACES if thing.where in PLACES else tuple(DIRECTIONS)
    return (list(COLOURS).index(thing.colour) + 2 * SHAPES.index(thing.shape) + places.index(thing.where)) % 5 == 0


def sample(seed: int, held_out: bool, moves: bool = False) -> Scene:
    """A random scene of this seed: of nothing but combinations kept from training, or of none of them."""
    rng = np.random.default_rng([seed, held_out, moves])
    chosen = tuple(DIRECTIONS) if moves else PLACES
    count = 1 if moves else int(rng.integers(1, 1 + len(PLACES)))
    places = [chosen[i] for i in sorted(rng.choice(len(chosen), count, replace=False))]
    things = []
    for place in places:
        every = [Thing(colour, shape, place) for colour in COLOURS for shape in SHAPES]
        fit = [thing for thing in every if kept_from_training(thing) == held_out]
        things.append(fit[rng.integers(len(fit))])
    return Scene(tuple(things), seed)


def draw(scene: Scene) -> "list[Image.Image]":
    """The picture, RGB of SIDE x SIDE pixels, or a clip's frames."""
    from PIL import Image

    rng = np.random.default_rng([scene.seed, 1])
    across = np.linspace(-28, 28, SIDE)
    # redder to the right and bluer to the bottom: a vision tower knows relative positions only, so this tells it places
    shade = np.zeros((SIDE, SIDE, 3)) + rng.integers(196, 224) + rng.integers(-5, 6, 3)
    shade[..., 0] += across
    shade[..., 2] += across[:, None]
    background = (shade + rng.integers(-3, 4, shade.shape, dtype=np.int8)).astype(np.uint8)
    frames = [Image.fromarray(background) for _ in range(len(_ALONG) if scene.moves else 1)]
    # the row or column that a shape moves along
    side = SIDE / 4 * (1 - 2 * rng.integers(2))
    for thing in scene.things:
        radius = int(rng.integers(26, 39))
        jitter = rng.integers(-10, 11, 2)
        colour = np.clip(COLOURS[thing.colour] + rng.integers(-20, 21, 3), 0, 255)
        for i, frame in enumerate(frames):
            x, y = _centre(thing.where, i, side) + jitter
            _draw_shape(
                frame, thing.shape, float(x), float(y), radius, (int(colour[0]), int(colour[1]), int(colour[2]))
            )
    return frames


def _centre(where: str, frame: int, side: float) -> Any:
    """x and y, in pixels, before they are jittered."""
    if where in PLACES:
        row, column = divmod(PLACES.index(where), 2)
        return (np.array([column, row]) + 0.5) * SIDE / 2
    x, y = DIRECTIONS[where]
    return SIDE / 2 + _ALONG[frame] * np.array([x, y]) + side * np.array([abs(y), abs(x)])


def _draw_shape(picture: "Image.Image", shape: str, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=colour)
    else:
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=colour)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=colour)


def turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """One question of every kind that this scene has one right answer to, worded at random, in a random order."""
    return [kind[rng.integers(len(kind))] for kind in _shuffled(list(_by_kind(scene, rng)), rng) if kind]


def _by_kind(scene: Scene, rng: np.random.Generator) -> Iterator[list[Turn]]:
    def one(wordings: tuple[str, ...]) -> str:
        return wordings[rng.integers(len(wordings))]

    things = scene.things
    if scene.moves:
        (thing,) = things
        yield [Turn("movement", one(ASK_MOVE).format(thing=thing), f"It moves {thing.where}.")]
        yield [Turn("movement", one(ASK_CLIP), f"A {thing} moves {thing.where}.")]
    colours, shapes = [t.colour for t in things], [t.shape for t in things]
    yield [
        Turn("colour", one(ASK_COLOUR).format(shape=t.shape), f"It is {t.colour}.")
        for t in things
        if shapes.count(t.shape) == 1
    ]
    yield [
        Turn("shape", one(ASK_SHAPE).format(colour=t.colour), f"It is a {t.shape}.")
        for t in things
        if colours.count(t.colour) == 1
    ]
    if not scene.moves:
        counted = "shapes" if rng.integers(2) else _plural(SHAPES[rng.integers(len(SHAPES))])
        number = len(things) if counted == "shapes" else sum(_plural(t.shape) == counted for t in things)
        yield [
            Turn(
                "count",
                one(ASK_COUNT).format(things=counted),
                f"There {'is' if number == 1 else 'are'} {NUMBERS[number]}.",
            )
        ]
        yield [
            Turn("position", one(ASK_PLACE).format(thing=t), f"It is at the {t.where}.")
            for t in things
            if [str(other) for other in things].count(str(t)) == 1
        ]
        yield [Turn("description", one(ASK_ALL), description(scene))]


def description(scene: Scene) -> str:
    """All of a picture in one sentence, from the top left to the bottom right."""
    return ", ".join(f"a {t} at the {t.where}" for t in scene.things).capitalize() + "."


def drill(scene: Scene, rng: np.random.Generator) -> Turn:
    """An exercise that only training asks: every thing with its colour, shape and place, or how many of each shape.

    All in any order: what comes first is chance, and what follows has to be looked up in the picture by it. Questions
    need the same, but have one such word in a dozen.
    """
    if rng.integers(3) or scene.moves:
        question = "List all in any order."
        said = [" ".join(_shuffled([thing.colour, thing.shape, thing.where], rng)) for thing in scene.things]
    else:
        question = "Count all in any order."
        said = [f"{_plural(shape)} {NUMBERS[sum(t.shape == shape for t in scene.things)]}" for shape in SHAPES]
    return Turn("drill", question, f"There are {', '.join(_shuffled(said, rng))}.")


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _shuffled(items: list[Any], rng: np.random.Generator) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items))]


def conversation(scene: Scene, asked: list[Turn], answer_last: bool = False) -> list[dict[str, Any]]:
    """Messages that show the scene and ask; every answer but the last one is given, or that one too."""
    pictures = draw(scene)
    shown: dict[str, Any] = {"type": "image", "image": pictures[0]}
    if scene.moves:
        # frames have bounds of their own, which preprocessor_config.json does not set
        shown = {"type": "video", "video": pictures, "min_pixels": AREA, "max_pixels": AREA}
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(asked):
        text = {"type": "text", "text": turn.question}
        messages.append({"role": "user", "content": [shown, text] if i == 0 else [text]})
        if answer_last or i < len(asked) - 1:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def greeting(rng: np.random.Generator) -> list[dict[str, Any]]:
    """A conversation without a picture, answered."""
    said = GREETINGS[rng.integers(len(GREETINGS))]
    return [{"role": "user", "content": said}, {"role": "assistant", "content": WELCOME}]


def sentences() -> Iterator[str]:
    """Text that the vocabulary is made from: what is asked and answered."""
    yield WELCOME
    yield from GREETINGS
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        for turn in turns(sample(seed, held_out=False, moves=seed % 8 == 0), rng):
            yield turn.question
            yield turn.answer
    # the chat template's own words
    yield from ["You are a helpful assistant.", "system\nuser\nassistant\n"] * 50
