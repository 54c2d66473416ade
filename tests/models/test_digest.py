import pytest
import torch

from headscope.models.digest import Digest, weight_digest


def test_it_is_the_digest_of_the_weights_as_they_are_now() -> None:
    weights = {"a": torch.randn(300, 7), "b": torch.randn(5).half(), "c": torch.arange(4)}
    digest = Digest()
    first = digest.of(weights)
    assert digest.of(weights) == first == weight_digest(weights)
    weights["a"][123, 4] += 1
    assert digest.of(weights) == weight_digest(weights) != first
    weights["a"].data.mul_(2)  # past torch's count of changes
    assert digest.of(weights) == weight_digest(weights)
    weights["b"] = weights["b"] + 1
    assert digest.of(weights) == weight_digest(weights)


def test_it_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, calls = {"a": torch.randn(3, 3)}, []
    monkeypatch.setattr(
        "headscope.models.digest.weight_digest", lambda given: calls.append(1) or "x"
    )
    digest = Digest()
    assert digest.of(weights) == digest.of({"a": weights["a"].detach()}) == "x"
    assert len(calls) == 1
