"""Fitting the Attention Lens."""

from collections.abc import Sequence
from os import PathLike

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import InputError
from headscope.lens.attention import AttentionLens, correction, layer_logits
from headscope.lens.descent import Descent
from headscope.lens.fitting import Data, Judge, divergence, in_turn, split_data
from headscope.lens.outputs import head_streams
from headscope.lens.reading import constants, logits_of, row_chunks
from headscope.lens.report import FitReport
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe


def attention_lens(
    model: HeadModel,
    probe: Probe | None = None,
    layers: Sequence[int] | None = None,
    *,
    rank: int | None = 8,
    steps: int = 250,
    learning_rate: float = 1e-3,
    held_out: float = 0.2,
    seed: int = 0,
    checkpoint: "str | PathLike[str] | None" = None,
    progress: bool | None = None,
) -> AttentionLens:
    """Fit a map from every head's output to the vocabulary, so that a layer says what follows.

    The loss of a layer is ``KL(model || sum over its heads)`` per token, in nats, by Adam, as in
    the paper. Unlike there: every token counts, not the last one; the fit starts from the direct
    path with the scales of this run instead of a bare W_U, and adds the readout's bias once and
    not per head; and the learned part of a head has a small rank, as a full map from d_model
    takes ``heads * d_model * vocabulary`` numbers a layer (463 million in GPT-2 small, 5 million
    at rank 8). While fitting, 16 bytes are needed for each.

    Args:
        model: from :func:`headscope.load`.
        probe: text to fit to; default: the bundled passages, which are few: give more.
        layers: default: all with attention.
        rank: of each head's learned part; None: all of the head's d_head dimensions.
        steps: of the optimiser.
        learning_rate: at the start; it falls linearly.
        held_out: share of the examples that the lens is judged by.
        seed: of the draw of examples and of the start.
        checkpoint: file in which the fit is kept, every 20 seconds, and from which the same call
            goes on after a kill, to the same numbers; default: none.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the data does not fit the model, a number is out of range, or the
            checkpoint is of another fit.

    Source: Sakarvadia et al. 2023, "Attention Lens", arXiv 2310.16270.

    Example:
        >>> lens = hs.lens.attention_lens(model, probe, layers=[0], rank=2, steps=1)
        >>> lens.inner.shape == (1, model.shape.n_heads, model.shape.d_head, 2)
        True
        >>> lens.report.rows
        ('L0',)
    """
    if steps < 1 or learning_rate <= 0 or (rank is not None and rank < 1):
        raise InputError(
            f"steps, learning_rate and rank must be positive; got {steps}, {learning_rate}, {rank}."
        )
    chosen = tuple(model.shape.attention_layers if layers is None else layers)
    for layer in chosen:
        if layer not in model.shape.attention_layers:
            raise InputError(f"{model.name} has no attention in layer {layer}.")
    if not chosen:
        raise InputError("no layers given: name at least one, or leave them out for all.")
    data = split_data(model, probe, held_out, seed)
    inner, outer, shift = _start(model, len(chosen), rank, seed)
    learned = [outer, shift] if rank is None else [inner, outer, shift]
    parameters = [one.requires_grad_() for one in learned]
    biases = constants(model.readout)
    settings = {
        "rank": rank,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
        **data.facts,
    }
    facts = {"lens": "attention", "model": model.digest(), "layers": chosen, **settings}
    Descent(steps, learning_rate, seed, checkpoint, facts, progress).run(
        f"attention lens of {model.name}",
        data,
        parameters,
        lambda batch, _step: _descend(model, batch, chosen, (inner, outer, shift), biases),
    )
    lens = AttentionLens(
        layers=chosen,
        inner=inner.detach().cpu(),
        outer=outer.detach().cpu(),
        shift=shift.detach().cpu(),
        report=None,
        model=model.name,
        digest=model.digest(),
        settings=settings,
    )
    return lens.judged(judge(model, data, lens))


def _start(
    model: HeadModel, layers: int, rank: int | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors whose product is 0; with all dimensions the inner one is the identity and stays."""
    shape, device = model.shape, model.device
    size = shape.d_head if rank is None else min(rank, shape.d_head)
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(
        layers, shape.n_heads, shape.d_head, size, generator=generator, dtype=torch.float32
    )
    inner = inner / shape.d_head**0.5
    if rank is None:
        inner = torch.eye(size, dtype=torch.float32).expand_as(inner).clone()
    outer = torch.zeros(
        layers, shape.n_heads, size, shape.d_vocab, dtype=torch.float32, device=device
    )
    return inner.to(device), outer, torch.zeros(layers, shape.d_vocab, device=device)


def _descend(
    model: HeadModel,
    batch: Probe,
    layers: tuple[int, ...],
    parts: tuple[Tensor, Tensor, Tensor],
    biases: Float[Tensor, " d_vocab"],
) -> None:
    """Gradient of every layer's mean loss on a batch, a few tokens at a time."""
    seen, readout = head_streams(model, batch, layers), model.readout
    for chosen in row_chunks(len(seen.final), readout):
        with torch.no_grad():
            final = logits_of(readout, seen.final[chosen]).log_softmax(1)
        for place, layer in enumerate(layers):
            z = seen.z[layer][chosen]
            with torch.no_grad():
                plain = layer_logits(model, layer, z, biases)
            with torch.enable_grad():
                change = correction(z, *(one[place] for one in parts))
                loss = divergence(final, readout.capped(plain + change)).sum()
                (loss / len(seen.final)).backward()


@torch.no_grad()
def judge(model: HeadModel, data: Data, lens: AttentionLens) -> FitReport:
    """Held-out loss of a lens, and of the direct path without it."""
    found = Judge.of(tuple(f"L{layer}" for layer in lens.layers), data.held_out)
    readout, biases, done = model.readout, constants(model.readout), 0
    for batch in in_turn(data.held_out):
        seen = head_streams(model, batch, lens.layers)
        for chosen in row_chunks(len(seen.final), readout):
            final = logits_of(readout, seen.final[chosen]).log_softmax(1)
            for place, layer in enumerate(lens.layers):
                z = seen.z[layer][chosen]
                plain = layer_logits(model, layer, z, biases)
                parts = (one[place].to(z.device) for one in (lens.inner, lens.outer, lens.shift))
                change = correction(z, *parts)
                for which, logits in enumerate((plain + change, plain)):
                    example = seen.example[chosen] + done
                    found.add(which, place, final, readout.capped(logits), example)
        done += len(batch)
    return found.report(int(data.fit.real.sum()))
