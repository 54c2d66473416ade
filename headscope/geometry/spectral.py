"""Spectra of attention: entropy of rotary bands, and high-frequency gain.

``rotary_bands`` finds the frequency bands in which queries or keys have nearly rank one (DoPE);
:class:`headscope.interventions.Denoise` removes them. ``high_frequency_gain`` bounds how much of
the differences between tokens survives a head's averaging (length-induced collapse).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.result import Listed
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.errors import InputError, UnsupportedModelError
from headscope.geometry.layers import read_texts
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import origin
from headscope.probes import Probe
from headscope.table import HeadScores

_TOKENS_PER_PASS = 4096
# Receives the index of a text, a layer, and the values of its heads.
LayerReader = Callable[[int, int, Tensor], None]
_DOPE = "Xiong et al. 2025, arXiv 2511.09146 (DoPE)"


@dataclass(frozen=True, eq=False, repr=False)
class RotaryBands(Listed):
    """Entropy of rotated queries or keys, by head and by rotary plane.

    Attributes:
        scores: truncated matrix entropy of every head in nats, with a value per text.
        entropy: entropy of each plane in nats, from 0 (all tokens on a line) to ln 2 (a circle),
            averaged over texts, with planes ordered from fastest to slowest. NaN in layers without
            rotary positions.
        size: root mean square of the entries of the head's queries or keys.
        frequency: rotation of each plane per position, in radians, by layer.
    """

    scores: HeadScores
    entropy: Float[np.ndarray, "layer head plane"]
    size: Float[np.ndarray, "layer head"]
    frequency: Float[np.ndarray, "layer plane"]

    def below(self, entropy: float) -> dict[HeadIndex, tuple[int, ...]]:
        """Planes of each head with an entropy below a threshold, for removal.

        Args:
            entropy: threshold in nats, 0 to ln 2.

        Example:
            >>> found = hs.geometry.rotary_bands(hs.load("tiny-llama"))
            >>> sum(map(len, found.below(0.7).values())) == found.entropy.size
            True
        """
        found = {}
        for layer, head in np.ndindex(*self.entropy.shape[:2]):
            low = np.flatnonzero(self.entropy[layer, head] < entropy)
            if len(low):
                found[HeadIndex(layer, head)] = tuple(int(plane) for plane in low)
        return found


@checked
@own_types()
def rotary_bands(
    model: HeadModel,
    texts: str | Path | Sequence[str] | Probe | None = None,
    *,
    side: Literal["key", "query"] = "key",
    rank: int = 32,
    length: int | None = 128,
    skip: int = 1,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> RotaryBands:
    """Truncated matrix entropy of every head's rotated keys or queries, and of each band.

    With X the keys or queries of a text as attention uses them, ``p`` are the ``rank`` largest
    eigenvalues of ``X^T X`` divided by their sum, and the entropy is ``-sum p ln p``. X is not
    centred, since the aim is to find directions that all tokens share. For a band, X has the two
    coordinates of its plane. Slow planes rotate little over a text, so a constant part of the keys
    stays constant, which gives an entropy near 0 and an attention sink.

    Args:
        model: model with rotary positions.
        texts: texts or a path, as for :func:`headscope.probes.text`, or a probe; None: the bundled
            passages.
        side: ``key`` or ``query``; heads in a group share keys.
        rank: number of eigenvalues to use, at least 2.
        length: cut texts into pieces of this many tokens; None: whole texts. Of a probe nothing
            is cut.
        skip: leave out this many tokens at each text's start.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if a text is too short, or an argument is invalid.
        UnsupportedModelError: if the model has no rotary positions.

    Source:
        Xiong et al. 2025, "DoPE: Denoising Rotary Position Embedding" (arXiv 2511.09146); the
        division by the sum of only the largest eigenvalues is headscope's.

    Example:
        >>> found = hs.geometry.rotary_bands(hs.load("tiny-llama"))
        >>> bool((found.entropy <= np.log(2) + 1e-6).all())
        True
    """
    options = RunOptions(batch_size, progress=progress)
    if side not in ("key", "query") or rank < 2:
        raise InputError(
            f"side={side!r}, rank={rank}: give 'key' or 'query', and a rank of at least 2."
        )
    if "rotary" in model.limits:
        raise UnsupportedModelError(model.limits["rotary"])
    rotations = {layer: model.parts.rotation(layer) for layer in model.shape.attention_layers}
    counts = {len(rotation.first) for rotation in rotations.values() if rotation.first}
    if len(counts) != 1:
        what = "layers with different rotary planes" if counts else "no rotary positions"
        raise UnsupportedModelError(f"{model.name} has {what}, so its bands cannot be compared.")
    probe = _probe(model, texts, length, skip, least=2)
    shape, planes = model.shape, counts.pop()
    heads = np.full((shape.n_layers, shape.n_heads, len(probe)), np.nan)
    bands = np.full((*heads.shape, planes), np.nan)
    size = np.full(heads.shape, np.nan)
    frequency = np.full((shape.n_layers, planes), np.nan)
    orders = {}
    for layer, rotation in rotations.items():
        if rotation.first:
            speed = rotation.frequency.abs().cpu()
            orders[layer] = speed.argsort(descending=True)
            frequency[layer] = speed[orders[layer]].numpy()

    def measure(number: int, layer: int, x: Float[Tensor, "head pos d_head"]) -> None:
        x = x.repeat_interleave(shape.n_heads // len(x), 0)
        heads[layer, :, number] = _truncated(x.mT @ x, rank).cpu().numpy()
        size[layer, :, number] = x.square().mean((-2, -1)).sqrt().cpu().numpy()
        if layer in orders:
            rotation = rotations[layer]
            pairs = torch.tensor([rotation.first, rotation.second], device=x.device)
            planar = x[..., pairs[:, orders[layer].to(x.device)]].permute(0, 3, 1, 2)
            found = _truncated(planar.mT @ planar, 2)
            bands[layer, :, number] = found.cpu().numpy()

    _each(model, probe, side, skip, options, measure)
    spec = ScoreSpec(
        "truncated_entropy",
        unit="nats",
        bounds=(0.0, float(np.log(rank))),
        description=f"Rotated {side} vectors of a text spread over many directions.",
        source=_DOPE,
    )
    scores = HeadScores.from_examples(
        spec,
        heads,
        kv_heads=shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels),
        provenance=origin(model, probe, side=side, rank=rank, skip=skip),
    )
    return RotaryBands(scores, bands.mean(2), size.mean(2), frequency)


@checked
@own_types()
def high_frequency_gain(
    model: HeadModel,
    texts: str | Path | Sequence[str] | Probe | None = None,
    *,
    length: int | None = 128,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Largest factor by which each head's averaging can preserve differences between tokens.

    With ``C = I - 1 1^T / n``, which subtracts the mean over tokens, the gain is the largest
    singular value of ``C A C``: the largest factor by which the pattern A stretches a signal that
    sums to 0 over tokens. It is 0 if every token gets the same average (a complete low-pass
    filter), 1 if each token attends to itself, and may exceed 1 if many tokens copy from one place.
    The product of gains along a path bounds the remaining differences; if it falls with ``length``,
    representations of long texts collapse.

    Args:
        model: the model.
        texts: texts or a path, as for :func:`headscope.probes.text`, or a probe; None: the bundled
            passages.
        length: cut texts into pieces of this many tokens; compare gains at different lengths.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if a text has fewer than two tokens.

    Source:
        Wang et al. 2022 (arXiv 2203.05962); Zhou et al. 2024, "Length-Induced Embedding Collapse in
        Transformer-based Models" (arXiv 2410.24200), sigma_a.

    Example:
        >>> with model.edited([hs.edits.attend_to_first("L0H0", probe.real)]):
        ...     gain = hs.geometry.high_frequency_gain(model, probe)
        >>> float(gain.mean[0, 0]) < 1e-5
        True
    """
    options = RunOptions(batch_size, progress=progress)
    probe = _probe(model, texts, length, 0, least=2)
    shape = model.shape
    found = np.full((shape.n_layers, shape.n_heads, len(probe)), np.nan)

    def measure(number: int, layer: int, pattern: Float[Tensor, "head query key"]) -> None:
        empty = ~(pattern > 0).flatten(1).any(1)
        rows = pattern - pattern.mean(-1, keepdim=True)
        values = torch.linalg.matrix_norm(rows - rows.mean(-2, keepdim=True), 2)
        found[layer, :, number] = values.masked_fill(empty, torch.nan).cpu().numpy()

    _each(model, probe, "pattern", 0, options, measure)
    spec = ScoreSpec(
        "high_frequency_gain",
        unit="gain",
        bounds=(0.0, None),
        description="The head's averaging preserves the differences between tokens.",
        source="Zhou et al. 2024, arXiv 2410.24200, sigma_a",
    )
    return HeadScores.from_examples(
        spec,
        found,
        kv_heads=shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels),
        provenance=origin(model, probe),
    )


