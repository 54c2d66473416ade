"""What a model has learned so far: its losses, and how much a long context helps it."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.capture import check_fits
from headscope.models.protocol import HeadModel
from headscope.probes import Probe

UNITS = {
    "loss": "nats",
    "in-context score": "nats",
    "first copy": "nats",
    "second copy": "nats",
}
# Parts of a text whose mean losses the in-context score compares.
_EARLY, _LATE = (0.05, 0.15), (0.9, 1.0)


def token_losses(model: HeadModel, probe: Probe) -> Float[np.ndarray, "example token"]:
    """Cross-entropy of each token given those before it, nats.

    NaN for the first token of an example, at padding, and at the first token after padding.
    """
    check_fits(model, probe, answers=True)
    found = np.full(tuple(probe.tokens.shape), np.nan)
    with torch.no_grad():
        for row in range(len(probe)):  # one at a time: logits are as wide as the vocabulary
            part = probe.examples(slice(row, row + 1))
            logits = model.forward(part.tokens, real=part.real)
            found[row, 1:] = _losses(logits[0].float().cpu(), part)
    return found


def _losses(logits: Float[Tensor, "pos d_vocab"], part: Probe) -> Float[np.ndarray, " next"]:
    real = part.real[0].cpu()
    targets = part.tokens[0].cpu()[1:]
    losses = -logits[:-1].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return losses.where(real[1:] & real[:-1], torch.nan).numpy().astype(np.float64)


def text_curves(
    losses: Float[np.ndarray, "example token"],
) -> dict[str, Float[np.ndarray, " example"]]:
    """Mean loss, and the in-context score: late loss less early loss.

    Early is the mean from 5% to 15% of each text's tokens, late that of its last tenth. Negative
    where the context helps. The source takes the 500th token less the 50th, which is this for
    texts of 500 tokens but for the averaging, which it does over many more texts.

    Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    scores = []
    for row in losses:
        known = row[np.isfinite(row)]
        parts = [
            known[int(start * len(known)) : max(int(end * len(known)), 1)]
            for start, end in (_EARLY, _LATE)
        ]
        enough = len(known) >= 20
        scores.append(parts[1].mean() - parts[0].mean() if enough else np.nan)
    count = np.isfinite(losses).sum(1)
    mean = np.nansum(losses, 1) / np.where(count, count, np.nan)
    return {"loss": mean, "in-context score": np.array(scores)}


def copy_curves(
    losses: Float[np.ndarray, "example token"], half: int
) -> dict[str, Float[np.ndarray, " example"]]:
    """Mean loss on the first and on the second copy of a text said twice.

    The second copy's first token is left out: nothing foretells it.

    Args:
        losses: of every token.
        half: length of a copy; the copies end where the rows end.
    """
    first, second = losses[:, -2 * half : -half], losses[:, -half + 1 :]
    known = np.isfinite(first)
    return {
        "first copy": np.where(known, first, 0.0).sum(1) / known.sum(1),
        "second copy": second.mean(1),
    }
