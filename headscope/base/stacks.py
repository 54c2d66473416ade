"""Attention stacks and their mask rules: which keys a query may see, and what a stack runs over."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headscope.base.patches import PatchGrid
from headscope.errors import InputError
from headscope.heads import STACK_LETTERS, HeadIndex

MaskKind = Literal["causal", "bidirectional", "cross"]


@dataclass(frozen=True)
class MaskRule:
    """Which keys a query may see, padding apart. The only place where causality is decided.

    Attributes:
        kind: ``causal`` (keys up to the query), ``bidirectional`` (all keys of the same
            sequence), ``cross`` (all keys of another sequence).
        window: distance at which keys go out of sight: a query sees keys less than ``window``
            positions away, itself included (on both sides where keys after it are visible);
            None: no limit.
        block: a query sees keys of its own block of this many positions only; None: no blocks.

    Example:
        >>> import numpy as np
        >>> MaskRule("causal", window=2).visible(np.array([2]), np.arange(4)).tolist()
        [[False, True, True, False]]
    """

    kind: MaskKind = "causal"
    window: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        """Check that the rule can be applied.

        Raises:
            InputError: if a size is below 1, or a cross rule has a window or blocks.
        """
        for name, size in (("window", self.window), ("block", self.block)):
            if size is not None and size < 1:
                raise InputError(f"{name}={size}: a query must see at least itself; use 1 or more.")
        if self.kind == "cross" and (self.window or self.block):
            raise InputError("cross-attention has no window and no blocks: leave them out.")

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key, so that an edit cannot change earlier positions."""
        return self.kind == "causal"

    @property
    def limited(self) -> bool:
        """Whether distance or blocks hide keys that the kind alone would show."""
        return self.window is not None or self.block is not None

    def visible(self, query_pos: Any, key_pos: Any) -> Any:
        """Say which keys each query may see.

        Args:
            query_pos: positions ``[query]``, an integer tensor or array.
            key_pos: positions ``[key]`` of the same type.

        Returns:
            Booleans ``[query key]``.
        """
        query, key = query_pos[:, None], key_pos[None]
        seen = (query >= key) if self.causal else (query == query) & (key == key)
        if self.window is not None:
            seen = seen & (query - key < self.window) & (key - query < self.window)
        if self.block is not None:
            seen = seen & (query // self.block == key // self.block)
        return seen

    def sees(self, n_keys: int) -> int:
        """Return the largest number of keys, of this many, that any query may see."""
        most = n_keys
        if self.window is not None:
            most = min(most, self.window if self.causal else 2 * self.window - 1)
        return most if self.block is None else min(most, self.block)

    def span(self, first_query: int, last_query: int, n_keys: int) -> slice:
        """Return the smallest run of keys that holds all that a run of queries may see.

        Args:
            first_query: first position of the run.
            last_query: last position of the run, included.
            n_keys: number of keys.
        """
        start, stop = 0, min(n_keys, last_query + 1) if self.causal else n_keys
        if self.window is not None:
            start = max(start, first_query - self.window + 1)
            stop = min(stop, last_query + self.window)
        if self.block is not None:
            start = max(start, first_query // self.block * self.block)
            stop = min(stop, (last_query // self.block + 1) * self.block)
        return slice(start, stop)

    def __str__(self) -> str:
        """Return the rule in words: ``bidirectional, window of 64 keys``."""
        sizes = {"window": self.window, "block": self.block}
        limits = [f"{name} of {size:,} keys" for name, size in sizes.items() if size is not None]
        return ", ".join([self.kind, *limits])


CAUSAL = MaskRule("causal")


def all_causal(stacks: Mapping[str, "Stack"]) -> bool:
    """Return whether no query of any stack sees a later key.

    Args:
        stacks: of a model, by name.
    """
    return all(stack.mask.causal for stack in stacks.values())


def grid_of(stacks: Mapping[str, "Stack"]) -> PatchGrid | None:
    """Return how images are cut into patches; None where a model reads none.

    Args:
        stacks: of the model, by name.
    """
    return next((stack.grid for stack in stacks.values() if stack.grid is not None), None)


@dataclass(frozen=True)
class Stack:
    """One attention stack of a model: how many heads it has and what they run over.

    Attributes:
        name: empty in a text model with a single stack, decoder or encoder; else ``encoder``,
            ``decoder``, ``cross``, ``vision``, ``text``.
        n_layers: layers of the stack, those without attention included.
        n_heads, n_kv_heads: query heads, and key/value heads, of a layer.
        d_head: size of a head.
        mask: rule of all layers, but that windows of single layers are in ``windows``.
        queries, keys: names of the sequences that queries and keys run over.
        windows: by layer, how far back a query sees, itself included; None: no limit.
        grid: how images are cut into the positions of the stack; None where it reads no images.

    Example:
        >>> stack = Stack("cross", 2, 4, 4, 8, MaskRule("cross"), queries="decoder", keys="encoder")
        >>> stack.letter, str(stack.head(1, 3))
        ('X', 'X1H3')
    """

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    mask: MaskRule
    queries: str = "text"
    keys: str = "text"
    windows: tuple[int | None, ...] = ()
    grid: PatchGrid | None = None

    @property
    def letter(self) -> str:
        """Letter that addresses of its heads begin with."""
        return STACK_LETTERS[self.name]

    def head(self, layer: int, head: int) -> HeadIndex:
        """Return the address of one of its heads.

        Raises:
            InputError: if the stack does not have that head.
        """
        if not (0 <= layer < self.n_layers and 0 <= head < self.n_heads):
            raise InputError(
                f"there is no head {HeadIndex(layer, head, self.name)}: the stack has layers "
                f"0-{self.n_layers - 1} of heads 0-{self.n_heads - 1}."
            )
        return HeadIndex(layer, head, self.name)
