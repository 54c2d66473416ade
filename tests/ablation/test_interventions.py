"""Interventions as values: the numbers of their names, everywhere where names are taken."""

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.interventions import (
    NAMED,
    AttendToFirst,
    BatchPlace,
    FreezePattern,
    Intervention,
    Mean,
    MeanPos,
    Patch,
    Resample,
    Scale,
    Setting,
    Uniform,
    Zero,
)
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from tests.models import families

METRIC = hs.metrics.loss


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return hs.load(families.build("llama"))


def probe_of(seed: int = 0, batch: int = 4) -> Probe:
    drawn = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, families.VOCAB, (batch, 10), generator=drawn)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    probe = hs.probes.from_tokens(tokens)
    return hs.Probe(tokens, probe.real, tokens, targets)


def paired() -> Probe:
    from dataclasses import replace

    return replace(probe_of(), corrupt=probe_of(seed=1))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_value_gives_the_numbers_of_its_name(
    model: HeadModel, name: str, batch_size: int | None
) -> None:
    probe = paired()
    value = NAMED[name]()
    by_name = hs.ablate_heads(model, probe, METRIC, name, batch_size=batch_size)
    by_value = hs.ablate_heads(model, probe, METRIC, value, batch_size=batch_size)
    np.testing.assert_array_equal(by_name.per_example, by_value.per_example)
    assert by_name.name == by_value.name == f"{name}_ablation"
    assert by_value.provenance.probe["method"] == name


@pytest.mark.parametrize("kind", [Mean, MeanPos, Resample, Patch])
def test_a_reference_belongs_to_the_value(model: HeadModel, kind: type[Intervention]) -> None:
    probe, other = probe_of(), probe_of(seed=2)
    by_name = hs.ablate_heads(model, probe, METRIC, kind.name, reference=other, seed=5)
    given = kind(other, 5) if kind is Resample else kind(other)
    by_value = hs.ablate_heads(model, probe, METRIC, given)
    np.testing.assert_array_equal(by_name.per_example, by_value.per_example)
    assert by_value.provenance.probe["reference"] == other.name
    assert by_value.provenance.seed == (5 if kind is Resample else 0)


def test_scale_is_the_edit_of_that_name(model: HeadModel) -> None:
    probe = probe_of()
    by_value = hs.ablate_heads(model, probe, METRIC, Scale(0.5))
    by_edit = hs.ablate_heads(model, probe, METRIC, lambda heads: hs.edits.scale(heads, 0.5))
    np.testing.assert_array_equal(by_value.per_example, by_edit.per_example)
    assert by_value.provenance.probe["factor"] == 0.5
    zero = hs.ablate_heads(model, probe, METRIC, Zero())
    np.testing.assert_allclose(
        hs.ablate_heads(model, probe, METRIC, Scale(0)).per_example, zero.per_example, atol=1e-6
    )
    nothing = hs.ablate_heads(model, probe, METRIC, Scale(1.0))
    assert not nothing.per_example.any()


def test_freezing_a_pattern_is_patching_it(model: HeadModel) -> None:
    probe = paired()
    frozen = hs.ablate_heads(model, probe, METRIC, FreezePattern())
    patched = hs.ablate_heads(model, probe, METRIC, Patch(site="pattern"))
    np.testing.assert_array_equal(frozen.per_example, patched.per_example)
    head = (0, 1)
    patterns = hs.ablation.head_values(
        model, probe.corrupt.tokens, probe.corrupt.real, site="pattern"
    )
    edit = hs.edits.freeze_pattern(head, patterns)
    log = [model.forward(probe.tokens, edits=e).log_softmax(-1) for e in ([], [edit])]
    known = probe.targets >= 0
    clean, edited = (
        -(one.gather(-1, probe.targets.clamp_min(0)[..., None])[..., 0] * known).sum(1)
        / known.sum(1)
        for one in log
    )
    np.testing.assert_allclose(frozen.per_example[head], (edited - clean).numpy(), atol=1e-4)


@pytest.mark.parametrize("value", [Zero(), Mean(), Uniform(), AttendToFirst(), Scale(0.3)])
def test_groups_and_curves_take_values(model: HeadModel, value: Intervention) -> None:
    probe = probe_of()
    groups = {"first": ["L0H0", "L0H1"], "one": ["L1H2"]}
    grid = hs.ablate_groups(model, probe, METRIC, groups, method=value)
    single = hs.ablate_heads(model, probe, METRIC, value, heads="L1H2")
    np.testing.assert_allclose(grid.per_example[1], single.per_example[1, 2], atol=1e-6)


def test_estimates_take_values(model: HeadModel) -> None:
    probe = probe_of()
    for value in (Zero(), Mean()):
        by_name = hs.estimate_heads(model, probe, METRIC, baseline=value.name)
        by_value = hs.estimate_heads(model, probe, METRIC, baseline=value)
        np.testing.assert_array_equal(by_name.per_example, by_value.per_example)
    with pytest.raises(InputError, match="baseline takes an intervention or its name"):
        hs.estimate_heads(model, probe, METRIC, baseline=lambda heads: hs.edits.zero(heads))


def test_positions_limit_a_value(model: HeadModel) -> None:
    probe = probe_of()
    where = torch.zeros_like(probe.real)
    where[:, 4] = True
    by_value = hs.ablate_heads(model, probe, METRIC, Scale(0.0), positions=where)
    by_name = hs.ablate_heads(model, probe, METRIC, "zero", positions=where)
    np.testing.assert_allclose(by_value.per_example, by_name.per_example, atol=1e-6)


def test_an_own_intervention_is_a_class(model: HeadModel) -> None:
    class Negate(Intervention):
        name = "negate"

        def prepare(self, setting: Setting) -> BatchPlace:
            return lambda chosen, clean: (
                lambda heads: hs.edits.scale(heads, -1.0, positions=setting.where(chosen))
            )

    probe = probe_of()
    by_class = hs.ablate_heads(model, probe, METRIC, Negate())
    by_value = hs.ablate_heads(model, probe, METRIC, Scale(-1.0))
    np.testing.assert_array_equal(by_class.per_example, by_value.per_example)
    assert by_class.name == "negate_ablation"


def test_what_does_not_fit_gets_a_sentence(model: HeadModel) -> None:
    probe = probe_of()
    with pytest.raises(InputError, match="give it to the intervention itself"):
        hs.ablate_heads(model, probe, METRIC, Mean(), reference=probe_of(seed=1))
    with pytest.raises(InputError, match="this probe has no corrupt pair"):
        hs.ablate_heads(model, probe, METRIC, Patch())
    with pytest.raises(InputError, match="needs a factor"):
        hs.ablate_heads(model, probe, METRIC, "scale")
    with pytest.raises(InputError, match="factor=nan of Scale: give a finite"):
        Scale(float("nan"))
    with pytest.raises(InputError, match="site z, query or pattern, not 'key'"):
        Patch(site="key")
    with pytest.raises(InputError, match="takes no values from elsewhere"):
        hs.ablate_heads(model, probe, METRIC, "zero", reference=probe_of(seed=1))
    short = hs.probes.from_tokens(probe.tokens[:, :5])
    with pytest.raises(InputError, match="mean_pos replaces position by position"):
        hs.ablate_heads(model, probe, METRIC, MeanPos(short))
