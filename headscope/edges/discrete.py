"""``hs.edges.discrete``: codes of heads and head pairs that occur only with a task.

A small sparse autoencoder turns head outputs into codes; codes that occur on positive prompts and
never on negative ones are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture
from headscope.base.arguments import checked
from headscope.base.files import Saved
from headscope.base.options import Advance, RunOptions
from headscope.base.result import Glance, Rows, Section, Shown, Tabular, Words, number
from headscope.base.specs import Provenance
from headscope.edges.written import PaddedTexts, check_family, heads_write
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import HeadScores

if TYPE_CHECKING:
    import pandas

_RATE = 1e-3
_SHUFFLES = 100
_SOURCE = "O'Neill and Bui 2024, arXiv 2405.12522"


@dataclass(frozen=True, eq=False, repr=False)
class Discrete(Saved, Shown, Tabular):
    """Counts of codes that occur only on positive prompts, by head and by pair of heads.

    Attributes:
        scores: per head, number of distinct codes on positive and never on negative prompts, with
            its mean and p-value under shuffled labels. That mean is far from 0.
        control: the same with roles exchanged: codes only on negative prompts.
        edges: number of distinct pairs of codes only on positive prompts, ``[head head]``, with
            heads layer by layer; 0 on the diagonal.
        edges_null: mean of ``edges`` under shuffled labels.
        codes: code of every head on every prompt, positives first; -1 if no feature is active.
        provenance: where it came from.
    """

    scores: HeadScores
    control: HeadScores
    edges: Float[np.ndarray, "head head"]
    edges_null: Float[np.ndarray, "head head"]
    codes: Int[np.ndarray, "prompt head"]
    provenance: Provenance = field(default_factory=Provenance)

    def heads(self) -> list[HeadIndex]:
        """Heads in the order of :attr:`edges`."""
        return [HeadIndex(*place) for place in np.ndindex(*self.scores.mean.shape)]

    def top(self, k: int = 10) -> list[tuple[HeadIndex, HeadIndex, float, float]]:
        """Pairs with the most exclusive codes above the null: both heads, count, null."""
        heads = self.heads()
        above = np.triu(self.edges - self.edges_null, 1)
        order = np.argsort(-above, axis=None, kind="stable")[: max(k, 0)]
        places = zip(*np.unravel_index(order, above.shape), strict=True)
        return [
            (heads[a], heads[b], float(self.edges[a, b]), float(self.edges_null[a, b]))
            for a, b in places
        ]

    def _rows(self, k: int) -> list[tuple[str, str, str, str]]:
        scores = self.scores
        return [
            (str(head), number(value), number(float(scores.null[head.layer, head.head])),
             number(float(scores.p_value[head.layer, head.head])))
            for head, value in scores.top(k)
        ]  # fmt: skip

    def glance(self) -> Glance:
        """Show the heads with the most exclusive codes, with the null."""
        return Glance(
            "discrete codes of heads",
            [f"{len(self.codes)} prompts", self.provenance.model],
            ("head", "codes only on positives", "labels shuffled", "p"),
            self._rows(6),
            hint="result.top(10), result.scores, result.edges",
        )

    def sections(self) -> list[Section]:
        """Report heads and pairs, next to the null."""
        said = "Distinct codes only on positive prompts, next to their mean under shuffled labels."
        heads = Rows(("head", "codes", "labels shuffled", "p"), self._rows(20))
        pairs = [(str(a), str(b), count, null) for a, b, count, null in self.top(20)]
        return [
            Section(
                "Discrete codes",
                [Words(said), heads, Rows(("head", "head", "pairs", "labels shuffled"), pairs)],
            )
        ]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per pair of heads: both heads, count, null."""
        import pandas

        rows = self.top(self.edges.size)
        return pandas.DataFrame(
            [(str(a), str(b), count, null) for a, b, count, null in rows if a != b],
            columns=["head", "other", "pairs", "null"],
        )


