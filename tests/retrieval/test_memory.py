"""What a needle scan allocates grows with the length of the text, not with its square."""

from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import headscope as hs
from headscope.retrieval import follow


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.untyped_storage().nbytes() // 4)
        return out


SCORERS = [
    "retrieval",
    "needle_mass",
    "importance_weighted_retrieval",
    "needle_write",
    "streaming_gap",
    "long_need_predicted",
]


@pytest.mark.parametrize("form", ["decoded", "forced"])
def test_memory_is_linear_in_the_length(form: str) -> None:
    model = hs.load("tiny-llama", extrapolate=True)
    largest = {}
    for length in (600, 2400):
        probe = hs.probes.needle(model, length, [0.5], per_cell=1)
        with Largest() as seen:
            if form == "decoded":
                follow(model, probe, new_tokens=2, progress=False)
            else:
                hs.score(model, probe, SCORERS, progress=False)
        largest[length] = seen.numel
    assert largest[2400] <= 4.3 * largest[600]
    assert largest[2400] < 2400 * 2400
    assert probe.settings["lengths"] == "2400"
