"""Fitting by gradients, step by step, with a file to go on from after a kill."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.errors import InputError
from headscope.files import check_same, whole_file, writable_folder
from headscope.lens.fitting import Data, batches
from headscope.probes.probe import Probe, probe_digest
from headscope.progress import track

# Seconds between two writes: what a kill may cost.
_EVERY = 20.0
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Descent:
    """Adam with a linearly falling rate.

    Attributes:
        steps: in all.
        learning_rate: at the start.
        seed: of the draw of examples.
        checkpoint: file that the fit is kept in, and goes on from; None: it is not.
        facts: JSON values that say what is fitted to what: a file of other facts is refused.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.
    """

    steps: int
    learning_rate: float
    seed: int
    checkpoint: "str | PathLike[str] | None"
    facts: Mapping[str, Any]
    progress: bool | None

    def run(
        self,
        what: str,
        data: Data,
        parameters: Sequence[Tensor],
        descend: Callable[[Probe, int], None],
    ) -> None:
        """Change the parameters in place; ``descend`` adds the gradients of a batch and step.

        A fit that was kept and goes on gives the same numbers as one that was not stopped.

        Raises:
            InputError: if the checkpoint is of another fit, cannot be read or not be written.
        """
        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate)
        kept = None
        if self.checkpoint is not None:
            place = Path(self.checkpoint)
            writable_folder(place.parent)
            kept = _Kept(place, {**self.facts, "data": probe_digest(data.fit)})
        done = 0 if kept is None else kept.restore(parameters, optimiser)
        with track(self.steps, what, show=self.progress) as advance:
            for step, batch in enumerate(batches(data.fit, self.steps, self.seed)):
                if step >= done:
                    for group in optimiser.param_groups:
                        group["lr"] = self.learning_rate * (1 - step / self.steps)
                    optimiser.zero_grad()
                    descend(batch, step)
                    optimiser.step()
                    if kept is not None:
                        kept.keep(step + 1, parameters, optimiser, last=step + 1 == self.steps)
                advance()


class _Kept:
    """A fit's parameters and the optimiser's moments, in one safetensors file."""

    def __init__(self, file: Path, facts: Mapping[str, Any]) -> None:
        self._file, self._facts = file, json.loads(json.dumps(facts))
        self._written = time.monotonic()

    def keep(
        self, step: int, parameters: Sequence[Tensor], optimiser: torch.optim.Adam, *, last: bool
    ) -> None:
        """Write where the fit stands, if the last time is long enough ago."""
        if not last and time.monotonic() - self._written < _EVERY:
            return
        from safetensors.torch import save

        tensors = {name: one.detach().cpu() for name, one in _named(parameters, optimiser)}
        told = {"step": str(step), "facts": json.dumps(self._facts)}
        with whole_file(self._file) as file:
            file.write(save({name: one.contiguous() for name, one in tensors.items()}, told))
        self._written = time.monotonic()

    def restore(self, parameters: Sequence[Tensor], optimiser: torch.optim.Adam) -> int:
        """Take over what the file holds; steps done, 0 if there is none."""
        from safetensors import SafetensorError, safe_open

        if not self._file.exists():
            return 0
        try:
            with safe_open(self._file, "pt") as file:
                told = file.metadata() or {}
                step, facts = int(told["step"]), dict(json.loads(told["facts"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{self._file} is no checkpoint of a fit: give another name, or delete it."
            ) from error
        check_same(self._file, facts, self._facts, "fit")
        with safe_open(self._file, "pt") as file:
            _fill(parameters, optimiser, step, file.get_tensor)
        return step


def _named(
    parameters: Sequence[Tensor], optimiser: torch.optim.Adam
) -> Iterator[tuple[str, Tensor]]:
    for number, one in enumerate(parameters):
        yield f"value.{number}", one
        for moment in _MOMENTS:
            yield f"{moment}.{number}", optimiser.state[one][moment]


@torch.no_grad()
def _fill(
    parameters: Sequence[Tensor],
    optimiser: torch.optim.Adam,
    step: int,
    read: Callable[[str], Tensor],
) -> None:
    for one in parameters:  # so that the moments are there to be filled
        optimiser.state[one] = {
            "step": torch.tensor(float(step)),
            **{moment: torch.zeros_like(one) for moment in _MOMENTS},
        }
    for name, one in _named(parameters, optimiser):
        one.copy_(read(name))
