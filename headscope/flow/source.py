"""What a translation comes from: its source or its own prefix, over all layers (ALTI+)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.capture import check_fits, chunks, passes
from headscope.flow.contributions import shares_of, texts_of
from headscope.models.hf.seq2seq import StackView
from headscope.models.hf.sublayers import Sublayer, arounds, need_encoder_decoder, streams, sublayer
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import TapView, at_layers
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import SourceContribution

SOURCE = "Ferrando et al. 2022 (arXiv 2205.11631), ALTI+"
_CHUNK = 1 << 27  # bytes of vectors at once


@own_types()
@torch.no_grad()
def source_contribution(
    model: HeadModel, probe: Probe, *, batch_size: int | None = None
) -> SourceContribution:
    """How much of each target token comes from the source, and how much from the target's prefix.

    In every attention the vector that key j moves to query i is ``T_i(x_j) = sum over heads of
    A_ij v_j W_O``; the residual stream that attention is added to counts as one more: with self-
    attention it joins the query's own key, in cross-attention it stands alone. Where a layer norm
    follows (BART, Marian), each vector goes through it with its scale held at that of this run.
    With ``y_i`` the whole, ``C_ij = max(0, |y_i| - |y_i - T_i(x_j)|)`` in L1 norm, and each row is
    divided by its sum. A decoder layer passes on what cross-attention takes of the source, and of
    its residual what self-attention takes of the prefix. The layers are multiplied, so that a row
    of source and prefix together sums to 1. MLPs act on one position at a time and are left out.

    A translation that comes little from its source is detached from it: the mean of
    :attr:`SourceContribution.share` over a sentence detects hallucinations.

    Args:
        model: an encoder-decoder.
        probe: sources and targets, of :func:`headscope.probes.translation`.
        batch_size: examples per pass.

    Returns:
        ``.source [batch target source]``, ``.prefix [batch target target]``, ``.share``.

    Raises:
        InputError: if the model is not an encoder-decoder, or the probe has no source.
        UnsupportedModelError: if what stands around attention is not a plain norm.

    Source: Ferrando et al. 2022, "Towards Opening the Black Box of Neural Machine Translation:
    Source and Target Interpretations of the Transformer"; hallucinations: Dale et al. 2022 (arXiv
    2212.08597).

    Example:
        >>> model = hs.load("tiny-marian")
        >>> probe = hs.probes.translation(model, ["reverse moon key boat"], ["boat key moon"])
        >>> found = hs.flow.source_contribution(model, probe)
        >>> [round(float(one), 3) for one in (found.source.sum(-1) + found.prefix.sum(-1))[0]]
        [1.0, 1.0, 1.0, 1.0]
    """
    whole = need_encoder_decoder(model)
    views = {name: whole.stack(name) for name in ("encoder", "decoder", "cross")}
    probe.of_source  # noqa: B018  # refuses a probe without one
    check_fits(views["cross"], probe)
    makers = {name: _Maker.of(view) for name, view in views.items()}

    def run(batch: Probe, _halvings: int) -> tuple[Tensor, Tensor]:
        made = {name: maker.shares(batch) for name, maker in makers.items()}
        return _joined(made)

    parts = [found for _, found in passes(views["cross"], probe, run, batch_size=batch_size or 8)]
    source, prefix = (torch.cat([part[side] for part in parts]).cpu() for side in (0, 1))
    real, read = probe.host.real, probe.of_source.host.real
    source = source.masked_fill(~real[:, :, None], 0.0)
    prefix = prefix.masked_fill(~real[:, :, None], 0.0)
    return SourceContribution(
        source.numpy(),
        prefix.numpy(),
        real.numpy(),
        read.numpy(),
        texts_of(views["decoder"], probe),
        texts_of(views["encoder"], probe.of_source),
        origin(views["cross"], probe, reading="source_contribution", source=SOURCE),
    )


def _joined(made: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Layers multiplied: of the encoder, then of decoder and cross-attention together."""
    first = made["encoder"][0]
    encoder = torch.eye(first.shape[1], device=first.device).expand_as(first)
    for shares in made["encoder"]:
        encoder = shares @ encoder
    own = made["decoder"][0]
    prefix = torch.eye(own.shape[1], device=own.device).expand_as(own)
    source = torch.zeros_like(made["cross"][0][..., :-1])
    for self_shares, cross_shares in zip(made["decoder"], made["cross"], strict=True):
        stays = cross_shares[..., -1:]
        source = cross_shares[..., :-1] @ encoder + stays * (self_shares @ source)
        prefix = stays * (self_shares @ prefix)
    return source, prefix


