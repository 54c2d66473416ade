"""What fitting of all learned lenses shares: data, batches, held-out loss."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope import capture, probes
from headscope.errors import InputError
from headscope.lens.reading import logits_of, row_chunks
from headscope.lens.report import FitReport
from headscope.lens.splitting import rows_of
from headscope.lens.states import States
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe

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
    with model.parts.blocks_shown(states):
        model.forward(
            batch.tokens,
            real=batch.real,
            observers=[states],
            logits_at=torch.empty(0, dtype=torch.long),
        )
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
