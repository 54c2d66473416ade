"""What fitting of all learned lenses shares: data, batches, held-out loss, resumable descent."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope import capture, probes
from headscope.base.files import check_same, whole_file, writable_folder
from headscope.base.options import RunOptions
from headscope.errors import InputError
from headscope.lens.attribution import rows_of
from headscope.lens.learned import FitReport
from headscope.lens.reading import States, logits_of, row_chunks
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe, probe_digest

# Tokens of one pass unless the caller says otherwise: their streams of all layers are kept.
_TOKENS = 1024
_LENGTH = 128


@dataclass(frozen=True, eq=False)
class Data:
    """Examples to fit to, and examples to judge by."""

    fit: Probe
    held_out: Probe

    @property
    def facts(self) -> dict[str, object]:
        """What the data is, as JSON values."""
        return {
            "probe": self.fit.name,
            **self.fit.settings,
            "examples": len(self.fit),
            "held_out": len(self.held_out),
        }


def split_data(model: HeadModel, probe: Probe | None, held_out: float, seed: int) -> Data:
    """Draw the examples that are held out.

    Args:
        model: that reads them.
        probe: default: the bundled passages, in pieces of at most 128 tokens.
        held_out: share of the examples.
        seed: of the draw.

    Raises:
        InputError: if there are fewer than two examples, or they do not fit the model.
    """
    if not 0 < held_out < 1:
        raise InputError(f"held_out is a share of the examples between 0 and 1; got {held_out}.")
    if probe is None:
        length = min(_LENGTH, model.shape.n_ctx or _LENGTH)
        probe = probes.text(model, length=length, seed=seed)
    capture.check_fits(model, probe, answers=True)
    if len(probe) < 2:
        raise InputError("one example cannot both be fitted to and held out: give at least two.")
    count = min(len(probe) - 1, max(1, round(held_out * len(probe))))
    order = torch.randperm(len(probe), generator=torch.Generator().manual_seed(seed))
    return Data(pick(probe, order[count:]), pick(probe, order[:count]))


def pick(probe: Probe, chosen: Int[Tensor, " example"]) -> Probe:
    """Some examples of a probe, tokens alone: enough for every lens."""
    chosen = chosen.sort().values
    picked = probes.from_tokens(probe.tokens[chosen], probe.real[chosen])
    return Probe(
        tokens=picked.tokens,
        real=picked.real,
        structure=picked.structure,
        targets=picked.targets,
        name=probe.name,
        seed=probe.seed,
        settings=probe.settings,
    )


def examples_per_pass(probe: Probe) -> int:
    """How many examples make about 1024 tokens."""
    return max(1, _TOKENS // probe.length)


def batches(probe: Probe, steps: int, seed: int) -> Iterator[Probe]:
    """Random examples for every step: each is seen once before any is seen again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(examples_per_pass(probe), len(probe))
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(probe), generator=generator)])
        yield pick(probe, order[:size])
        order = order[size:]


def in_turn(probe: Probe) -> Iterator[Probe]:
    """Every example once."""
    size = examples_per_pass(probe)
    return (probe.examples(slice(at, at + size)) for at in range(0, len(probe), size))


@torch.no_grad()
def streams(
    model: HeadModel, batch: Probe
) -> tuple[Float[Tensor, "row token d_model"], Float[Tensor, "token d_model"], Tensor]:
    """Residual streams of all places below the last, the last one, and each token's example."""
    example, position = (one.to(model.device) for one in rows_of(batch.real))
    states = States(example, position)
    model.run(batch, reads=states.reads(model.shape), logits_at=torch.empty(0, dtype=torch.long))
    rows = torch.stack(list(states.rows["residual"].values())[:-1])
    return rows, states.final, example


def divergence(
    final: Float[Tensor, "token d_vocab"], logits: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """``KL(model || lens)`` per token, of the model's log-probabilities and the lens' logits."""
    kl: Tensor = (final.exp() * (final - logits.log_softmax(1))).sum(1)
    return kl


@dataclass
class Judge:
    """Adds up held-out losses of a learned and a plain lens.

    Attributes:
        rows: places.
        sums: of losses ``[2 row example]``, learned first.
        agreed: number of tokens with the model's own most likely token ``[2 row]``.
        counts: tokens of each example.
    """

    rows: tuple[str, ...]
    sums: Float[np.ndarray, "2 row example"]
    agreed: Float[np.ndarray, "2 row"]
    counts: Int[np.ndarray, " example"]

    @classmethod
    def of(cls, rows: tuple[str, ...], probe: Probe) -> "Judge":
        """Start with nothing."""
        return cls(
            rows,
            np.zeros((2, len(rows), len(probe))),
            np.zeros((2, len(rows))),
            probe.real.sum(1).numpy(),
        )

    def add(
        self,
        lens: int,
        place: int,
        final: Float[Tensor, "token d_vocab"],
        logits: Float[Tensor, "token d_vocab"],
        example: Int[Tensor, " token"],
    ) -> None:
        """Count some tokens of one place."""
        loss = divergence(final, logits).clamp_min(0).cpu().double().numpy()
        np.add.at(self.sums[lens, place], example.cpu().numpy(), loss)
        self.agreed[lens, place] += int((final.argmax(1) == logits.argmax(1)).sum())

    def report(self, fitted: int) -> FitReport:
        """Means over tokens."""
        learned, plain = self.sums / self.counts
        total = int(self.counts.sum())
        return FitReport(self.rows, learned, plain, self.agreed / total, total, fitted)


@torch.no_grad()
def judge_streams(
    model: HeadModel,
    data: Data,
    rows: tuple[str, ...],
    translate: Callable[[Tensor, int], Tensor],
) -> FitReport:
    """Held-out loss of a lens on the residual stream, and of the plain logit lens."""
    judge = Judge.of(rows, data.held_out)
    readout, done = model.readout, 0
    for batch in in_turn(data.held_out):
        streams_, last, example = streams(model, batch)
        for chosen in row_chunks(len(last), readout):
            final = logits_of(readout, last[chosen]).log_softmax(1)
            for place in range(len(rows)):
                x = streams_[place, chosen]
                for lens, seen in enumerate((translate(x, place), x)):
                    logits = logits_of(readout, seen)
                    judge.add(lens, place, final, logits, example[chosen] + done)
        done += len(batch)
    return judge.report(int(data.fit.real.sum()))


# Seconds between two writes: what a kill may cost.
_EVERY = 20.0
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Descent:
    """Adam with a linearly falling rate.

    Attributes:
        steps: in all.
        learning_rate: at the start.
        checkpoint: file that the fit is kept in, and goes on from; None: it is not.
        facts: JSON values that say what is fitted to what: a file of other facts is refused.
        options: how it is run; its seed draws the examples.
    """

    steps: int
    learning_rate: float
    checkpoint: "str | PathLike[str] | None"
    facts: Mapping[str, Any]
    options: RunOptions

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
        with self.options.track(self.steps, what) as advance:
            for step, batch in enumerate(batches(data.fit, self.steps, self.options.seed)):
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
                f"{self._file} is not a checkpoint of a fit: give another name, or delete it."
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