@dataclass(eq=False)
class _Maker:
    """Makes the shares of every layer of one stack."""

    view: StackView
    known: dict[int, Any]
    constants: dict[int, Sublayer]
    kept: dict[int, Tensor] = field(default_factory=dict)
    made: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, view: StackView) -> "_Maker":
        known = arounds(view)
        return cls(view, known, {n: sublayer(view, one, n) for n, one in known.items()})

    def shares(self, batch: Probe) -> list[Float[Tensor, "batch query part"]]:
        """Rows of shares of each layer, in one pass."""
        self.kept, self.made = {}, []
        with streams(self.view, self.kept, self.known):
            self.view.run(
                batch,
                reads=at_layers(self.view.shape, self._read),
                logits_at=torch.empty(0, dtype=torch.long),
            )
        return self.made

    def _read(self, seen: TapView) -> None:
        stream = self.kept.pop(seen.layer)
        crosses = self.view.stack_name == "cross"
        moved = moved_by_head(seen, self.view.output_weights(seen.layer))
        found = []
        per_query = 4 * 2 * moved.shape[2] * moved.shape[3]
        for example in range(len(moved)):
            rows = []
            for at in chunks(torch.arange(seen.n_queries), per_query, _CHUNK):
                vectors = vectors_of(seen, moved[example], at, example)
                rows.append(
                    shares(vectors, stream[example], at, self.constants[seen.layer], crosses)
                )
            found.append(torch.cat(rows))
        self.made.append(torch.stack(found))


def moved_by_head(
    seen: TapView, W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "batch head key d_model"]:
    """``v_j W_O`` of every head and key."""
    values = seen.values().float()
    group = len(W_O) // values.shape[1]
    return torch.matmul(values.repeat_interleave(group, 1), W_O.float())


def vectors_of(
    seen: TapView, moved: Float[Tensor, "head key d_model"], at: Int[Tensor, " query"], example: int
) -> Float[Tensor, "query key d_model"]:
    """``T_i(x_j)`` of some queries of one example, the heads summed."""
    rows = seen.rows(at).pattern[example]
    found = torch.einsum("hqk,hkd->qkd", rows, moved[:, : rows.shape[-1]])
    missing = moved.shape[1] - rows.shape[-1]
    return torch.nn.functional.pad(found, (0, 0, 0, missing))


def shares(
    vectors: Float[Tensor, "query key d_model"],
    stream: Float[Tensor, "pos d_model"],
    at: Int[Tensor, " query"],
    constant: Sublayer,
    crosses: bool,
) -> Float[Tensor, "query part"]:
    """Share of each key in the stream after attention; of cross-attention the residual is last."""
    place = at.to(stream.device)
    own = stream[place]
    if crosses:
        parts = torch.cat([vectors, own[:, None]], 1)
    else:
        parts = vectors.clone()
        parts[torch.arange(len(at), device=place.device), place] += own
    whole = parts.sum(1) + constant.bias
    if constant.gain is not None and constant.offset is not None:
        scale = (whole.var(-1, unbiased=False, keepdim=True) + constant.epsilon).sqrt()
        parts = (parts - parts.mean(-1, keepdim=True)) / scale[:, None] * constant.gain
        whole = (whole - whole.mean(-1, keepdim=True)) / scale * constant.gain + constant.offset
    reach = torch.linalg.vector_norm(whole, 1, -1)
    near = reach[:, None] - torch.linalg.vector_norm(whole[:, None] - parts, 1, -1)
    return shares_of(near, reach)
