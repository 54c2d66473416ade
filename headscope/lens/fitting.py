"""Fitting of learned lenses: data split, optimiser, held-out evaluation, files.

All learned lenses share the data split, batches, held-out loss and a resumable optimiser.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture, probes
from headscope.base.configs import Strict, parse
from headscope.base.files import check_same, read_only, whole_file, writable_folder
from headscope.base.options import RunOptions
from headscope.base.result import Glance, Shown, number
from headscope.base.statistics import mean_and_sem
from headscope.errors import InputError
from headscope.lens.attribution import row_positions
from headscope.lens.reading import States, logits_of, row_chunks
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe, probe_digest

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class FitReport(Shown):
    """Held-out losses of a learned and of the plain lens, per place and example.

    Attributes:
        rows: places that the lens reads.
        learned: ``KL(model || learned lens)`` in nats, mean over an example's tokens.
        plain: the same for the plain lens.
        agreement: share of tokens whose most likely token equals the model's, learned and plain.
        tokens: number of held-out tokens.
        fitted: number of tokens that the lens was fitted to.

    Example:
        >>> report = hs.lens.tuned_lens(model, probe, steps=1).report
        >>> report.rows[0], report.gain.shape == (model.shape.n_layers,)
        ('embedding', True)
    """

    rows: tuple[str, ...]
    learned: Float[np.ndarray, "row example"]
    plain: Float[np.ndarray, "row example"]
    agreement: Float[np.ndarray, "2 row"]
    tokens: int
    fitted: int

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        for name in ("learned", "plain", "agreement"):
            object.__setattr__(self, name, read_only(getattr(self, name), np.float64))

    @property
    def gain(self) -> Float[np.ndarray, " row"]:
        """Nats per token that the learned lens gains over the plain one, mean over examples."""
        return np.asarray((self.plain - self.learned).mean(1))

    @property
    def better(self) -> Bool[np.ndarray, " row"]:
        """Mask of places where the held-out loss is lower than that of the plain lens."""
        return np.asarray(self.gain > 0)

    def glance(self) -> Glance:
        """Show the losses of every place, in nats."""
        every = zip(
            self.rows,
            self.learned.mean(1),
            self.plain.mean(1),
            self.gain,
            *self.agreement,
            strict=True,
        )
        return Glance(
            "held-out loss",
            [str(self)],
            ("place", "learned", "plain", "gain", "agreement", "of the plain lens"),
            [(name, *(number(float(one)) for one in values)) for name, *values in every],
            hint="report.to_pandas()",
        )

    def __str__(self) -> str:
        """Say in one line whether the learned lens beats the plain one."""
        learned, plain = float(self.learned.mean()), float(self.plain.mean())
        where = f"better at {int(self.better.sum())} of {len(self.rows)} places"
        text = f"held-out KL {learned:.3g} nats, plain lens {plain:.3g}, {where}"
        return text if learned < plain else f"NO BETTER than the plain lens: {text}"

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per place: both losses, the gain with its standard error, agreement."""
        import pandas

        return pandas.DataFrame(
            {
                "row": self.rows,
                "learned_kl": self.learned.mean(1),
                "plain_kl": self.plain.mean(1),
                "saved": self.gain,
                "saved_sem": mean_and_sem(self.plain - self.learned).sem,
                "learned_agreement": self.agreement[0],
                "plain_agreement": self.agreement[1],
                "better": self.better,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "rows": list(self.rows),
            "learned": self.learned.tolist(),
            "plain": self.plain.tolist(),
            "agreement": self.agreement.tolist(),
            "tokens": self.tokens,
            "fitted": self.fitted,
        }

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "FitReport":
        """Rebuild a report from the output of :meth:`to_json`."""
        arrays = {
            name: np.array(facts[name], dtype=float) for name in ("learned", "plain", "agreement")
        }
        return cls(
            rows=tuple(str(one) for one in facts["rows"]),
            tokens=int(facts["tokens"]),
            fitted=int(facts["fitted"]),
            **arrays,
        )


_WEIGHTS, _CONFIG = "lens.safetensors", "config.json"
_MOST = 2**24  # maximum bytes of a config


class LensConfig(Strict):
    """Content of a lens's ``config.json``."""

    kind: str
    model: str
    digest: str
    settings: dict[str, Any]
    report: dict[str, Any]
    format: int = 1


def save_lens(
    folder: "str | PathLike[str]", tensors: Mapping[str, Tensor], facts: LensConfig
) -> None:
    """Write weights, then the config, so that a folder with a config is complete."""
    from safetensors.torch import save

    place = writable_folder(Path(folder))
    (place / _CONFIG).unlink(missing_ok=True)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(place / _WEIGHTS) as file:
        file.write(save(plain))
    with whole_file(place / _CONFIG) as file:
        file.write(json.dumps(facts.model_dump(), indent=2, allow_nan=False).encode() + b"\n")


def load_lens(folder: "str | PathLike[str]") -> tuple[dict[str, Tensor], LensConfig]:
    """Load a lens saved by :func:`save_lens`.

    Raises:
        InputError: if it is missing, incomplete or inconsistent.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    place = Path(folder)
    try:
        if (place / _CONFIG).stat().st_size > _MOST:
            raise InputError(f"{place / _CONFIG} is too large for a lens config.")
        facts = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = load((place / _WEIGHTS).read_bytes())
    except OSError as error:
        raise InputError(
            f"{folder} holds no saved lens ({_CONFIG} and {_WEIGHTS}): {error.strerror}."
        ) from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"the lens in {folder} cannot be read: {error}.") from error
    if not isinstance(facts, dict):
        raise InputError(f"{place / _CONFIG} does not hold a lens.")
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} of the lens in {folder} is not finite.")
    return tensors, parse(LensConfig, facts, str(place / _CONFIG))


# Default tokens per pass, whose streams of all layers are kept.
_TOKENS = 1024
_LENGTH = 128


@dataclass(frozen=True, eq=False)
class Data:
    """Examples to fit to, and held-out examples."""

    fit: Probe
    held_out: Probe

    @property
    def facts(self) -> dict[str, object]:
        """Description of the data, as JSON values."""
        return {
            "probe": self.fit.name,
            **self.fit.settings,
            "examples": len(self.fit),
            "held_out": len(self.held_out),
        }


def split_data(model: HeadModel, probe: Probe | None, held_out: float, seed: int) -> Data:
    """Split a probe into examples to fit to and held-out ones.

    Args:
        model: the model that reads them.
        probe: default: the bundled passages, in pieces of at most 128 tokens.
        held_out: share of the examples.
        seed: seed of the draw.

    Raises:
        InputError: if there are fewer than two examples, or they do not fit the model.
    """
    if not 0 < held_out < 1:
        raise InputError(f"held_out={held_out}: give a share of the examples between 0 and 1.")
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
    """Select examples of a probe, with tokens only."""
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
    """Number of examples with about 1024 tokens in total."""
    return max(1, _TOKENS // probe.length)


def random_batches(probe: Probe, steps: int, seed: int) -> Iterator[Probe]:
    """Draw random examples for every step, using each once before any is repeated."""
    generator = torch.Generator().manual_seed(seed)
    size = min(examples_per_pass(probe), len(probe))
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(probe), generator=generator)])
        yield pick(probe, order[:size])
        order = order[size:]


def in_turn(probe: Probe) -> Iterator[Probe]:
    """Yield every example once."""
    size = examples_per_pass(probe)
    return (probe.examples(slice(at, at + size)) for at in range(0, len(probe), size))


@torch.no_grad()
def streams(
    model: HeadModel, batch: Probe
) -> tuple[Float[Tensor, "row token d_model"], Float[Tensor, "token d_model"], Tensor]:
    """Residual streams of all places below the last, the last one, and each token's example."""
    example, position = (one.to(model.device) for one in row_positions(batch.real))
    states = States(example, position)
    model.run(batch, reads=states.reads(model.shape), logits_at=torch.empty(0, dtype=torch.long))
    rows = torch.stack(list(states.rows["residual"].values())[:-1])
    return rows, states.final, example


def divergence_of_lens(
    final: Float[Tensor, "token d_vocab"], logits: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """``KL(model || lens)`` per token, of the model's log-probabilities and the lens' logits."""
    kl: Tensor = (final.exp() * (final - logits.log_softmax(1))).sum(1)
    return kl


@dataclass
class Judge:
    """Accumulates held-out losses of a learned and a plain lens.

    Attributes:
        rows: places.
        sums: sums of losses ``[2 row example]``, learned first.
        agreed: number of tokens with the model's own most likely token ``[2 row]``.
        counts: tokens of each example.
    """

    rows: tuple[str, ...]
    sums: Float[np.ndarray, "2 row example"]
    agreed: Float[np.ndarray, "2 row"]
    counts: Int[np.ndarray, " example"]

    @classmethod
    def of(cls, rows: tuple[str, ...], probe: Probe) -> "Judge":
        """Start with zero sums."""
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
        """Add some tokens of one place."""
        loss = divergence_of_lens(final, logits).clamp_min(0).cpu().double().numpy()
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
    unembedding, done = model.unembedding, 0
    for batch in in_turn(data.held_out):
        streams_, last, example = streams(model, batch)
        for chosen in row_chunks(len(last), unembedding):
            final = logits_of(unembedding, last[chosen]).log_softmax(1)
            for place in range(len(rows)):
                x = streams_[place, chosen]
                for lens, seen in enumerate((translate(x, place), x)):
                    logits = logits_of(unembedding, seen)
                    judge.add(lens, place, final, logits, example[chosen] + done)
        done += len(batch)
    return judge.report(int(data.fit.real.sum()))


# Seconds between two writes of a checkpoint.
_EVERY = 20.0
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Descent:
    """Adam with a linearly falling learning rate.

    Attributes:
        steps: total number of steps.
        learning_rate: initial rate.
        checkpoint: file that stores the fit and from which it resumes; None: none.
        facts: JSON values that identify the fit: a file with other facts is refused.
        options: seed of the draw of examples, and progress.
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
        """Optimise the parameters in place; ``descend`` adds the gradients of a batch and step.

        A resumed fit gives the same numbers as an uninterrupted one.

        Raises:
            InputError: if the checkpoint belongs to another fit, or cannot be read or written.
        """
        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate)
        kept = None
        if self.checkpoint is not None:
            place = Path(self.checkpoint)
            writable_folder(place.parent)
            kept = _Kept(place, {**self.facts, "data": probe_digest(data.fit)})
        done = 0 if kept is None else kept.restore(parameters, optimiser)
        with self.options.track(self.steps, what) as advance:
            for step, batch in enumerate(random_batches(data.fit, self.steps, self.options.seed)):
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
    """Checkpoint of parameters and optimiser moments, in one safetensors file."""

    def __init__(self, file: Path, facts: Mapping[str, Any]) -> None:
        self._file, self._facts = file, json.loads(json.dumps(facts))
        self._written = time.monotonic()

    def keep(
        self, step: int, parameters: Sequence[Tensor], optimiser: torch.optim.Adam, *, last: bool
    ) -> None:
        """Write the state, unless the last write was too recent."""
        if not last and time.monotonic() - self._written < _EVERY:
            return
        from safetensors.torch import save

        tensors = {name: one.detach().cpu() for name, one in _named(parameters, optimiser)}
        told = {"step": str(step), "facts": json.dumps(self._facts)}
        with whole_file(self._file) as file:
            file.write(save({name: one.contiguous() for name, one in tensors.items()}, told))
        self._written = time.monotonic()

    def restore(self, parameters: Sequence[Tensor], optimiser: torch.optim.Adam) -> int:
        """Restore the state from the file; returns the finished steps, 0 if there is none."""
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
    for place, one in enumerate(parameters):
        yield f"value.{place}", one
        for moment in _MOMENTS:
            yield f"{moment}.{place}", optimiser.state[one][moment]


@torch.no_grad()
def _fill(
    parameters: Sequence[Tensor],
    optimiser: torch.optim.Adam,
    step: int,
    read: Callable[[str], Tensor],
) -> None:
    for one in parameters:  # allocate the moments before restoring them
        optimiser.state[one] = {
            "step": torch.tensor(float(step)),
            **{moment: torch.zeros_like(one) for moment in _MOMENTS},
        }
    for name, one in _named(parameters, optimiser):
        one.copy_(read(name))
