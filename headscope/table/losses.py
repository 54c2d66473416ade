"""Loss of every token by its place in the text, of a model and of variants of it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from headscope.base.glance import Glance, Shown, number, sizes
from headscope.base.saved import Saved
from headscope.base.statistics import mean_and_sem
from headscope.errors import InputError


@dataclass(frozen=True, eq=False, repr=False)
class TokenLosses(Saved, Shown):
    """Cross-entropy of each token given those before, nats.

    Attributes:
        arms: names; the first is the whole model.
        losses: NaN for a text's first token and beyond its end.
        model: its name.
    """

    arms: tuple[str, ...]
    losses: Float[np.ndarray, "arm example token"]
    model: str = ""

    def glance(self) -> Glance:
        """Mean loss of each arm."""
        return Glance(
            "loss by token",
            [sizes(("arm", "text", "token"), self.losses.shape), "nats", self.model],
            ("arm", "mean loss"),
            [
                (name, number(float(np.nanmean(one))) if np.isfinite(one).any() else "-")
                for name, one in zip(self.arms, self.losses, strict=True)
            ],
            hint="hs.plots.token_losses(losses), losses.score(early=50, late=500)",
        )

    @property
    def mean(self) -> Float[np.ndarray, "arm token"]:
        """Mean over texts; NaN where there is none."""
        return mean_and_sem(self.losses.swapaxes(1, 2)).mean

    @property
    def sem(self) -> Float[np.ndarray, "arm token"]:
        """Standard error of the mean."""
        return mean_and_sem(self.losses.swapaxes(1, 2)).sem

    def score(self, early: int = 50, late: int = 500) -> Float[np.ndarray, "arm example"]:
        """In-context-learning score: loss of a late token less that of an early one.

        Raises:
            InputError: if the texts do not reach that far.
        """
        most = self.losses.shape[2] - 1
        if not 1 <= early < late <= most:
            raise InputError(f"early={early}, late={late}: tokens 1 to {most} have a loss.")
        return np.asarray(self.losses[..., late] - self.losses[..., early])
