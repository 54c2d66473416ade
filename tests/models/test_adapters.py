"""Adapters of other packages, found by their entry point: a made-up distribution brings one."""

from pathlib import Path

import pytest
import torch

import headscope as hs
from headscope.errors import InputError

ADAPTER = """
import headscope as hs

class Wrapped:
    def __init__(self, inner):
        self.inner = inner

def adapt(source, tokenizer):
    if not isinstance(source, Wrapped):
        return None
    return hs.load(source.inner, tokenizer=tokenizer)

def wrong(source, tokenizer):
    return "a model"
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> None:
    """Put a distribution with one adapter on the path."""
    (folder / f"{module}.py").write_text(ADAPTER)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[headscope.adapters]\nmine = {module}:{function}\n")
    monkeypatch.syspath_prepend(folder)


def test_a_model_of_another_package_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "fake_adapter", "adapt")
    from fake_adapter import Wrapped  # type: ignore[import-not-found]

    inner = hs.load()
    model = hs.load(Wrapped(inner.module), tokenizer=inner.tokenizer)
    probe = hs.probes.repeated_tokens(inner, length=8, batch=2)
    found, known = (hs.score(one, probe, "induction")["induction"].mean for one in (model, inner))
    assert torch.equal(torch.tensor(found), torch.tensor(known))
    with pytest.raises(InputError, match="load\\(\\) takes"):
        hs.load(object())


def test_what_is_not_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "wrong_adapter", "wrong")
    with pytest.raises(InputError, match=r"'mine' \(wrong_adapter:wrong\) returned str"):
        hs.load(object())


def test_an_adapter_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "broken_adapter", "missing")
    with pytest.raises(InputError, match="broken_adapter:missing"):
        hs.load(object())
