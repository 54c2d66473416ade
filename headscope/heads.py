"""What a head is called and what shape one attention stack has. No tensors, no models."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from headscope.errors import InputError

_ADDRESS = re.compile(r"^\s*(?:L(\d+)H(\d+)|(\d+)\.(\d+))\s*$", re.IGNORECASE)


class HeadIndex(NamedTuple):
    """Address of one query head: the model's own layer number, then the head within it.

    Examples:
        >>> str(HeadIndex(5, 1))
        'L5H1'
        >>> HeadIndex.parse("5.1") == (5, 1)
        True
    """

    layer: int
    head: int

    def __str__(self) -> str:
        """Return the form used everywhere in print: ``L5H1``."""
        return f"L{self.layer}H{self.head}"

    def __repr__(self) -> str:
        """Return the same form, so that lists of heads read well."""
        return str(self)

    @classmethod
    def parse(cls, address: "str | tuple[int, int]") -> "HeadIndex":
        """Read ``"L5H1"``, ``"5.1"`` or ``(5, 1)``.

        Raises:
            InputError: if the text is no head address.
        """
        if not isinstance(address, str):
            layer, head = address
            return cls(int(layer), int(head))
        match = _ADDRESS.match(address)
        if match is None:
            raise InputError(f"{address!r} is not a head: write it as 'L5H1' or '5.1'.")
        layer_text, head_text = (group for group in match.groups() if group is not None)
        return cls(int(layer_text), int(head_text))


@dataclass(frozen=True)
class ModelShape:
    """Shape of one attention stack.

    ``attention_layers`` lists the layers that have attention (all of them but in hybrids).
    ``windows`` gives, for every layer, how many keys back a query sees, itself included
    (None: all). ``removed`` lists heads that were pruned out of those layers: the others keep
    their numbers. ``n_ctx`` is the longest text that it takes (None: no limit), ``trained_ctx``
    what that was where the limit has been lifted.
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

    def __post_init__(self) -> None:
        """Check what every user of a shape relies on."""
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly."
            )
        if len(self.windows) != self.n_layers:
            raise InputError(f"{len(self.windows)} windows given for {self.n_layers} layers.")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (1 without grouping)."""
        return self.n_heads // self.n_kv_heads

    def kv_head(self, head: int) -> int:
        """Key/value head that query head ``head`` reads."""
        return head // self.group_size

    @property
    def heads(self) -> tuple[HeadIndex, ...]:
        """Every head that exists, in layer order."""
        return tuple(
            HeadIndex(layer, head)
            for layer in self.attention_layers
            for head in range(self.n_heads)
            if (layer, head) not in self.removed
        )

    def check(self, head: HeadIndex) -> HeadIndex:
        """Return ``head`` if the model has it.

        Raises:
            InputError: if it does not.
        """
        if head.layer not in self.attention_layers or not 0 <= head.head < self.n_heads:
            raise InputError(
                f"the model has no head {head}: it has heads 0-{self.n_heads - 1} in "
                f"layers {self.attention_layers[0]}-{self.attention_layers[-1]}."
            )
        if head in self.removed:
            raise InputError(f"head {head} was pruned out of the model.")
        return head
