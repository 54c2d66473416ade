"""The stand-in device refuses what a GPU refuses, and counts what makes the host wait."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.devices import standin


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    standin.install()
    with torch.autograd.set_multithreading_enabled(False):
        yield


def on_device(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape).to(standin.DEVICE)


@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.zeros(3, device=device),
        lambda device: torch.arange(3, device=device),
        lambda device: torch.eye(3, device=device),
        lambda device: torch.tensor([1.0, 2.0], device=device),
        lambda device: torch.randperm(4, device=device),
        lambda device: torch.nn.Linear(3, 3, device=device).weight,
        lambda device: torch.nn.Linear(3, 3).to(device).weight,
        lambda device: copy.deepcopy(torch.nn.Linear(3, 3).to(device)).weight,
        lambda device: on_device(3, 3).T[0],
    ],
)
def test_what_is_made_there_is_there(make: Callable[[torch.device], torch.Tensor]) -> None:
    made = make(standin.DEVICE)
    assert made.device.type == standin.NAME
    assert made.cpu().device.type == "cpu"
    assert made.cpu().shape == made.shape


@pytest.mark.parametrize(
    "wrong",
    [
        lambda there, here: there + here,
        lambda there, here: here @ there.T,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: here[there.long()],
        lambda there, here: torch.where(there > 0, there, here),
    ],
)
def test_two_devices_do_not_mix(wrong: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="two devices"):
        wrong(on_device(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize("read", [np.asarray, lambda there: there.numpy()])
def test_it_is_not_read_as_numpy(read: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(TypeError, match="host memory first"):
        read(on_device(2))


def test_float64_can_be_switched_off() -> None:
    with standin.without_float64(), pytest.raises(TypeError, match="float64"):
        on_device(2).double()
    assert on_device(2).double().dtype == torch.float64


@pytest.mark.parametrize(
    ("run", "waits"),
    [
        (lambda x: x @ x.T, 0),
        (lambda x: x[torch.tensor([0, 1])], 0),
        (lambda x: x[x > 2], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: float(x.sum()), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: torch.empty(2, 2).copy_(x), 1),
    ],
)
def test_waits_are_counted(run: Callable[[torch.Tensor], Any], waits: int) -> None:
    x = on_device(2, 2)
    with standin.counting() as counted:
        run(x)
    assert counted.total() == waits


def test_gradients_and_writes_reach_the_numbers() -> None:
    x = on_device(3).requires_grad_()
    (gradient,) = torch.autograd.grad((x * x).sum(), x)
    assert gradient.tolist() == [2.0, 4.0, 6.0]
    y = on_device(2, 2)
    y[0].mul_(10)
    assert y.tolist() == [[10.0, 20.0], [3.0, 4.0]]
