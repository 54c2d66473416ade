"""Many runs of a batch in one pass, with some taps given."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.edges.written import ENTRIES, EdgeBatch, keeper
from headscope.models.taps import Tap, TapView

Given = Mapping[Tap, Tensor]


def values_with(batch: EdgeBatch, given: Given, reads: Sequence[Tap]) -> dict[Tap, Tensor]:
    """What some taps of a layer hold when others are given.

    Args:
        batch: its texts are run; what is not given is as it would be.
        given: values by tap, ``[run batch *rest]``.
        reads: taps; the pass stops after the last. Queries, keys and values are read together.

    Returns:
        By tap, ``[run batch *rest]``.
    """
    found: dict[Tap, list[Tensor]] = {tap: [] for tap in reads}
    last = reads[-1]
    until = Tap("z", last.layer) if last.site in ENTRIES else last
    for some, count in _stacks(batch, given):
        held: dict[Tap, Tensor] = {}
        batch.study.model.run(
            batch.texts.times(count),
            reads={tap: _reader(held) for tap in reads if tap.site not in ENTRIES},
            writes=_writes(some) | {tap: keeper(held, tap) for tap in reads if tap.site in ENTRIES},
            until=until,
        )
        for tap in reads:
            found[tap].append(held[tap].unflatten(0, (count, -1)).clone())
    return {tap: torch.cat(parts) for tap, parts in found.items()}


def measured_with(batch: EdgeBatch, given: Given) -> Float[Tensor, "run batch"]:
    """The metric of runs with some taps given, ``[run batch *rest]``."""
    parts = []
    for some, count in _stacks(batch, given):
        logits = batch.study.model.run(
            batch.texts.times(count), writes=_writes(some), logits_at=batch.measured.at
        )
        assert logits is not None  # noqa: S101  # they were asked for
        parts.append(batch.measured(logits))
    return torch.cat(parts)


def _stacks(batch: EdgeBatch, given: Given) -> Iterator[tuple[dict[Tap, Tensor], int]]:
    """Runs cut into as many as are stacked at once."""
    runs = len(next(iter(given.values())))
    for start in range(0, runs, batch.room):
        some = {tap: value[start : start + batch.room] for tap, value in given.items()}
        yield some, min(batch.room, runs - start)


def _writes(given: Given) -> dict[Tap, Callable[[Tensor, Any], Tensor]]:
    return {tap: _giver(value) for tap, value in given.items()}


def _giver(value: Float[Tensor, "run batch *rest"]) -> Callable[[Tensor, Any], Tensor]:
    return lambda there, _span: value.flatten(0, 1).to(there)


def _reader(held: dict[Tap, Tensor]) -> Callable[[TapView], None]:
    def read(view: TapView) -> None:
        held[view.tap] = view.value

    return read
