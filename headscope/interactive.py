"""Notebook tools: view attention on a text, and explain one head."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from headscope.ablation import ablate_heads
from headscope.base.arguments import checked
from headscope.base.files import whole_page
from headscope.base.stacks import all_causal
from headscope.capture import collect
from headscope.circuits import eigenvalues, head_card, spectra
from headscope.circuits.survey import card_table, scores_quickly
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.metrics import embedding_cosine, loss
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.origin import origin
from headscope.probes import Probe, from_tokens, masked, repeated_tokens
from headscope.probes import text as text_probe
from headscope.probes.encoding import encode, frame, need_tokenizer
from headscope.report import AttentionView
from headscope.report.head import HeadEvidence, HeadExample, card_lines, head_html, head_page
from headscope.scoring import score
from headscope.table import (
    AttentionExample,
    HeadCard,
    HeadEigenvalues,
    HeadScores,
    HeadSpectra,
    HeadTable,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


EXAMPLE = "When Mary and John went to the store, John gave a drink to Mary. " * 2
_MOST_TOKENS = 1024
_LARGEST_PATTERNS = 1 << 30


def attention_example(
    model: HeadModel,
    text: str | None = None,
    heads: "Iterable[str | tuple[int, int]] | None" = None,
    *,
    length: int | None = None,
) -> AttentionExample:
    """Attention of chosen heads on one text, quantised to 1/255.

    Args:
        model: from :func:`headscope.load`.
        text: text to read; default: two repeated sentences, or repeated random tokens if the model
            has no tokenizer.
        heads: heads to use. Default: all.
        length: number of tokens to keep from the start of the text; default: the context, at most
            1024.

    Raises:
        InputError: if the text is empty, the model has no such head, or the patterns would take
            over 1 GB.
    """
    chosen = [
        model.shape.check(HeadIndex.parse(head))
        for head in (model.shape.heads if heads is None else heads)
    ]
    if not chosen:
        raise InputError("heads= is empty: give at least one.")
    if length is not None and length < 1:
        raise InputError(f"length={length}: give 1 or more.")
    probe, words = _probe(model, text, length or _MOST_TOKENS)
    if len(chosen) * probe.length**2 > _LARGEST_PATTERNS:
        raise InputError(
            f"{len(chosen)} heads on {probe.length} tokens are more than 1 GB of attention: name "
            "fewer heads, or give a shorter length."
        )
    patterns: dict[HeadIndex, np.ndarray] = {}
    for layer in sorted({head.layer for head in chosen}):
        mine = sorted({head.head for head in chosen if head.layer == layer})
        found = collect(model, probe, layers=[layer], heads=mine)[layer]
        for place, head in enumerate(mine):
            patterns[HeadIndex(layer, head)] = found.pattern[0, place].float().numpy()
    return AttentionExample.of(
        chosen,
        probe.batch.labels(model.tokenizer),
        np.stack([patterns[head] for head in chosen]),
        words,
        origin(model),
    )


def _probe(model: HeadModel, text: str | None, length: int) -> tuple[Probe, str]:
    """The text as a probe, or repeated random tokens."""
    room = min(length, model.shape.n_ctx or length)
    if text is None and model.tokenizer is None:
        half = max(1, min(16, (room - 1) // 2))
        return repeated_tokens(model, length=half, batch=1), "Repeated random tokens."
    said = EXAMPLE.strip() if text is None else text
    if not said.strip():
        raise InputError("the text is empty: give a sentence.")
    tokenizer = need_tokenizer(model, "a text")
    before, after = frame(model, None)
    ids = encode(tokenizer, said, before, after).ids
    words = "A repeated sentence." if text is None else "Your text."
    cut = "" if len(ids) <= room else f" The first {room} of {len(ids)} tokens."
    return from_tokens(torch.tensor([ids[:room]])), words + cut


_LARGEST_PAGE = 30_000_000


@checked
def attention_view(
    model: HeadModel,
    text: str | None = None,
    heads: "Iterable[str | tuple[int, int]] | None" = None,
    *,
    length: int | None = None,
) -> AttentionView:
    """Show where heads attend: the tokens, a thumbnail per head, and a large view.

    Displayed when it is the last value of a notebook cell; ``.save("view.html")`` writes a
    self-contained file. Probabilities are quantised to 1/255.

    Args:
        model: from :func:`headscope.load`.
        text: text to read; default: two repeated sentences, or repeated random tokens if the model
            has no tokenizer.
        heads: which heads, in this order; default: all.
        length: number of tokens to keep from the start of the text; default: the context, at most
            1024.

    Raises:
        InputError: if the text is empty, the model has no such head, or the view is too large for a
            notebook.

    Example:
        >>> hs.attention_view(model, "the cat sat on the cat", heads=["L2H1", "L1H2"])
        AttentionView(L2H1, L1H2 on ... tokens)
    """
    found = attention_example(model, text, heads, length=length)
    if found.pattern.size > 2 * _LARGEST_PAGE:
        raise InputError(
            f"{len(found.heads)} heads on {len(found.tokens)} tokens would be "
            f"{found.pattern.size / 2e6:.0f} MB in the notebook: name fewer heads, or give a "
            "shorter length."
        )
    return AttentionView(found)


_EXAMPLE_LENGTH = 64


@dataclass(frozen=True, eq=False)
class Explanation:
    """All results on one head, printable and displayable in notebooks.

    Attributes:
        model: the model.
        card: results from its weights.
        scan: scores of all heads on probes; None: not run.
        effects: loss without the head; for a model without logits, cosine of its text embeddings
            with and without the head.
        attention: on an example; None: not run.
        seed: seed of probes and random bands.
    """

    model: HeadModel
    card: HeadCard
    scan: HeadTable | None
    effects: tuple[HeadScores, ...]
    attention: AttentionExample | None
    seed: int = 0

    @property
    def head(self) -> HeadIndex:
        """Address of the head."""
        return HeadIndex.parse(self.card.head)

    def page(self) -> str:
        """Build one self-contained HTML page with everything."""
        return head_page(self.card, self._evidence, _facts(self.model))

    def save(self, path: "str | PathLike[str]") -> None:
        """Write the page atomically.

        Raises:
            InputError: if the name does not end in ``.html``.
        """
        whole_page(Path(path), self.page())

    @cached_property
    def _evidence(self) -> HeadEvidence:
        example = None
        if self.attention is not None:
            pattern = self.attention.pattern[0].astype(np.float32) / 255
            example = HeadExample(pattern, self.attention.tokens, self.attention.words)
        singular, complex_values = _pictured(self.model, self.seed)
        return HeadEvidence(singular, complex_values, self.scan, example, self.effects)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Scores, weights, tokens and partners."""
        yield from card_lines(self.card, self.head, self.scan, self.effects)

    def _repr_html_(self) -> str:
        """Show small static tables, with the attention viewer below."""
        viewer = "" if self.attention is None else AttentionView(self.attention, 400)._repr_html_()
        return head_html(self.card, self.scan, self.effects) + viewer

    def __str__(self) -> str:
        """Text as on a terminal of 100 columns."""
        from rich.console import Console

        console = Console(width=100, color_system=None, record=True, quiet=True)
        with console.capture() as said:
            console.quiet = False
            console.print(self)
        return said.get()

    def __repr__(self) -> str:
        """Head and its roles."""
        roles = {} if self.scan is None else self.scan.roles()
        named = ", ".join(f"{role} {mean:.2f}" for role, mean in roles.get(self.head, []))
        return f"Explanation({self.card.model} {self.card.head}: {named or 'no role'})"