@checked
@own_types()
def discrete(
    model: HeadModel,
    positives: Probe,
    negatives: Probe,
    *,
    features: int = 200,
    penalty: float = 0.02,
    steps: int = 500,
    examples: int = 10,
    normalised: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Discrete:
    """Count the codes that each head, and each pair of heads, has only on positive prompts.

    Each head's write is averaged over the positions of a prompt. One sparse autoencoder for all
    heads is trained on a few prompts of both kinds; a head's code is its strongest feature. The
    score grows with the number of prompts and of codes in use, so it comes with its mean under
    shuffled labels and a p-value of ``(1 + shuffles as large) / (1 + shuffles)`` from 100 shuffles.

    Args:
        model: as in :func:`attribute`.
        positives: prompts with the task.
        negatives: as many prompts without it, e.g. ``positives.corrupt``.
        features: number of features of the autoencoder.
        penalty: weight of the mean magnitude of features in the loss.
        steps: Adam steps, each over all examples.
        examples: number of prompts to train on, drawn from both kinds.
        normalised: divide by the number of distinct codes on either kind.
        seed: seed for the draw, the autoencoder and the shuffles.
        batch_size: prompts per pass; affects only time and memory.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the numbers of prompts of the two kinds differ, or an argument is out of
            range.
        UnsupportedModelError: if the model's heads do not each write through a matrix.

    Source:
        O'Neill and Bui 2024, "Sparse autoencoders enable scalable and reliable circuit
        identification in language models", arXiv 2405.12522.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=4)
        >>> found = hs.edges.discrete(model, names, names.corrupt, steps=5)
        >>> found.scores.mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    if len(positives) != len(negatives):
        raise InputError(
            f"there are {len(positives)} positive and {len(negatives)} negative prompts: the score "
            "grows with their number, so give equally many."
        )
    if min(features, steps, examples) < 1 or penalty < 0:
        raise InputError("features, steps and examples must be 1 or more, and penalty 0 or more.")
    check_family(model)
    for probe in (positives, negatives):
        capture.check_fits(model, probe)
    options = RunOptions(batch_size, seed=seed, progress=progress)
    written = torch.cat([_written(model, probe, options) for probe in (positives, negatives)])
    drawn = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(written), generator=drawn)[:examples]
    with options.track(float(steps), "autoencoder") as advance:
        encode = _trained(written[chosen].flatten(0, 1), features, penalty, steps, drawn, advance)
    codes = np.stack([encode(one).numpy() for one in written])
    return _counted(model, positives, codes, normalised, seed)


def _written(
    model: HeadModel, probe: Probe, options: RunOptions
) -> Float[Tensor, "prompt head d_model"]:
    """Mean output of every head over real positions, heads layer by layer."""
    layers = model.shape.attention_layers
    size = min(len(probe), options.per_pass(probe.length, 4096))
    parts = []
    for start in range(0, len(probe), size):
        part = probe.examples(slice(start, start + size))
        found: list[Tensor] = []

        def read(view: TapView, part: Probe = part, found: list[Tensor] = found) -> None:
            real = part.real.to(view.z.device).float()[:, :, None, None]
            mean = (view.z.float() * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
            found.append(heads_write(model, view.layer, mean)[:, :, 0].cpu())

        texts = PaddedTexts(part.tokens, part.real)
        nothing = torch.empty(0, dtype=torch.long)
        with torch.no_grad():
            model.run(texts, reads={Tap("z", n): read for n in layers}, logits_at=nothing)
        parts.append(torch.cat(found, 1))
    return torch.cat(parts)


def _trained(
    rows: Float[Tensor, "row d_model"],
    features: int,
    penalty: float,
    steps: int,
    drawn: torch.Generator,
    advance: Advance,
) -> Callable[[Tensor], Int[Tensor, " row"]]:
    """Train the autoencoder, and return the function from rows to codes (-1: no feature active)."""
    width = rows.shape[1]
    bound = width**-0.5
    encoder = (torch.rand(width, features, generator=drawn) * 2 - 1) * bound
    decoder = torch.randn(features, width, generator=drawn)
    weights = [
        encoder, torch.zeros(features), decoder / decoder.norm(dim=1, keepdim=True),
        torch.zeros(width),
    ]  # fmt: skip
    for weight in weights:
        weight.requires_grad_()
    encoder, shift, decoder, bias = weights
    adam = torch.optim.Adam(weights, lr=_RATE)
    for _ in range(steps):
        with torch.enable_grad():
            on = torch.relu((rows - bias) @ encoder + shift)
            error = (on @ decoder + bias - rows).square().mean()
            slopes = torch.autograd.grad(error + penalty * on.abs().mean(), weights)
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                weight.grad = slope
            along = (slopes[2] * decoder).sum(1, keepdim=True)
            decoder.grad = slopes[2] - along * decoder  # rows keep their norm
            adam.step()
            decoder /= decoder.norm(dim=1, keepdim=True)
        advance(1.0)

    @torch.no_grad()
    def code(given: Tensor) -> Int[Tensor, " row"]:
        on = torch.relu((given - bias) @ encoder + shift)
        return torch.where(on.amax(1) > 0, on.argmax(1), -1)

    return code


def unique_codes(
    codes: Int[np.ndarray, "prompt item"],
    positive: Bool[np.ndarray, " prompt"],
    normalised: bool = False,
) -> Float[np.ndarray, " item"]:
    """Count distinct codes of each item that occur only on positive prompts; -1 means none.

    Args:
        codes: code of every prompt and item.
        positive: mask of the positive prompts.
        normalised: divide by the number of distinct codes on either kind.

    Example:
        >>> codes = np.array([[1, 4], [2, 4], [3, 4], [3, 4], [3, 5]])
        >>> unique_codes(codes, np.array([True, True, True, False, False])).tolist()
        [2.0, 0.0]
    """
    width = int(codes.max(initial=0)) + 1
    items = np.arange(codes.shape[1])
    seen = np.zeros((2, codes.shape[1], width), bool)
    for kind, rows in enumerate((codes[positive], codes[~positive])):
        there = rows >= 0
        seen[kind][np.broadcast_to(items, rows.shape)[there], rows[there]] = True
    alone = (seen[0] & ~seen[1]).sum(1).astype(float)
    if normalised:
        alone /= np.maximum((seen[0] | seen[1]).sum(1), 1)
    return np.asarray(alone)


def _pair_codes(codes: Int[np.ndarray, "prompt head"]) -> Int[np.ndarray, "prompt pair"]:
    """One code for every pair of heads (the first before the second), renumbered by pair."""
    a, b = np.triu_indices(codes.shape[1], 1)
    width = int(codes.max(initial=0)) + 1
    both = np.where((codes[:, a] < 0) | (codes[:, b] < 0), -1, codes[:, a] * width + codes[:, b])
    fresh = np.empty_like(both)
    for pair in range(both.shape[1]):
        fresh[:, pair] = np.unique(both[:, pair], return_inverse=True)[1]
    return np.asarray(np.where(both < 0, -1, fresh))


def _counted(
    model: HeadModel,
    probe: Probe,
    codes: Int[np.ndarray, "prompt head"],
    normalised: bool,
    seed: int,
) -> Discrete:
    """Counts for heads and pairs, with those under shuffled labels."""
    positive = np.arange(len(codes)) < len(codes) // 2
    pairs = _pair_codes(codes)
    drawn = np.random.default_rng(seed)
    shuffles = [drawn.permutation(positive) for _ in range(_SHUFFLES)]
    shape = (len(model.shape.attention_layers), model.shape.n_heads)
    about = origin(
        model, probe, attention="whole passes", method="discrete autoencoder", draw_seed=seed
    )

    def scored(name: str, labels: Bool[np.ndarray, " prompt"], said: str) -> HeadScores:
        found = unique_codes(codes, labels, normalised)
        null = np.stack([unique_codes(codes, one, normalised) for one in shuffles])
        p = (1 + (null >= found).sum(0)) / (1 + len(null))
        known = {"null": null.mean(0).reshape(shape), "p_value": p.reshape(shape)}
        return HeadScores.from_summary(
            name, found.reshape(shape), kv_heads=model.shape.n_kv_heads, known=known,
            unit="share" if normalised else "codes", bounds=(0.0, 1.0 if normalised else None),
            description=said, source=_SOURCE, provenance=about,
        )  # fmt: skip

    return Discrete(
        scored("unique_codes", positive, "Distinct codes only on positive prompts."),
        scored("unique_codes_of_negatives", ~positive, "Distinct codes only on negative prompts."),
        _square(unique_codes(pairs, positive, normalised), codes.shape[1]),
        _square(
            np.mean([unique_codes(pairs, one, normalised) for one in shuffles[:20]], 0),
            codes.shape[1],
        ),
        codes,
        about,
    )


def _square(values: Float[np.ndarray, " pair"], heads: int) -> Float[np.ndarray, "head head"]:
    """Scatter values of pairs into a symmetric matrix."""
    found = np.zeros((heads, heads))
    found[np.triu_indices(heads, 1)] = values
    return np.asarray(found + found.T)
