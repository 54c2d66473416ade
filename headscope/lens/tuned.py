"""The tuned lens: one affine map per layer, fitted so that its reading is the model's own.

At a large vocabulary the final hidden state is distilled first, and few tokens are read.
"""

import time
from os import PathLike

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.options import RunOptions
from headscope.errors import InputError
from headscope.lens.fitting import (
    Data,
    Descent,
    divergence,
    examples_per_pass,
    judge_streams,
    split_data,
    streams,
)
from headscope.lens.linear import ResidualLens
from headscope.lens.reading import logits_of, row_chunks, row_names
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.probe import Probe
from headscope.views.outputs import Readout

# Entries of one block of unembedding vectors: 16 MB in fp32.
_BLOCK_ENTRIES = 1 << 22


@torch.no_grad()
def logit_metric(
    readout: Readout, last: Float[Tensor, "token d_model"]
) -> Float[Tensor, "d_model d_model"]:
    """Metric in which the distance of two hidden states is that of their predictions.

    ``F = sum over v of p(v) (w_v - w)(w_v - w).T`` with ``w_v`` the unembedding of token v, ``w``
    their mean under p, and p the model's mean prediction on some tokens: ``d.T F d / 2`` is the
    divergence of predictions whose hidden states differ by d, to second order, with p in place
    of each token's own prediction (the Fisher information of the softmax, averaged).

    Args:
        readout: of the model.
        last: last residual stream of some tokens.
    """
    p = torch.zeros(len(readout.W_U), device=last.device)
    for chosen in row_chunks(len(last), readout):
        p += logits_of(readout, last[chosen]).softmax(1).sum(0) / len(last)
    width = readout.W_U.shape[1]
    metric = torch.zeros(width, width, device=last.device)
    mean = torch.zeros(width, device=last.device)
    for ids in torch.arange(len(p), device=last.device).split(max(1, _BLOCK_ENTRIES // width)):
        rows = readout.W_U[ids].float()
        metric += (rows * p[ids, None]).T @ rows
        mean += p[ids] @ rows
    return (metric - torch.outer(mean, mean)) * readout.logit_scale**2


def distance(
    readout: Readout,
    metric: Float[Tensor, "d_model d_model"],
    seen: Float[Tensor, "token d_model"],
    last: Float[Tensor, "token d_model"],
) -> Float[Tensor, " token"]:
    """Half the squared distance of two hidden states behind the final norm, in nats.

    Args:
        readout: of the model.
        metric: of :func:`logit_metric`.
        seen: what the lens makes of the residual stream.
        last: last residual stream.
    """
    gap = readout.normed(seen) - readout.normed(last)
    half: Tensor = ((gap @ metric) * gap).sum(1) / 2
    return half


def affordable_tokens(places: int, d_model: int, d_vocab: int) -> int:
    """Tokens whose divergence can be read at every place for about 1.5e11 operations a step.

    Example:
        >>> from headscope.lens.tuned import affordable_tokens
        >>> affordable_tokens(places=30, d_model=576, d_vocab=49152)
        44
    """
    return max(8, int(1.5e11 / (4.0 * places * d_model * d_vocab)))


def step_seconds(read: int, places: int, d_model: int, d_vocab: int) -> float:
    """Seconds that reading takes in one step on this processor, from one timed product.

    Args:
        read: tokens whose divergence is read at every place.
        places: of the lens.
        d_model: width of the model.
        d_vocab: size of its vocabulary.
    """
    square = torch.ones(512, 512)
    square @ square
    start = time.perf_counter()
    square @ square
    rate = 2 * 512**3 / max(time.perf_counter() - start, 1e-9)
    return 4.0 * read * (places + 1) * d_model * d_vocab / rate


# Largest norm of the gradient of one place's map.
_CLIP = 1.0
# d_model up to which a rate of 1e-3 is slow: a step moves x A by the rate times as many terms.
_WIDTH = 768


@own_types()
@torch.enable_grad()
def tuned_lens(
    model: HeadModel,
    probe: Probe | None = None,
    *,
    steps: int = 250,
    learning_rate: int | float | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    tokens: int | None = None,
    checkpoint: "str | PathLike[str] | None" = None,
    progress: bool | None = None,
) -> ResidualLens:
    """Fit ``x + x A + b`` at every place below the last, read by the model's own norm and W_U.

    A and b start at 0, so the fit starts at the plain logit lens; the loss is
    ``KL(model || lens)`` per token, in nats. Adam with a linearly falling rate and gradients
    clipped at 1; the paper uses SGD with Nesterov momentum on 2^18 tokens a step, here a step
    has about 1024 tokens. Same seed, same lens.

    Args:
        model: from :func:`headscope.load`.
        probe: text to fit to; default: the bundled passages, which are few: give more.
        steps: of the optimiser.
        learning_rate: at the start; default: 1e-3, and more where d_model is below 768, in
            inverse proportion, up to 1e-2.
        held_out: share of the examples that the lens is judged by.
        seed: of the draw of examples, and of tokens.
        tokens: how many tokens of a step are read over the whole vocabulary at each place, drawn
            anew for each: their mean loss is an unbiased estimate of the step's, at a share of its
            cost. With fewer than a step has, the first half of the steps brings the hidden state
            behind the final norm near the model's own, for all tokens and without the vocabulary,
            in the metric of its logits (:func:`headscope.lens.tuned.logit_metric`).
            Default: all, or at large vocabularies as many as 1.5e11 operations can read (44 for
            30 layers, d_model 576 and 49k words). The held-out loss reads every held-out token.
        checkpoint: file in which the fit is kept, every 20 seconds, and from which the same call
            goes on after a kill, to the same numbers; default: none.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A lens for :func:`logit_lens`; ``.report`` has the held-out loss beside the plain lens'.

    Raises:
        InputError: if the data does not fit the model, a number is out of range, or the
            checkpoint is of another fit.

    Source: Belrose et al. 2023, arXiv 2303.08112, section 2.

    Example:
        >>> lens = hs.lens.tuned_lens(model, probe, steps=2)
        >>> again = hs.lens.tuned_lens(model, probe, steps=2)
        >>> torch.equal(lens.weight, again.weight)  # same seed, same lens
        True
        >>> hs.lens.logit_lens(model, [5, 9, 5, 9], lens=lens).name
        'tuned lens, residual'
    """
    options = RunOptions(seed=seed, progress=progress)
    if learning_rate is None:
        learning_rate = min(1e-2, max(1e-3, 1e-3 * _WIDTH / model.shape.d_model))
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens must be at least 1; got {tokens}.")
    if steps < 1 or learning_rate <= 0:
        raise InputError(f"steps and learning_rate must be positive; got {steps}, {learning_rate}.")
    data = split_data(model, probe, held_out, seed)
    width, count = model.shape.d_model, model.shape.n_layers
    change = [
        torch.zeros(width, width, dtype=torch.float32, device=model.device) for _ in range(count)
    ]
    shift = [torch.zeros(width, dtype=torch.float32, device=model.device) for _ in range(count)]
    parameters = [one.requires_grad_() for one in (*change, *shift)]
    settings = {"steps": steps, "learning_rate": learning_rate, "seed": seed, **data.facts}
    size = model.shape.d_vocab
    whole = min(len(data.fit), examples_per_pass(data.fit)) * data.fit.length
    read = min(whole, affordable_tokens(count, width, size) if tokens is None else tokens)
    few = read < whole
    if few:
        settings |= {"tokens": read, "distilled_steps": steps // 2}
    metric = logit_metric(model.readout, _some_last(model, data)) if few else None

    def descend(batch: Probe, step: int) -> None:
        rows, last, _ = streams(model, batch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for place in range(count):
            x, maps = rows[place], (change[place], shift[place])
            with torch.enable_grad():
                if metric is not None and step < steps // 2:
                    seen = x + x @ maps[0] + maps[1]
                    distance(model.readout, metric, seen, last).mean().backward()
                elif few:
                    drawn = torch.randperm(len(x), generator=generator)[:read].to(x.device)
                    _descend(model, x[drawn], last[drawn], *maps)
                else:
                    _descend(model, x, last, *maps)
            torch.nn.utils.clip_grad_norm_([change[place], shift[place]], _CLIP)

    facts = {"lens": "tuned", "model": model.digest(), **settings}
    descent = Descent(steps, learning_rate, checkpoint, facts, options)
    seconds = (steps - steps // 2 if few else steps) * step_seconds(read, count, width, size)
    told = f" (reads the vocabulary for about {seconds / 60:.0f} min)" if seconds > 90 else ""
    descent.run(f"tuned lens of {model.name}{told}", data, parameters, descend)
    weight = torch.stack([one.detach() for one in change]) + torch.eye(
        width, dtype=torch.float32, device=model.device
    )
    bias = torch.stack([one.detach() for one in shift])

    def translate(x: Tensor, place: int) -> Tensor:
        return x @ weight[place] + bias[place]

    report = judge_streams(model, data, row_names(count)[:-1], translate)
    return ResidualLens(
        "tuned", weight.cpu(), bias.cpu(), report, model.name, model.digest(), settings
    )


@torch.no_grad()
def _some_last(model: HeadModel, data: Data) -> Tensor:
    """Last residual stream of up to 64 tokens of the fit, spread over its first examples."""
    last = streams(model, data.fit.examples(slice(0, examples_per_pass(data.fit))))[1]
    return last[:: -(-len(last) // 64)]


def _descend(model: HeadModel, x: Tensor, last: Tensor, change: Tensor, shift: Tensor) -> None:
    """Gradient of one place's mean loss, a few tokens at a time."""
    readout = model.readout
    for chosen in row_chunks(len(x), readout):
        with torch.no_grad():
            final = logits_of(readout, last[chosen]).log_softmax(1)
        seen = x[chosen]
        logits = logits_of(readout, seen + seen @ change + shift)
        loss = divergence(final, logits).sum() / len(x)
        loss.backward()
