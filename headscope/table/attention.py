"""Attention of many heads on one text, coarse enough to be kept and sent: what viewers draw."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from headscope.base.glance import Glance, Shown, readable, sizes
from headscope.base.saved import Stored
from headscope.errors import InputError
from headscope.files import whole_file
from headscope.heads import HeadIndex
from headscope.table.provenance import Provenance

_KEY = "headscope"
_MAX_BYTES = 200_000_000  # a file from elsewhere must not make us allocate what it likes


@dataclass(frozen=True, eq=False, repr=False)
class AttentionExample(Stored, Shown):
    """Attention probabilities in steps of 1/255.

    Attributes:
        heads: in the order of the patterns.
        tokens: text of every position.
        pattern: ``round(255 * probability)``; a query's row may sum to less than 255 where a sink
            takes a part, and by rounding.
        words: what the text is.
        provenance: where it came from.
    """

    heads: tuple[HeadIndex, ...]
    tokens: tuple[str, ...]
    pattern: UInt8[np.ndarray, "which query key"]
    words: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shape."""
        shape = (len(self.heads), len(self.tokens), len(self.tokens))
        if self.pattern.shape != shape:
            raise InputError(
                f"attention of {shape[0]} heads on {shape[1]} tokens has shape {shape}, not "
                f"{self.pattern.shape}."
            )

    @classmethod
    def of(
        cls,
        heads: Sequence[HeadIndex],
        tokens: Sequence[str],
        pattern: Float[np.ndarray, "which query key"],
        words: str = "",
        provenance: Provenance | None = None,
    ) -> "AttentionExample":
        """Round probabilities; NaN becomes 0."""
        coarse = np.rint(np.nan_to_num(pattern) * 255).clip(0, 255).astype(np.uint8)
        return cls(tuple(heads), tuple(tokens), coarse, words, provenance or Provenance())

    def glance(self) -> Glance:
        """How many heads on which text."""
        return Glance(
            "attention",
            [
                sizes(("head", "token"), self.pattern.shape[:2]),
                readable(self.words or "".join(self.tokens), 60),
                self.provenance.model,
            ],
            hint="hs.attention_view(model, text)",
        )

    def save(self, path: "str | PathLike[str]") -> None:
        """Write one safetensors file atomically."""
        from safetensors.numpy import save

        facts = {
            "heads": [str(head) for head in self.heads],
            "tokens": self.tokens,
            "words": self.words,
            "provenance": self.provenance.to_json(),
        }
        made = save({"pattern": self.pattern}, metadata={_KEY: json.dumps(facts)})
        with whole_file(Path(path)) as file:
            file.write(made)

    @staticmethod
    def load(path: "str | PathLike[str]") -> "AttentionExample":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: if the file is none.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path)
        try:
            if file.stat().st_size > _MAX_BYTES:
                raise InputError(f"{str(file)!r} is larger than any example of attention.")
            with safe_open(file, framework="numpy") as opened:
                facts = json.loads((opened.metadata() or {})[_KEY])
                pattern = opened.get_tensor("pattern")
            return AttentionExample(
                tuple(HeadIndex.parse(str(head)) for head in facts["heads"]),
                tuple(map(str, facts["tokens"])),
                pattern,
                str(facts["words"]),
                Provenance.from_json(facts["provenance"]),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{str(file)!r} is no example of attention: {error!r}.") from None