def _truncated(gram: Float[Tensor, "*any dim dim"], rank: int) -> Float[Tensor, "*any"]:
    """Entropy of the largest eigenvalues, normalised to sum to 1; NaN if all are 0."""
    values = torch.linalg.eigvalsh(gram).clamp_min(0)[..., -rank:]
    p = values / values.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy


def _probe(
    model: HeadModel,
    texts: str | Path | Sequence[str] | Probe | None,
    length: int | None,
    skip: int,
    least: int,
) -> Probe:
    """Convert texts to a probe, each with enough tokens after the skipped ones."""
    probe = read_texts(model, texts, length, skip)
    shortest = int(probe.real.sum(1).min()) - skip
    if shortest < least:
        raise InputError(
            f"a text has {max(shortest, 0)} tokens after the first {skip}: give {least} or more."
        )
    return probe


def _each(
    model: HeadModel,
    probe: Probe,
    site: str,
    skip: int,
    options: RunOptions,
    measure: LayerReader,
) -> None:
    """Pass every text's values at one site of every attention layer to a function, in fp64."""
    size = options.per_pass(probe.length, _TOKENS_PER_PASS)
    taps = [Tap(site, layer) for layer in model.shape.attention_layers]
    with options.track(len(probe), "measuring spectra") as advance:
        for start in range(0, len(probe), size):
            part = probe.examples(slice(start, start + size))

            def read(view: TapView, part: Probe = part, start: int = start) -> None:
                value = view.value
                for number, real in enumerate(part.real):
                    at = real.nonzero().squeeze(1)[skip:].to(value.device)
                    own = value[number][:, at]
                    own = own[..., at] if site == "pattern" else own
                    measure(start + number, view.layer, own.to(_precise(own)))

            model.run(part, reads=dict.fromkeys(taps, read), until=taps[-1])
            advance(float(len(part)))


def _precise(value: Tensor) -> torch.dtype:
    return torch.float32 if value.device.type == "mps" else torch.float64
