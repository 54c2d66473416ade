"""Fits that are stopped and go on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headscope import lens
from headscope.errors import HeadscopeError, InputError
from headscope.lens import attention, fitting, linear
from tests.lens.helpers import model_of
from tests.lens.test_learned import probe_of

STEPS, STOP = 6, 4


def tuned_lens(**more: Any) -> tuple[torch.Tensor, ...]:
    options: dict[str, Any] = {"steps": STEPS, "held_out": 0.25, **more}
    found = lens.tuned_lens(model_of("llama"), probe_of(), **options)
    return found.weight, found.bias


def attention_lens(**more: Any) -> tuple[torch.Tensor, ...]:
    options: dict[str, Any] = {"steps": STEPS, "held_out": 0.25, "rank": 2, **more}
    found = lens.attention_lens(model_of("llama"), probe_of(), **options)
    return found.inner, found.outer, found.shift


@pytest.mark.parametrize(
    ("fit", "module", "name"),
    [(tuned_lens, linear, "streams"), (attention_lens, attention, "head_streams")],
)
def test_a_fit_that_was_stopped_goes_on_to_the_same_numbers(
    fit: Callable[..., tuple[torch.Tensor, ...]],
    module: Any,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, read, passes = fit(), getattr(module, name), 0
    stop_at = STOP

    def counted(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == stop_at + 1:
            raise KeyboardInterrupt
        return read(*given)

    monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(fitting, "_EVERY", 0.0)
    file = tmp_path / "fits" / "lens.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint=file)
    passes, stop_at = 0, -2
    found = fit(checkpoint=file)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    first, passes = passes, 0
    assert all(torch.equal(a, b) for a, b in zip(fit(checkpoint=file), expected, strict=True))
    assert first - passes == STEPS - STOP  # then nothing was left to fit: it was only judged


def test_the_file_is_written_at_the_end_and_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    keep = fitting._Kept.keep

    def seen(self: Any, step: int, *given: Any, last: bool) -> None:
        before = self._written
        keep(self, step, *given, last=last)
        if self._written != before:
            written.append(step)

    monkeypatch.setattr(fitting._Kept, "keep", seen)
    tuned_lens(checkpoint=tmp_path / "lens.safetensors")
    assert written == [STEPS]
    assert [one.name for one in tmp_path.iterdir()] == ["lens.safetensors"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "lens.safetensors"
    tuned_lens(checkpoint=file)
    with pytest.raises(InputError, match=r"of another fit \(other steps\)"):
        tuned_lens(checkpoint=file, steps=7)
    with pytest.raises(InputError, match=r"of another fit \(other .*rank"):
        attention_lens(checkpoint=file)
    tensors = load_file(file)
    save_file(tensors, file)
    with pytest.raises(InputError, match="not a checkpoint of a fit"):
        tuned_lens(checkpoint=file)
    file.write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="not a checkpoint of a fit"):
        tuned_lens(checkpoint=file)
    with pytest.raises(HeadscopeError, match="cannot write"):
        tuned_lens(checkpoint=file / "below" / "lens.safetensors")
