import pytest
import torch

from headscope.models.running import Digest, weight_digest


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_no_shuffle_leaves_it_as_it_is(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 300).mul(40).to(dtype)
    first = weight_digest({"a": weight})
    flat = weight.clone().flatten()
    a, b = 17, int((flat != flat[17]).nonzero()[-1])
    flat[[a, b]] = flat[[b, a]]
    rows = weight[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    for other in (flat.view(300, 300), rows, weight.T, weight.view(100, 900)):
        assert weight_digest({"a": other}) != first
    assert weight_digest({"b": weight}) != first
    assert weight_digest({"a": weight.clone()}) == first


def test_it_tells_weights_apart_that_are_swapped_by_name() -> None:
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    assert weight_digest({"a": a, "b": b}) != weight_digest({"a": b, "b": a})
    assert weight_digest({"a": a, "b": b}) == weight_digest({"b": b, "a": a})


def test_sums_that_stand_for_weights_on_other_devices_see_moves_and_single_bits() -> None:
    from headscope.models.running import _place_sums

    weight = torch.randn(513, 700)
    known = _place_sums({"a": weight})["a"]
    moved = weight.clone().flatten()
    moved[[3, 200_003]] = moved[[200_003, 3]]
    bit = weight.clone()
    bit.view(torch.int32)[400, 600] ^= 1
    changed = [moved.view(513, 700), bit, weight.flip(0), weight.view(700, 513)]
    assert known not in [_place_sums({"a": one})["a"] for one in changed]
    assert known == _place_sums({"a": weight.clone()})["a"]