@checked
def explain(
    head: "str | tuple[int, int]",
    model: "HeadModel | str | None" = None,
    *,
    text: str | None = None,
    weights_only: bool = False,
    ranks: bool | None = None,
    seed: int = 0,
) -> Explanation:
    """Explain one head: scores, weights, partners, an example of attention, and ablation.

    Args:
        head: ``"L5H1"``, ``"5.1"`` or ``(5, 1)``.
        model: from :func:`headscope.load`, or what it takes; default: the bundled model.
        text: text for the example of attention; default: two repeated sentences.
        weights_only: use weights only and run no probe.
        ranks: rank the head among all heads by each weight score, which requires scoring all heads:
            a minute at 50,000 tokens and 270 heads. None: only if that takes about a second.
        seed: seed of probes and random bands.

    Raises:
        InputError: if the model has no such head, or a text is given with ``weights_only``.

    Example:
        >>> said = hs.explain("L2H1", model)
        >>> said.card.head
        'L2H1'
    """
    wanted = HeadIndex.parse(head)
    if weights_only and text is not None:
        raise InputError("text= needs a run of the model: leave out weights_only=True.")
    found = model if isinstance(model, HeadModel) else load(model)
    index = found.shape.check(wanted)
    attention = scan = None
    effects: tuple[HeadScores, ...] = ()
    if not weights_only:
        attention = attention_example(found, text, [index], length=_EXAMPLE_LENGTH)
    ranked = scores_quickly(found) if ranks is None else ranks
    card = head_card(found, index, table=card_table(found) if ranked else None)
    if not weights_only:
        scan = score(found, seed=seed)
        effects = tuple(_effects(found, index, seed))
    return Explanation(found, card, scan, effects, attention, seed)


def _effects(model: HeadModel, head: HeadIndex, seed: int) -> Iterator[HeadScores]:
    """Effect of ablating the head on the loss of repeated random tokens, or of masked ones.

    For a model without logits, the effect on its text embeddings.
    """
    bare = "logits" in model.limits and model.tokenizer is not None
    probe = text_probe(model, length=_EXAMPLE_LENGTH) if bare else _asked(model, seed)
    if probe is None:
        return
    try:
        metric = embedding_cosine if bare else loss
        yield ablate_heads(model, probe, metric=metric, method="mean", heads=[head])
    except UnsupportedModelError:
        return


def _asked(model: HeadModel, seed: int) -> Probe | None:
    """Probe for the loss; None for an encoder without a known mask token."""
    room = model.shape.n_ctx or 1000
    if all_causal(model.stacks):
        return repeated_tokens(model, length=min(50, (room - 1) // 2), batch=8, seed=seed)
    if getattr(model.tokenizer, "mask_token_id", None) is None:
        return None
    return masked(model, length=min(_EXAMPLE_LENGTH, room), batch=8, seed=seed)


def _pictured(model: HeadModel, seed: int) -> tuple[list[HeadSpectra], list[HeadEigenvalues]]:
    singular, complex_values = [], []
    for circuit in ("OV", "QK"):
        try:
            singular.append(spectra(model, circuit, seed=seed))
            complex_values.append(eigenvalues(model, circuit, "mlp"))
        except UnsupportedModelError:
            continue  # the card's `missing` gives the reason
    return singular, complex_values


def _facts(model: HeadModel) -> list[tuple[str, str]]:
    shape = model.shape
    return [
        ("model", model.name),
        ("layers", str(shape.n_layers)),
        ("heads in a layer", f"{shape.n_heads} ({shape.n_kv_heads} key/value heads)"),
        ("weight digest", model.digest()),
    ]
