"""Runs of a probe in batches that fit: equally long prompts together, smaller where memory ends."""

from collections.abc import Callable, Iterator

import torch

from headscope.errors import HeadscopeError, InputError
from headscope.memory import free_cached_memory, is_out_of_memory
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.progress import track
from headscope.retrieval.runs import Form, Run, Runs

_TOKENS_PER_PASS = 8192


def each_run(
    model: HeadModel,
    probe: Probe,
    run: Callable[[list[int]], list[Run]],
    *,
    form: Form,
    threshold: int | float,
    batch_size: int | None,
    progress: bool | None,
) -> Runs:
    """Run examples, those with equally long prompts together; out of memory, half of them.

    Args:
        model: that runs, for the bar.
        probe: with the mark ``end``.
        run: gives the runs of these examples.
        form: that ``run`` is of.
        threshold: recall above which a run counts.
        batch_size: examples at a time; default: about 8192 tokens.
        progress: show a bar.

    Raises:
        HeadscopeError: if one example does not fit in memory.
    """
    done: dict[int, Run] = {}
    with track(len(probe), f"{model.name} answers", show=progress) as advance:
        for rows in _batches(probe, batch_size):
            waiting = [rows]
            while waiting:
                part = waiting.pop()
                full = False
                try:
                    done |= zip(part, run(part), strict=True)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    full = True
                if full:
                    free_cached_memory()
                    waiting += _halves(part)
                else:
                    advance(len(part))
    unknown = torch.full((len(probe),), torch.nan)
    facts = [probe.facts.get(name, unknown).double().numpy() for name in ("length", "depth")]
    runs = tuple(done[row] for row in range(len(probe)))
    chat = probe.settings.get("chat")
    return Runs(
        runs, facts[0], facts[1], float(threshold), form, None if chat is None else bool(chat)
    )


def need_marks(probe: Probe, *names: str) -> None:
    """Check that every example has tokens with each of these marks.

    Raises:
        InputError: if one has none.
    """
    for name in names:
        without = (~probe.mark(name).any(1)).nonzero().flatten().tolist()
        if without:
            raise InputError(
                f"example {without[0]} has no token marked {name!r}: make the probe by "
                "probes.needle, or mark them as it does."
            )


def _batches(probe: Probe, batch_size: int | None) -> Iterator[list[int]]:
    """Examples whose prompts are equally long, so that none is padded."""
    lengths = probe.mark("end").int().argmax(1) - probe.first + 1
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        size = batch_size or max(1, _TOKENS_PER_PASS // length)
        yield from (part.tolist() for part in rows.split(size))


def _halves(rows: list[int]) -> list[list[int]]:
    if len(rows) == 1:
        raise HeadscopeError(
            "one example does not fit in memory: use shorter texts or a device with more memory."
        )
    return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
