"""A tuned lens at a large vocabulary: distil the final hidden state, then read few tokens."""

import time

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.lens.reading import logits_of, row_chunks
from headscope.outputs import Readout

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
        >>> from headscope.lens.distilled import affordable_tokens
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
