"""Patchscope: what a head writes, put into words by the model itself."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.files import Saved
from headscope.base.result import Glance, Shown, Tabular, number, readable
from headscope.edits import Span
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.lens.reading import Promptish, read_prompt, token_texts
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import origin
from headscope.probes.encoding import bos_prefix, encode, need_tokenizer
from headscope.probes.prompts import find_span
from headscope.table import Provenance

IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n? ->"


@dataclass(frozen=True, eq=False, repr=False)
class HeadReading(Saved, Shown, Tabular):
    """What a model says next where a head's write stands in place of a token.

    Attributes:
        head: whose write it is.
        said: likeliest tokens with it.
        probabilities: of these with it.
        plain: of these without it.
        scale: length of the state that was replaced over that of the write.
        provenance: where it came from.
    """

    head: HeadIndex
    said: tuple[str, ...]
    probabilities: Float[np.ndarray, " token"]
    plain: Float[np.ndarray, " token"]
    scale: float
    provenance: Provenance = field(default_factory=Provenance)

    def glance(self) -> Glance:
        """The likeliest tokens."""
        rows = [
            (readable(repr(one)), number(float(p)), number(float(q)))
            for one, p, q in zip(self.said, self.probabilities, self.plain, strict=True)
        ]
        return Glance(
            f"what {self.head} writes, in words",
            [self.provenance.model],
            ("next token", "with the write", "without"),
            rows,
        )

    def to_pandas(self) -> Any:
        """One row per token."""
        import pandas

        return pandas.DataFrame(
            {"token": self.said, "probability": self.probabilities, "plain": self.plain}
        )


@own_types()
@torch.no_grad()
def patchscope(
    model: HeadModel,
    head: "str | tuple[int, int]",
    prompt: Promptish,
    position: int = -1,
    *,
    template: str = IDENTITY,
    place: str = "the last '?'",
    layer: int = 0,
    scaled: bool = True,
    k: int = 8,
) -> HeadReading:
    """Let the model say what a head writes, by putting the write into another prompt.

    The write ``z W_O`` of the head at a position of the prompt becomes the residual stream after a
    layer at the place of the template's placeholder; what the model then says at the end of the
    template is the reading, beside what it says without. With ``scaled`` the write has the length
    of the state that it replaces: single heads write little.

    Args:
        model: where a head's write is ``z @ W_O``.
        head: which.
        prompt: a text, or token ids.
        position: of the write in the prompt.
        template: by default one that asks for a token to be said again.
        place: of the placeholder in the template, as :func:`headscope.probes.from_jsonl` has parts
            of texts; its last token is replaced.
        layer: after which the write stands in the stream.
        scaled: see above.
        k: how many tokens are told.

    Raises:
        InputError: if the head, position, place or layer does not exist.
        UnsupportedModelError: if a norm follows attention.

    Source: Ghandeharioun et al. 2024 (arXiv 2401.06102).

    Example:
        >>> found = hs.steering.patchscope(
        ...     model, "L2H1", "Mary went to the", template="Mary and Mary. the and", place="the"
        ... )
        >>> len(found.said)
        8
    """
    if (reason := model.limits.get("linear_write")) is not None:
        raise UnsupportedModelError(f"a head's write cannot be read alone: {reason}")
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r}: tell one token at least.")
    which = model.shape.check(HeadIndex.parse(head))
    read = read_prompt(model, prompt)
    at = read.at(position)
    target = Tap("resid_post", layer).check(model.name, model.shape)
    tokenizer = need_tokenizer(model, "a template")
    into = encode(tokenizer, template, bos_prefix(model, None))
    covered = into.covering(*find_span(template, place))
    if not covered:
        raise InputError(f"the place {place!r} covers no token of the template.")
    spot, ids = covered[-1], read_prompt(model, into.ids).ids
    write = _write(model, which, read.ids, at)
    scales: list[Tensor] = []

    def replaced(value: Tensor, _span: Span) -> Tensor:
        old = value[:, spot]
        size = old.norm(dim=-1, keepdim=True) / write.norm().clamp_min(1e-12).to(value)
        scales.append(size[0, 0] if scaled else torch.ones(()))
        new = value.clone()
        new[:, spot] = write.to(value) * (size if scaled else 1.0)
        return new

    last = torch.tensor([len(ids) - 1])
    with_write = model.run(ids[None], writes={target: replaced}, logits_at=last)
    plain = model.forward(ids[None], logits_at=last)
    assert with_write is not None  # noqa: S101  # they were asked for
    likely, before = (one[0, 0].float().softmax(-1).cpu() for one in (with_write, plain))
    top = likely.argsort(descending=True, stable=True)[:k]
    return HeadReading(
        which,
        tuple(token_texts(model.tokenizer, top.tolist())),
        likely[top].double().numpy(),
        before[top].double().numpy(),
        float(scales[0]),
        origin(model, read.probe, head=str(which), layer=layer, position=at),
    )


def _write(
    model: HeadModel, head: HeadIndex, ids: Tensor, position: int
) -> Float[Tensor, " d_model"]:
    found: list[Tensor] = []

    def keep(view: TapView) -> None:
        found.append(view.z[0, position, head.head].float().clone())

    model.run(
        ids[None], reads={Tap("z", head.layer): keep}, logits_at=torch.empty(0, dtype=torch.long)
    )
    return found[0] @ model.output_weights(head.layer)[head.head].float()
