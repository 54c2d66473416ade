"""Checkpoints of training runs: one atomic file, readable only by the same run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.files import check_same, whole_file, writable_folder
from headscope.errors import HeadscopeError, InputError, whole

_KEY = "headscope"
# Folder (or file) in which an interruptible run keeps its state; None: nothing is kept.
CheckpointPath = str | PathLike[str] | None


class Checkpoint:
    """Saved state of a resumable run: tensors, with the settings that identify the run.

    Args:
        folder: folder of ``checkpoint.safetensors``; None: nothing is saved.
        facts: settings that identify the run, as JSON values; a file with other settings is
            refused.

    Raises:
        InputError: if the folder cannot be written.

    Example:
        >>> import tempfile, torch
        >>> kept = Checkpoint(tempfile.mkdtemp(), {"seed": 0})
        >>> kept.write({"step": torch.tensor(3)})
        >>> int(kept.read()["step"])
        3
    """

    def __init__(self, folder: CheckpointPath, facts: Mapping[str, Any]) -> None:
        """Check that the file can be written, without writing it."""
        self._facts = json.loads(json.dumps(facts, default=str))
        self._file: Path | None = None
        if folder is not None:
            self._file = writable_folder(Path(folder)) / "checkpoint.safetensors"

    def __bool__(self) -> bool:
        """Whether a file is used."""
        return self._file is not None

    def read(self) -> dict[str, Tensor] | None:
        """Read the last state; None if there is no file.

        Raises:
            InputError: if the file is damaged, or belongs to another run.
        """
        from safetensors import SafetensorError, safe_open

        if self._file is None or not self._file.exists():
            return None
        try:
            with safe_open(self._file, framework="pt") as opened:
                facts = json.loads((opened.metadata() or {})[_KEY])
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self._file} is not a checkpoint, or is damaged: give another folder, or delete "
                "it to start over."
            ) from error
        check_same(self._file, facts, self._facts, "training run")
        return found

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the stored state atomically."""
        from safetensors.torch import save

        if self._file is None:
            return
        plain = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
        made = save(plain, metadata={_KEY: json.dumps(self._facts)})
        with whole_file(self._file) as file:
            file.write(made)


def adam_state(adam: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's state for every parameter, by name, in the form of :class:`Checkpoint`.

    Args:
        adam: optimiser with one parameter group.
    """
    return {
        f"adam.{number}.{name}": value
        for number, values in adam.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_adam(adam: torch.optim.Adam, tensors: Mapping[str, Tensor]) -> None:
    """Restore Adam's state from :func:`adam_state`.

    Args:
        adam: optimiser of the same parameters, before its first step.
        tensors: tensors of a checkpoint.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, what = name.split(".")
            state.setdefault(int(number), {})[what] = value
    adam.load_state_dict({**adam.state_dict(), "state": state})


@dataclass(eq=False)
class AdamRun:
    """Resumable Adam steps on some tensors, bit-identical to an uninterrupted run.

    Attributes:
        kept: checkpoint to write to; it may be one that saves nothing.
        parameters: trainable leaf tensors by name; restored from the checkpoint if there is one.
        rate: learning rate of Adam.
        steps: total number of steps.
        every: steps between two writes; the last step is also written.
        draws: random generator whose state is saved; None: no randomness.
        other: further tensors to save, by name, e.g. the order of examples.
        losses: cost of every step, on the parameters' device; NaN for steps not yet taken.

    Raises:
        InputError: if ``every`` is below 1, or the checkpoint has more steps than requested.

    Example:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> run = AdamRun(Checkpoint(None, {}), {"x": x}, rate=0.1, steps=3)
        >>> for step in run:
        ...     x.grad = 2 * (x.detach() - 1)
        ...     run.take((x.detach() - 1) ** 2)
        >>> run.losses[0] > run.losses[2]
        tensor(True)
    """

    kept: Checkpoint
    parameters: Mapping[str, Tensor]
    rate: float
    steps: int
    every: int = 20
    draws: torch.Generator | None = None
    other: dict[str, Tensor] = field(default_factory=dict)
    done: int = field(default=0, init=False)
    losses: Float[Tensor, " step"] = field(init=False)

    def __post_init__(self) -> None:
        """Restore the stored state."""
        whole(self.every, "every", 1)
        leaves = list(self.parameters.values())
        self.adam = torch.optim.Adam(leaves, lr=self.rate)
        self.losses = torch.full((self.steps,), torch.nan, device=leaves[0].device)
        state = self.kept.read()
        if state is None:
            return
        self.done = int(state["step"])
        if self.done > self.steps:
            raise InputError(
                f"steps={self.steps}: the checkpoint has already run {self.done} steps."
            )
        with torch.no_grad():
            for name, one in self.parameters.items():
                one.copy_(state[f"parameter.{name}"])
        restore_adam(self.adam, state)
        if self.draws is not None:
            self.draws.set_state(state["draws"])
        self.other |= {name: state[name] for name in self.other}
        self.losses[: self.done] = state["losses"][: self.done].to(self.losses)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the remaining steps, writing checkpoints when due.

        Raises:
            HeadscopeError: if a cost since the last write is not finite; the last checkpoint is
                kept.
        """
        for step in range(self.done, self.steps):
            yield step
            if self.due:
                self._need_finite()
                self._keep()

    @property
    def due(self) -> bool:
        """Whether the current step ends with a checkpoint."""
        return self.done % self.every == 0 or self.done == self.steps

    def take(self, cost: Tensor) -> None:
        """Take an optimiser step and record its cost."""
        self.adam.step()
        for one in self.parameters.values():
            one.grad = None
        self.losses[self.done] = cost.detach()
        self.done += 1

    def _keep(self) -> None:
        if not self.kept:
            return
        drawn = {} if self.draws is None else {"draws": self.draws.get_state()}
        self.kept.write(
            {f"parameter.{name}": one for name, one in self.parameters.items()}
            | adam_state(self.adam)
            | {"step": torch.tensor(self.done), "losses": self.losses[: self.done]}
            | drawn
            | self.other
        )

    def _need_finite(self) -> None:
        wrong = (~self.losses[: self.done].isfinite()).nonzero()
        if len(wrong):
            raise HeadscopeError(
                f"the cost of step {int(wrong[0]) + 1} is not finite: use a smaller learning rate."
            )
