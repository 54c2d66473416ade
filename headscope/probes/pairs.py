"""Clean and corrupt prompts with one-token answers, by the name of the task."""

from collections.abc import Callable

from headscope.errors import InputError, nearest
from headscope.probes.ioi import ioi
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import HasVocabulary

_TASKS: dict[str, Callable[..., Probe]] = {"ioi": ioi}


def pairs(
    model: HasVocabulary,
    task: str = "ioi",
    batch: int = 32,
    seed: int = 0,
    **options: bool | str | None,
) -> Probe:
    """Paired prompts of a known task: ``probe`` is the clean batch, ``probe.corrupt`` the other.

    Args:
        model: whose tokenizer reads the prompts.
        task: ``"ioi"`` (:func:`headscope.probes.ioi.ioi`).
        batch: examples.
        seed: the same seed gives the same prompts.
        options: of the task, e.g. ``corrupt="third"``.

    Raises:
        InputError: if the task is unknown or the tokenizer cannot do it.

    Example:
        >>> probe = hs.probes.pairs(model, "ioi", batch=4)
        >>> probe.corrupt.tokens.shape == probe.tokens.shape
        True
    """
    if task not in _TASKS:
        raise InputError(nearest(task, _TASKS, kind="task"))
    return _TASKS[task](model, batch, seed, **options)
