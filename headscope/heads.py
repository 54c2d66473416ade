"""Head addresses and the shape of an attention stack; needs neither tensors nor models."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from headscope.errors import InputError, nearest, whole

# Letter of each attention stack in head addresses; single-stack models use L.
STACK_LETTERS = {"": "L", "encoder": "E", "decoder": "D", "cross": "X", "vision": "V", "text": "T"}
_STACKS = {letter: stack for stack, letter in STACK_LETTERS.items()}
_ADDRESS = re.compile(rf"^\s*(?:([{''.join(_STACKS)}])(\d+)H(\d+)|(\d+)\.(\d+))\s*$", re.IGNORECASE)


class HeadIndex(tuple[int, int]):
    """Address of one query head: layer, head within the layer, and attention stack.

    It is a tuple ``(layer, head)``: it unpacks, and it indexes an array ``[layer head]``. Heads of
    different stacks are never equal, even with the same numbers.

    Examples:
        >>> str(HeadIndex(5, 1)), str(HeadIndex(3, 2, "cross"))
        ('L5H1', 'X3H2')
        >>> HeadIndex.parse("5.1") == (5, 1)
        True
        >>> HeadIndex.parse("X3H2").stack
        'cross'
    """

    stack: str

    def __new__(cls, layer: int, head: int, stack: str = "") -> "HeadIndex":
        """Create an address.

        Args:
            layer: the model's own layer number.
            head: query head within the layer.
            stack: name of the attention stack; empty in a model with a single stack.

        Raises:
            InputError: if the stack is unknown, or a number is not an integer from 0 on.
        """
        if stack not in STACK_LETTERS:
            raise InputError(nearest(stack, [name for name in STACK_LETTERS if name], kind="stack"))
        index = super().__new__(cls, (whole(layer, "layer", 0), whole(head, "head", 0)))
        index.stack = stack
        return index

    @property
    def layer(self) -> int:
        """The model's own layer number."""
        return self[0]

    @property
    def head(self) -> int:
        """Query head within the layer."""
        return self[1]

    def __eq__(self, other: object) -> bool:
        """Compare layer, head and stack; a plain pair equals a head of a single-stack model."""
        return tuple.__eq__(self, other) is True and self.stack == getattr(other, "stack", "")

    def __ne__(self, other: object) -> bool:
        """Negate equality (the tuple's own ``!=`` would ignore the stack)."""
        return not self == other

    def __hash__(self) -> int:
        """Hash like the plain pair, so that sets find either form."""
        return tuple.__hash__(self)

    def __getnewargs__(self) -> tuple[int, int, str]:
        """Include the stack when pickling."""
        return self.layer, self.head, self.stack

    def __str__(self) -> str:
        """Return the printed form, ``L5H1``."""
        return f"{STACK_LETTERS[self.stack]}{self.layer}H{self.head}"

    def __repr__(self) -> str:
        """Return the printed form, so that lists of heads stay readable."""
        return str(self)

    @classmethod
    def parse(cls, address: "str | tuple[int, int]") -> "HeadIndex":
        """Parse ``"L5H1"``, ``"5.1"``, ``(5, 1)``, or ``"X3H2"`` for a head of a named stack.

        Raises:
            InputError: if the text is not a head address.
        """
        if isinstance(address, Sequence) and not isinstance(address, str) and len(address) == 2:
            return cls(address[0], address[1], getattr(address, "stack", ""))
        match = _ADDRESS.match(address) if isinstance(address, str) else None
        if match is None:
            raise InputError(f"{address!r} is not a head address: write 'L5H1' or '5.1'.")
        letter, *numbers = match.groups()
        layer_text, head_text = (number for number in numbers if number is not None)
        return cls(int(layer_text), int(head_text), _STACKS[(letter or "L").upper()])


# Heads in the order in which they are removed or masked.
HeadOrder = tuple[HeadIndex, ...]


@dataclass(frozen=True)
class ModelShape:
    """Shape of one attention stack.

    Attributes:
        attention_layers: layers that have attention (all of them except in hybrids).
        windows: per layer, how many keys back a query sees, itself included (None: all).
        removed: pruned heads; the others keep their numbers.
        n_ctx: longest accepted text (None: no limit).
        trained_ctx: the original ``n_ctx`` where that limit has been lifted.
        turns_at: longest text for which a model with two sets of rotations (longrope) uses the
            first (None: one set).
        d_vocab: number of input tokens.
        d_vocab_out: number of tokens with a logit (None: the same).
        stack: name of the stack; empty in a text model with a single stack.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int | None
    attention_layers: tuple[int, ...]
    windows: tuple[int | None, ...]
    removed: frozenset[HeadIndex] = frozenset()
    trained_ctx: int | None = None
    turns_at: int | None = None
    d_vocab_out: int | None = None
    stack: str = ""

    def __post_init__(self) -> None:
        """Check the invariants of a shape."""
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly."
            )
        if len(self.windows) != self.n_layers:
            raise InputError(f"{len(self.windows)} windows given for {self.n_layers} layers.")

    @property
    def n_logits(self) -> int:
        """Number of tokens that have a logit."""
        return self.d_vocab if self.d_vocab_out is None else self.d_vocab_out

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (1 without grouping)."""
        return self.n_heads // self.n_kv_heads

    def kv_head(self, head: int) -> int:
        """Key/value head that query head ``head`` reads."""
        return head // self.group_size

    @property
    def heads(self) -> tuple[HeadIndex, ...]:
        """All existing heads, in layer order."""
        every = (
            HeadIndex(layer, head, self.stack)
            for layer in self.attention_layers
            for head in range(self.n_heads)
        )
        return tuple(head for head in every if head not in self.removed)

    def check(self, head: HeadIndex) -> HeadIndex:
        """Return ``head`` if the model has it; an address without a stack refers to this stack.

        Raises:
            InputError: if the model has no such head.
        """
        if head.stack not in ("", self.stack):
            here = f"the stack {self.stack!r}" if self.stack else "a single attention stack"
            raise InputError(f"there is no head {head}: this is {here}.")
        head = HeadIndex(head.layer, head.head, self.stack)
        if head.layer not in self.attention_layers or not 0 <= head.head < self.n_heads:
            raise InputError(
                f"the model has no head {head}: it has heads 0-{self.n_heads - 1} in "
                f"layers {self.attention_layers[0]}-{self.attention_layers[-1]}."
            )
        if head in self.removed:
            raise InputError(f"head {head} was pruned out of the model.")
        return head
