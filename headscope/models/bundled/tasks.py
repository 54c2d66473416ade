"""Training tasks of the bundled encoders, seq2seq and vision models, drawn anew.

Each task has an answer that only looking at certain positions gives, and says which those are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Bool, UInt8

from headscope.errors import InputError

WORDS = (
    *("apple", "bell", "boat", "book", "box", "bread", "bridge", "cake", "car", "chair", "clock"),
    *("cloud", "coat", "coin", "cup", "desk", "dog", "door", "drum", "ear", "egg", "fish", "flag"),
    *("flower", "fork", "gate", "glass", "goat", "hat", "horse", "house", "key", "kite", "lamp"),
    *("leaf", "lion", "map", "milk", "moon", "mouse", "nest", "nut", "oak", "pan", "pear", "pen"),
    *("pig", "pin", "plum", "pot", "rain", "ring", "road", "rope", "salt", "sea", "ship", "shoe"),
    *("star", "tree"),
)
ORDERS = ("copy", "reverse")
BRACKETS = ("()", "[]", "{}", "<>")
FILLERS = WORDS[:8]
SHAPES = ("square", "disc", "triangle", "cross")
PIXELS, PATCH = 32, 4
_SMALLEST, _LARGEST = 10, 18


@dataclass(frozen=True)
class Orders:
    """Words and the same words as a first word says: ``copy`` or ``reverse``.

    Attributes:
        sources: the order and the words, between spaces; a token each.
        targets: the words as they are asked for.
        links: per example, pairs ``(target, source)`` of token positions from 0.
    """

    sources: list[str]
    targets: list[str]
    links: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Brackets:
    """Balanced brackets of four kinds, with words between them.

    Attributes:
        texts: tokens between spaces.
        partners: per text and token, the position of a bracket's partner from 0, -1 at words.
    """

    texts: list[str]
    partners: list[list[int]]


@dataclass(frozen=True)
class Shapes:
    """Pictures of one filled shape each, on noise.

    Attributes:
        pictures: colours from 0 to 255.
        labels: names of the shapes.
        covered: pixels of the shape.
    """

    pictures: UInt8[np.ndarray, "batch height width 3"]
    labels: list[str]
    covered: Bool[np.ndarray, "batch height width"]


def orders(
    count: int = 64, seed: int = 0, *, words: tuple[int, int] = (3, 10), order: str | None = None
) -> Orders:
    """Draw what tiny-marian was trained on.

    Args:
        count: number of examples.
        seed: seed for the random draw.
        words: fewest and most words, which all differ.
        order: ``copy`` or ``reverse``; None: either, at random.

    Raises:
        InputError: if there is no such order, or nothing to draw.
    """
    _need(count)
    if order is not None and order not in ORDERS:
        raise InputError(f"order={order!r}: give one of {', '.join(ORDERS)}.")
    if not 1 <= words[0] <= words[1] <= len(WORDS):
        raise InputError(f"words={words}: give fewest and most words, 1 to {len(WORDS)}.")
    rng = Random(f"orders {seed}")  # noqa: S311  seeded, not secret
    made = Orders([], [], [])
    for _ in range(count):
        asked = order or rng.choice(ORDERS)
        drawn = rng.sample(WORDS, rng.randint(*words))
        n = len(drawn)
        made.sources.append(" ".join([asked, *drawn]))
        made.targets.append(" ".join(drawn[::-1] if asked == "reverse" else drawn))
        made.links.append([(i, 1 + (n - 1 - i if asked == "reverse" else i)) for i in range(n)])
    return made


def brackets(
    count: int = 64, seed: int = 0, *, pairs: tuple[int, int] = (3, 8), depth: int = 4
) -> Brackets:
    """Draw what tiny-bert was trained on.

    Args:
        count: number of texts.
        seed: seed for the random draw.
        pairs: fewest and most pairs of brackets in a text.
        depth: how deep brackets stand in brackets at most.

    Raises:
        InputError: if there is nothing to draw.
    """
    _need(count)
    if not 1 <= pairs[0] <= pairs[1] or depth < 1:
        raise InputError(f"pairs={pairs}, depth={depth}: give 1 or more of both.")
    rng = Random(f"brackets {seed}")  # noqa: S311  seeded, not secret
    made = Brackets([], [])
    for _ in range(count):
        text, partners = _balanced(rng, rng.randint(*pairs), depth)
        made.texts.append(" ".join(text))
        made.partners.append(partners)
    return made


def _balanced(rng: Random, pairs: int, depth: int) -> tuple[list[str], list[int]]:
    """Tokens of one text and the partner of each."""
    text: list[str] = []
    partners: list[int] = []
    opened: list[tuple[int, str]] = []
    left = pairs
    while left or opened:
        if rng.random() < 0.25:
            text.append(rng.choice(FILLERS))
            partners.append(-1)
        opens = left and len(opened) < depth and (not opened or rng.random() < 0.5)
        place = len(text)
        if opens:
            kind = rng.choice(BRACKETS)
            opened.append((place, kind[1]))
            text.append(kind[0])
            partners.append(-1)
            left -= 1
        else:
            at, closing = opened.pop()
            text.append(closing)
            partners.append(at)
            partners[at] = place
    return text, partners


def shapes(count: int = 64, seed: int = 0, *, noise: float = 0.1) -> Shapes:
    """Draw what tiny-vit was trained on.

    Colours are drawn for each picture, dark ones of the ground and bright ones of the shape; so is
    where the shape stands and how large it is.

    Args:
        count: number of pictures.
        seed: seed for the random draw.
        noise: standard deviation of the noise on each pixel, of a range of 1.

    Raises:
        InputError: if there is nothing to draw.
    """
    _need(count)
    rng = np.random.default_rng([7, seed])
    names = rng.integers(len(SHAPES), size=count)
    covered = np.stack([_shape(rng, SHAPES[name]) for name in names])
    ground = rng.uniform(0.0, 0.3, (count, 1, 1, 3))
    colour = rng.uniform(0.5, 1.0, (count, 1, 1, 3))
    drawn = np.where(covered[..., None], colour, ground)
    drawn = drawn + noise * rng.standard_normal(drawn.shape)
    pictures = np.clip(255 * drawn, 0, 255).astype(np.uint8)
    return Shapes(pictures, [SHAPES[name] for name in names], covered)


def _shape(rng: np.random.Generator, name: str) -> Bool[np.ndarray, "height width"]:
    """Pixels of one shape, somewhere."""
    size = int(rng.integers(_SMALLEST, _LARGEST + 1))
    top, left = (int(one) for one in rng.integers(0, PIXELS - size + 1, size=2))
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1  # from -1 to 1
    if name == "square":
        inside = np.ones_like(x, dtype=bool)
    elif name == "disc":
        inside = x**2 + y**2 <= 1
    elif name == "triangle":
        inside = np.abs(x) <= (y + 1) / 2
    else:
        inside = (np.abs(x) <= 1 / 3) | (np.abs(y) <= 1 / 3)
    covered = np.zeros((PIXELS, PIXELS), dtype=bool)
    covered[top : top + size, left : left + size] = inside
    return covered


def on_patches(
    covered: Bool[np.ndarray, "batch height width"], share: float = 0.25
) -> Bool[np.ndarray, "batch row column"]:
    """Patches of which a share or more is covered.

    Args:
        covered: pixels.
        share: share of a patch's pixels.
    """
    batch, height, width = covered.shape
    cut = covered.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH)
    return np.asarray(cut.mean((2, 4)) >= share)


def _need(count: int) -> None:
    if count < 1:
        raise InputError(f"count={count} draws nothing: give 1 or more.")


def words_of(name: str) -> Sequence[str]:
    """Words that a bundled model's tokenizer knows, special tokens aside.

    Args:
        name: ``tiny-marian`` or ``tiny-bert``.
    """
    if name == "tiny-marian":
        return (*ORDERS, *WORDS)
    return (*(one for pair in BRACKETS for one in pair), *FILLERS)
