"""Options of a run are checked once, wherever they enter, before anything is run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import headscope as hs
from headscope.base.options import RunOptions
from headscope.errors import InputError
from tests.ablation.helpers import model_of

BAD: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "batch_size=0: give 1 or more"),
    ({"batch_size": -1}, "batch_size=-1: give 1 or more"),
    ({"batch_size": 2.0}, "batch_size=2.0 is not a number of examples"),
    ({"batch_size": True}, "batch_size=True is not a number of examples"),
    ({"memory": "much"}, "'much' is not an amount of memory"),
    ({"memory": 0}, "more than nothing"),
    ({"seed": -1}, "seed=-1 is not a seed"),
    ({"seed": None}, "seed=None is not a seed"),
    ({"seed": 1.5}, "seed=1.5 is not a seed"),
    ({"progress": "no"}, "progress='no': give True, False or None"),
]


def unchecked(**given: Any) -> RunOptions:
    """Options of any types, which tests would refuse by their annotations."""
    made = object.__new__(RunOptions)
    for name in ("batch_size", "memory", "seed", "progress"):
        object.__setattr__(made, name, given.get(name, getattr(RunOptions, name)))
    made.__post_init__()
    return made


@pytest.mark.parametrize(("given", "said"), BAD, ids=str)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        unchecked(**given)


def test_options_say_what_a_run_takes() -> None:
    given = RunOptions(3, "2KB", 7)
    assert unchecked(batch_size=np.int64(3), memory="2KB", seed=np.int32(7)) == given
    assert given.memory_bytes == 2000
    assert given.per_pass(100, 8192) == 3
    assert RunOptions().per_pass(100, 8192) == 81
    assert RunOptions().per_pass(10_000, 8192) == 1
    assert given.quiet == RunOptions(3, "2KB", 7, progress=False)


def calls() -> dict[str, Callable[..., Any]]:
    """Functions of several rooms that take a batch size, ready but for it."""
    model = model_of("llama")
    probe = hs.probes.repeated_tokens(model, length=5, batch=2)
    loss = hs.metrics.loss
    return {
        "score": lambda **o: hs.score(model, probe, ["entropy"], **o),
        "collect": lambda **o: hs.capture.collect(model, probe, **o),
        "ablate_heads": lambda **o: hs.ablate_heads(model, probe, loss, heads="L0H0", **o),
        "estimate_heads": lambda **o: hs.estimate_heads(model, probe, loss, **o),
        "rollout": lambda **o: hs.flow.rollout(model, probe, **o),
        "alti": lambda **o: hs.flow.alti(model, probe, **o),
        "norm_matrix": lambda **o: hs.flow.norm_matrix(model, probe, 0, form="per_head", **o),
        "layers": lambda **o: hs.geometry.layers(model, probe, measures=["curvature"], **o),
        "head_means": lambda **o: hs.ablation.head_means(model, probe, **o),
        "token_losses": lambda **o: hs.retrieval.token_losses(model, probe, **o),
        "generate": lambda **o: hs.retrieval.generate(model, probe.tokens, new_tokens=1, **o),
        "head_attribution": lambda **o: hs.lens.head_attribution(model, probe, **o),
        "edges": lambda **o: hs.edges.attribute(model, probe, loss, ablation="zero", **o),
    }


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("size", [0, -1])
def test_every_room_refuses_a_batch_of_nothing(name: str, size: int) -> None:
    with pytest.raises(InputError, match=f"batch_size={size}: give 1 or more"):
        calls()[name](batch_size=size)
