"""Hard-concrete gates: their numbers, and what training them leaves alone."""

import math

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.pruning import learn_gates
from headscope.pruning.gates import chance_open, sample_gates, settled_gates
from tests.ablation.helpers import model_of, probe_of
from tests.models import families


def test_gates_have_the_published_numbers() -> None:
    alpha = torch.tensor([[-5.0, -2.0, 0.0, 0.5, 3.0]])
    for i, a in enumerate(alpha[0].tolist()):
        settled = min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1))
        assert float(settled_gates(alpha)[0, i]) == pytest.approx(settled, abs=1e-6)
    s = 1 / (1 + math.exp(-(math.log(0.3 / 0.7) + 0.5) / 0.33))
    gate = sample_gates(alpha, torch.full_like(alpha, 0.3))[0, 3]
    assert float(gate) == pytest.approx(1.2 * s - 0.1, abs=1e-6)
    noise = torch.rand(20000, 5, generator=torch.Generator().manual_seed(0))
    share = (sample_gates(alpha.expand(20000, -1), noise) > 0).float().mean(0)
    torch.testing.assert_close(chance_open(alpha)[0], share, atol=0.015, rtol=0)


def test_only_the_gates_learn_and_the_seed_decides() -> None:
    model, probe = hs.load(families.fresh("llama")), probe_of("left")
    before = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    runs = [learn_gates(model, probe, steps=5, seed=s, batch_size=2) for s in (0, 0, 1)]
    for name, weight in model.module.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())
    np.testing.assert_array_equal(runs[0].log_alpha, runs[1].log_alpha)
    assert not np.array_equal(runs[0].log_alpha, runs[2].log_alpha)
    assert len(runs[0].costs) == 5


def test_the_penalty_decides_how_many_stay() -> None:
    model, probe = model_of("gpt2"), probe_of()
    closed = learn_gates(model, probe, penalty=50.0, steps=60, rate=0.2)
    assert closed.kept == ()
    assert len(closed.removed) == 12
    assert closed.open_heads[0] == pytest.approx(12 * float(chance_open(torch.tensor([[2.0]]))))
    free = learn_gates(model, probe, penalty=0.0, steps=2)
    assert free.removed == ()
    assert set(free.order) == set(model.shape.heads)
    with pytest.raises(InputError, match="penalty >= 0"):
        learn_gates(model, probe, penalty=-1.0)


def test_a_trained_model_keeps_what_it_needs() -> None:
    model = hs.load("tiny-gpt2")
    probe = hs.probes.repeated_tokens(model, length=12, batch=8)
    metric = hs.metrics.loss.at("second_copy")
    gates = learn_gates(model, probe, metric, penalty=0.05, steps=80, rate=0.2)
    assert gates.removed
    assert gates.kept
    groups = {"removed": gates.removed, "kept": gates.kept}
    effects = hs.ablate_groups(model, probe, metric, groups, "zero")
    assert effects.mean[0] < 0.2 * effects.mean[1]
    assert gates.scores.mean.min() == 0.0
