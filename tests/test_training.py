"""Training with masks: slow loops give the same, stopped runs go on bit by bit, models stay."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope import training
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from tests.models import families


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return hs.load(families.fresh("gpt2"))


@pytest.fixture(scope="module")
def probe() -> hs.Probe:
    tokens = families.tokens(6)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    return hs.probes.from_tokens(tokens, targets=targets)


def _before(probe: hs.Probe) -> torch.Tensor:
    at = torch.arange(probe.length)
    return (at[:, None] - at == 1).expand(len(probe), -1, -1)


def _every(probe: hs.Probe) -> torch.Tensor:
    return torch.ones(len(probe), probe.length, probe.length, dtype=torch.bool)


def test_gini_and_lorenz_by_hand() -> None:
    values = np.array([3.0, 1.0, np.nan, 0.0, 2.0])
    assert training.lorenz(values).tolist() == pytest.approx([0, 0, 1 / 6, 3 / 6, 1])
    apart = np.abs(values[:, None] - values)
    kept = apart[~np.isnan(apart)]
    assert training.gini(values) == pytest.approx(kept.mean() / (2 * np.nanmean(values)))
    curve = training.lorenz(values)
    assert training.gini(values) == pytest.approx(1 - (curve[:-1] + curve[1:]).sum() / 4)
    assert training.gini(np.full(5, 0.3)) == pytest.approx(0)
    assert np.isnan(training.gini(np.zeros(3)))
    for wrong, said in ((np.array([1.0, -1.0]), "-1 among"), (np.array([np.nan]), "no values")):
        with pytest.raises(InputError, match=said):
            training.gini(wrong)


def test_plain_training_is_that_of_a_plain_loop(model: HeadModel, probe: hs.Probe) -> None:
    digest, asking = model.digest(), [p.requires_grad for p in model.module.parameters()]
    found = training.head_mask(model, probe, 0, steps=4, rate=1e-3, batch_size=4, seed=3)
    assert model.digest() == digest != found.model.digest()
    assert [p.requires_grad for p in model.module.parameters()] == asking
    module = families.fresh("gpt2")
    module.load_state_dict(model.module.state_dict())
    adam = torch.optim.Adam(module.parameters(), lr=1e-3)
    draws, losses = torch.Generator().manual_seed(3), []
    for step in range(4):
        if step % 2 == 0:
            order = torch.randperm(6, generator=draws)
        tokens = probe.tokens[order[step % 2 * 4 :][:4]]
        logits = module.eval()(tokens).logits[:, :-1].log_softmax(-1)
        loss = -logits.gather(-1, tokens[:, 1:, None]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert found.losses == pytest.approx(losses, abs=1e-4)
    wanted = dict(module.named_parameters())
    for name, one in found.model.module.named_parameters():
        same = torch.isclose(one, wanted[name], atol=2e-4)
        if name.endswith("c_attn.bias"):
            same[32:64] = True  # no loss depends on a key's bias: its slope is rounding
        assert bool(same.all()), name
    assert found.metrics["after"] < found.metrics["before"]
    assert set(found.to_pandas()) == {"layer", "head", "before", "after"}
    assert "Gini" in repr(found)


def test_no_gradient_passes_a_masked_head(model: HeadModel, probe: hs.Probe) -> None:
    heads = ["L1H0", "L1H2"]
    found = training.head_mask(model, probe, 1, heads=heads, steps=1, rate=1e-2, seed=1)
    old, new = (one.module.transformer.h[1].attn.c_proj.weight for one in (model, found.model))
    moved = [not torch.equal(old[8 * h :][:8], new[8 * h :][:8]) for h in range(4)]
    assert moved in ([False, True, True, True], [True, True, False, True])


def test_masks_are_uniform_or_of_the_largest_slopes(model: HeadModel) -> None:
    heads = model.shape.heads
    draws = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(heads, 0)
    for _ in range(600):
        for head in training.masked_heads(heads, 3, draws):
            counts[head] += 1
    # 600 draws with a chance of a quarter: 150, with a spread of 10.6.
    assert min(counts.values()) > 150 - 45
    assert max(counts.values()) < 150 + 45
    slopes = torch.arange(12.0).view(3, 4) - 6
    assert training.masked_heads(heads, 3, draws, slopes) == (
        HeadIndex(0, 0), HeadIndex(0, 1), HeadIndex(2, 3)
    )  # fmt: skip
    assert training.masked_heads(heads, 2, draws, torch.ones(3, 4)) == heads[:2]


def test_importance_masks_what_the_loss_depends_on(model: HeadModel, probe: hs.Probe) -> None:
    def loss(edits: list) -> float:
        logits = model.forward(probe.tokens, edits=edits)
        return float(hs.metrics.loss(logits, probe).mean())

    slopes = {h: loss([hs.edits.scale(h, 1.01)]) - loss([hs.edits.scale(h, 0.99)])
              for h in model.shape.heads}  # fmt: skip
    chosen = sorted(model.shape.heads, key=lambda head: -abs(slopes[head]))[:2]
    found = training.head_mask(model, probe, 2, by="importance", steps=1)
    assert found.losses[0] == pytest.approx(loss([hs.edits.zero(chosen)]), abs=1e-4)


RUNS: dict[str, Callable[..., Any]] = {
    "mask": lambda m, p, **o: training.head_mask(m, p, 3, **o),
    "importance": lambda m, p, **o: training.head_mask(m, p, 3, by="importance", **o),
    "inject": lambda m, p, **o: training.inject_patterns(m, p, {"L0H1": _before}, **o),
    "mixture": lambda m, p, **o: training.mixture(m, p, hidden=4, **o),
    "noisy": lambda m, p, **o: training.variational_gates(m, p, **o),
}


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_same_bits(
    name: str, model: HeadModel, probe: hs.Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 5, "batch_size": 4, "rate": 0.01, "seed": 2}
    whole = RUNS[name](model, probe, **options)
    digest, steps, step = model.digest(), [0], torch.optim.Adam.step

    def stop(adam: Any) -> None:
        steps[0] += 1
        if steps[0] == 4:
            raise _StoppedError
        step(adam)

    with monkeypatch.context() as stopped:
        stopped.setattr(torch.optim.Adam, "step", stop)
        with pytest.raises(_StoppedError):
            RUNS[name](model, probe, folder=tmp_path, every=2, **options)
    assert model.digest() == digest
    assert not any(p.grad is not None for p in model.module.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    again = RUNS[name](model, probe, folder=tmp_path, every=2, **options)
    twice = RUNS[name](model, probe, folder=tmp_path, every=2, **options)  # nothing left to do
    for one in (again, twice):
        if isinstance(whole, training.Trained):
            assert one.losses == whole.losses
            assert one.model.digest() == whole.model.digest()
            assert one.metrics == whole.metrics
        elif isinstance(whole, hs.HeadTable):
            assert all(np.array_equal(one[n].mean, whole[n].mean) for n in whole)
        else:
            assert np.array_equal(one.per_example, whole.per_example)


def test_checkpoints_of_other_runs_are_refused(
    model: HeadModel, probe: hs.Probe, tmp_path: Path
) -> None:
    run = training.variational_gates
    run(model, probe, steps=2, folder=tmp_path)
    with pytest.raises(InputError, match=r"other rate, seed"):
        run(model, probe, steps=2, folder=tmp_path, seed=1, rate=0.2)
    with pytest.raises(InputError, match="batch_size, probe"):
        run(model, probe.examples(slice(0, 5)), steps=2, folder=tmp_path)
    with pytest.raises(InputError, match="has already run 2 steps"):
        run(model, probe, steps=1, folder=tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="damaged"):
        run(model, probe, steps=2, folder=tmp_path)


def test_a_run_that_explodes_says_so_and_keeps_the_last_sound_state(
    model: HeadModel, probe: hs.Probe, tmp_path: Path
) -> None:
    digest = model.digest()
    with pytest.raises(HeadscopeError, match="is not finite"):
        training.head_mask(model, probe, 0, steps=6, rate=1e30, every=1, folder=tmp_path)
    assert model.digest() == digest
    kept = training.Checkpoint(tmp_path, {})._file
    assert kept is not None
    from safetensors.torch import load_file

    assert bool(load_file(kept)["losses"].isfinite().all())


def test_injected_rows_are_those_of_masked_scores() -> None:
    scores = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    keys = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    pattern = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    found = training.injected_rows(pattern, keys, "mask")
    wanted = scores.masked_fill(~keys, -1e4).masked_fill(~causal, -torch.inf).softmax(-1)
    some = (keys & causal).any(-1)
    assert torch.allclose(found[some], wanted[some], atol=1e-6)
    assert torch.equal(found[~some], pattern[~some])
    even = training.injected_rows(pattern, keys, "synthesize")[some]
    assert torch.allclose(even, ((keys & causal) / (keys & causal).sum(-1, keepdim=True))[some])


def test_a_relation_of_all_keys_changes_nothing_and_others_do(
    model: HeadModel, probe: hs.Probe
) -> None:
    options = {"steps": 1, "rate": 1e-6}
    same = training.inject_patterns(model, probe, {"L1H1": _every}, **options)
    assert same.metrics["injected"] == pytest.approx(same.metrics["before"], abs=1e-5)
    pairs = [(example, at, at - 1) for example in range(6) for at in range(1, 12)]
    other = training.inject_patterns(model, probe, {"L1H1": torch.tensor(pairs)}, **options)
    ours = training.inject_patterns(model, probe, {(1, 1): _before}, **options)
    assert other.metrics == ours.metrics
    assert ours.metrics["injected"] != pytest.approx(ours.metrics["before"], abs=1e-3)
    longer = training.inject_patterns(
        model, probe, {"L1H1": _before}, mode="synthesize", steps=12, rate=3e-3
    )
    assert longer.metrics["after, injected"] < longer.metrics["injected"]


def test_an_even_mixture_is_the_model_and_its_gate_does_not_look_ahead(
    model: HeadModel, probe: hs.Probe
) -> None:
    found = training.mixture(model, probe, steps=1, batch_size=6, rate=1e-9)
    assert found.mean == pytest.approx(np.ones((3, 4)), abs=1e-5)
    gates = training._Gates(model.shape, 4, 0, torch.device("cpu"))
    for one in gates.parameters.values():
        one.data.normal_(generator=torch.Generator().manual_seed(1))
    stream = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    real = torch.tensor([[False, True, True, True, True, True]])
    whole = gates.shares(1, stream, real)
    other = stream.clone()
    other[:, 0] += 5  # padding
    other[:, 4:] -= 3  # later
    assert torch.allclose(gates.shares(1, other, real)[:, 1:4], whole[:, 1:4], atol=1e-6)
    assert torch.allclose(whole.sum(-1), torch.full((1, 6), 4.0), atol=1e-5)
    # Leaving head i out alone is the mixture whose gate is 1 at i.
    sure = {name: torch.zeros_like(one) for name, one in gates.parameters.items()}
    gates.parameters = {**sure, "bias": sure["bias"] + 9, "second": sure["second"]}
    gates.parameters["second"][:, :, 2] = 50.0
    task = training._Mixing(model, hs.metrics.loss, 1, gates)
    plain = hs.edits.scale([f"L{n}H{h}" for n in range(3) for h in (0, 1, 3)], 4 / 3)
    cut = hs.edits.zero([f"L{n}H2" for n in range(3)])
    logits = model.forward(probe.tokens, edits=[plain, cut])
    wanted = float(hs.metrics.loss(logits, probe).mean())
    assert float(gates.value(task, probe)[0].detach()) == pytest.approx(wanted, abs=1e-4)


def test_a_mixture_learns_to_leave_out_a_head_that_hurts(probe: hs.Probe) -> None:
    module = families.fresh("gpt2")
    with torch.no_grad():
        module.transformer.h[2].attn.c_proj.weight[:8] = 0
        module.transformer.h[2].attn.c_proj.weight[16:] = 0
        module.transformer.h[2].attn.c_proj.weight[8:16] *= 5
    model = hs.load(module)
    wanted = model.forward(probe.tokens, edits=[hs.edits.zero("L2H1")]).argmax(-1)
    asked = replace(probe, targets=wanted.where(probe.targets >= 0, -1))
    found = training.mixture(model, asked, steps=40, batch_size=6, rate=0.05)
    assert found.mean[2].argmin() == 1
    assert found.mean[2, 1] < 0.5


def test_a_head_that_writes_nothing_sinks_into_noise(probe: hs.Probe) -> None:
    module = families.fresh("gpt2")
    with torch.no_grad():
        module.transformer.h[1].attn.c_proj.weight[:8] = 0  # L1H0
    found = training.variational_gates(hs.load(module), probe, steps=60, penalty=0.05)
    ratio = found["signal_to_noise"].mean
    assert np.unravel_index(ratio.argmin(), ratio.shape) == (1, 0)
    assert ratio[1, 0] < 1 < (1 / 0.3) ** 2
    wanted = np.log1p(ratio) / 2
    assert found["gate_nats"].mean == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, p: training.head_mask(m, p, 12), "one must be left"),
        (lambda m, p: training.head_mask(m, p, -1), "count=-1"),
        (lambda m, p: training.head_mask(m, p, 1, by="size"), "way of masking"),
        (lambda m, p: training.head_mask(m, p, 1, heads="L9H0"), "no head"),
        (lambda m, p: training.head_mask(m, p, 1, steps=0), "steps=0"),
        (lambda m, p: training.head_mask(m, p, 1, rate=float("nan")), "rate=nan"),
        (lambda m, p: training.head_mask(m, p, 1, metric=lambda x, _: x.mean((1, 2))), "direction"),
        (lambda m, p: training.inject_patterns(m, p, {}), "names no head"),
        (lambda m, p: training.inject_patterns(m, p, {"L0H0": _before}, mode="add"), "mode"),
        (
            lambda m, p: training.inject_patterns(m, p, {"L0H0": torch.zeros(0, 3).long()}),
            "L0H0 has no pair",
        ),
        (
            lambda m, p: training.inject_patterns(m, p, {"L0H0": torch.tensor([[0, 99, 0]])}),
            "query 99",
        ),
        (lambda m, p: training.mixture(m, p, hidden=0), "hidden=0"),
        (lambda m, p: training.variational_gates(m, p, penalty=-1.0), "penalty=-1.0"),
        (lambda m, p: training.variational_gates(m, p, start=0.0), "start=0.0"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    call: Callable[[HeadModel, hs.Probe], object], said: str, model: HeadModel, probe: hs.Probe
) -> None:
    with pytest.raises(InputError, match=said):
        call(model, probe)


def test_weights_that_cannot_be_copied_are_refused(model: HeadModel, probe: hs.Probe) -> None:
    with pytest.raises(UnsupportedModelError, match="transformers model with a single stack"):
        training.head_mask(hs.load(model.bridge), probe, 1)


def _prompts() -> hs.Probe:
    """Demonstrations of two classes, told by a label word, and a query."""
    draws = torch.Generator().manual_seed(0)
    words = torch.randint(20, 60, (8, 5), generator=draws)
    label = torch.tensor([[5, 9], [9, 5]]).repeat(4, 1)
    tokens = torch.stack([words[:, 0], label[:, 0], words[:, 1], label[:, 1], words[:, 2]], 1)
    at = torch.arange(5)
    marks = {f"label_{n}": tokens == one for n, one in enumerate((5, 9))}
    end = (at == 4).expand(8, -1)
    targets = torch.full_like(tokens, -1)
    targets[:, 4] = label[:, 0]
    return hs.probes.from_tokens(tokens, targets=targets, marks={**marks, "end": end})


LEARNERS: dict[str, Callable[..., Any]] = {
    "gates": lambda m, p, **o: hs.pruning.learn_gates(m, p, batch_size=4, **o).log_alpha,
    "alphas": lambda m, p, **o: hs.pruning.learn_alphas(m, p, batch_size=4, **o).mean,
    "strengths": lambda m, p, **o: (
        lambda found: np.append(found.values, (*found.losses, found.before, found.after))
    )(hs.steering.learn_strengths(m, hs.steering.head_means(m, p), p, **o)),
    "causal gates": lambda m, p, every=0, **o: (
        hs.edges.causal_gates(m, p, hs.metrics.loss, **o)["irrelevant"].mean
    ),
    "label words": lambda m, p, **o: hs.relevance.reweight(m, p, **o).beta,
}


@pytest.mark.parametrize("name", LEARNERS)
def test_what_is_learned_on_a_frozen_model_goes_on_where_it_was_stopped(
    name: str, model: HeadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, probe, options = LEARNERS[name], _prompts(), {"steps": 6, "every": 2}
    if name == "causal gates":
        monkeypatch.setattr(hs.base.checkpoints.AdamRun, "due", property(lambda run: True))
    whole = learn(model, probe, **options)
    digest, steps, step = model.digest(), [0], torch.optim.Adam.step

    def stop(adam: Any) -> None:
        steps[0] += 1
        if steps[0] == 5:
            raise _StoppedError
        step(adam)

    with monkeypatch.context() as stopped:
        stopped.setattr(torch.optim.Adam, "step", stop)
        with pytest.raises(_StoppedError):
            learn(model, probe, folder=tmp_path, **options)
    assert model.digest() == digest
    assert {file.name for file in tmp_path.rglob("*.*")} == {"checkpoint.safetensors"}
    taken = []
    with monkeypatch.context() as counted:
        counted.setattr(torch.optim.Adam, "step", lambda adam: (taken.append(1), step(adam)))
        again = learn(model, probe, folder=tmp_path, **options)
    # Four steps were taken and kept.
    assert len(taken) == (18 if name == "causal gates" else 6) - 4
    np.testing.assert_array_equal(again, whole)
    other = probe.examples(slice(0, 7))
    with pytest.raises(InputError, match=r"other .*probe"):
        learn(model, other, folder=tmp_path, **options)
    assert model.digest() == digest
