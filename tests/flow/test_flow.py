"""Rollout, max-flow, norms, ALTI: closed forms, sums, and the obvious slow way on tiny models."""

from functools import cache
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from tests.flow import slow
from tests.models import families

# Full heads; grouped heads with value biases; norm after attention, soft cap, window; parallel
# blocks; multipliers; learned sinks; and a model on the second path.
SOME = ["gpt2", "llama", "gemma2", "gpt_neox", "granite", "gpt_oss", "bloom"]


@cache
def model_of(family: str) -> HeadModel:
    return hs.load(families.build(family))


def probe_of(padding: str = "none", batch: int = 4) -> Probe:
    tokens, real = families.tokens(), families.padding(padding)
    inputs = torch.zeros_like(tokens, dtype=torch.bool)
    inputs[:, 7:8] = True  # real under every padding
    return hs.probes.from_tokens(
        tokens[:batch], None if real is None else real[:batch], {"some": inputs[:batch]}
    )


def toy(layers: int, a: float) -> Tensor:
    """Half residual stream, half [[1, 0], [a, 1 - a]]."""
    attention = torch.tensor([[1.0, 0.0], [a, 1 - a]])
    return (attention / 2 + torch.eye(2) / 2).repeat(layers, 1, 1)


@pytest.mark.parametrize(
    ("layers", "a", "rolled", "flow"), [(2, 0.4, 0.36, 0.4), (6, 0.4, 0.737856, 1)]
)
def test_two_tokens_have_a_closed_form(layers: int, a: float, rolled: float, flow: float) -> None:
    mixing = toy(layers, a)
    result = hs.flow.rolled_out(mixing)
    assert float(result[1, 0]) == pytest.approx(1 - (1 - a / 2) ** layers, abs=1e-6)
    assert float(result[1, 0]) == pytest.approx(rolled, abs=1e-5)
    flows = hs.flow.flow_of(mixing.numpy(), 1)
    assert flows == pytest.approx([min(1, layers * a / 2), 1 - a / 2], abs=1e-6)
    assert flows[0] == pytest.approx(flow, abs=1e-6)


def test_uniform_attention_rolls_out_to_known_shares() -> None:
    uniform = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    result = hs.flow.rolled_out((uniform / 2 + torch.eye(3) / 2).repeat(2, 1, 1))
    assert result[2].tolist() == pytest.approx([0.3194444, 0.2361111, 0.4444444], abs=1e-6)


def test_flow_is_that_of_networkx() -> None:
    mixing = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)).tril()
    mixing = (mixing / mixing.sum(-1, keepdim=True)).double().numpy()
    graph = networkx.DiGraph()
    for level, end, start in np.argwhere(mixing):
        graph.add_edge((level + 1, end), (level, start), capacity=mixing[level, end, start])
    wanted = [networkx.maximum_flow_value(graph, (3, 3), (0, key)) for key in range(4)]
    assert hs.flow.flow_of(mixing, 3) == pytest.approx(wanted, abs=1e-6)


def mixing_of(model: HeadModel, probe: Probe) -> list[Tensor]:
    """Each layer's mixing matrix from whole patterns."""
    found = []
    for layer in hs.capture.collect(model, probe).values():
        mixed = layer.pattern.mean(1) + torch.eye(probe.length)
        found.append(mixed / mixed.sum(-1, keepdim=True))
    return found


@pytest.mark.parametrize("family", SOME)
def test_rollout_is_the_product_of_whole_patterns(family: str) -> None:
    model, probe = model_of(family), probe_of()
    found = hs.flow.rollout(model, probe, memory=4 * 4 * 12 * 5 * 4)  # a few rows at a time
    wanted = hs.flow.rolled_out(torch.stack(mixing_of(model, probe)))
    assert found.matrix == pytest.approx(wanted.numpy(), abs=2e-6)
    assert found.matrix.sum(-1) == pytest.approx(1, abs=1e-5)
    assert np.triu(found.matrix, 1).max() == 0


def test_rollout_fuses_heads_otherwise_where_asked() -> None:
    model, probe = model_of("llama"), probe_of()
    patterns = [layer.pattern for layer in hs.capture.collect(model, probe).values()]
    for name, fuse in (("max", torch.amax), ("min", torch.amin)):
        mixed = [fuse(one, 1) + torch.eye(probe.length) for one in patterns]
        wanted = hs.flow.rolled_out(torch.stack([one / one.sum(-1, keepdim=True) for one in mixed]))
        assert hs.flow.rollout(model, probe, heads=name).matrix == pytest.approx(
            wanted.numpy(), abs=1e-6
        )


@pytest.mark.parametrize("family", SOME)
def test_what_passes_through_heads_and_residual_streams_is_the_rollout(family: str) -> None:
    model, probe = model_of(family), probe_of()
    score = hs.flow.through_heads(model, probe, "some", memory=4 * 4 * 12 * 5 * 4)
    mixing, inputs = mixing_of(model, probe), probe.mark("some").float()
    patterns = hs.capture.collect(model, probe)
    whole = torch.einsum("bqk,bk->bq", hs.flow.rolled_out(torch.stack(mixing)), inputs)[:, -1]
    below, heads = inputs, model.shape.n_heads
    for n in range(model.shape.n_layers):
        above = torch.eye(probe.length)[-1].expand(len(probe), -1)
        for later in reversed(mixing[n + 1 :]):
            above = torch.einsum("bq,bqk->bk", above, later)
        pattern = patterns[n].pattern
        total = pattern.mean(1).sum(-1) + 1
        own = torch.einsum("bq,bhqk,bk->bh", above / total, pattern / heads, below)
        assert score.per_example[n] == pytest.approx(own.T.numpy(), abs=2e-6)
        past = (above / total * below).sum(1)
        assert (own.sum(1) + past).numpy() == pytest.approx(whole.numpy(), abs=2e-6)
        below = torch.einsum("bqk,bk->bq", mixing[n], below)


def test_max_flow_is_asked_for_all_positions_or_some() -> None:
    model, probe = model_of("gpt2"), probe_of("both", batch=3)
    whole, last = (hs.flow.max_flow(model, probe, at=at).matrix for at in ("all", "last"))
    mixing = torch.stack(mixing_of(model, probe)).double().numpy()
    for example in range(3):
        real = np.flatnonzero(probe.real[example])
        assert last[example, real[-1]] == pytest.approx(whole[example, real[-1]])
        assert np.isnan(last[example, real[:-1]]).all()
        for query in real[::4]:
            wanted = hs.flow.flow_of(mixing[:, example], int(query))
            assert whole[example, query] == pytest.approx(wanted, abs=1e-5)
        padding = np.flatnonzero(~probe.real[example])
        assert (whole[example, padding] == np.eye(12)[padding]).all()


def test_targets_are_averaged_over() -> None:
    model, probe = model_of("gpt2"), probe_of()
    both = torch.zeros_like(probe.real)
    both[:, [9, 11]] = True
    one, other = torch.zeros_like(both), torch.zeros_like(both)
    one[:, 9], other[:, 11] = True, True
    scores = [
        hs.flow.through_heads(model, probe, "some", at=at).per_example for at in (both, one, other)
    ]
    assert scores[0] == pytest.approx((scores[1] + scores[2]) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "both"), ("gemma2", "left"), ("bloom", "right")]
)
def test_padding_and_batches_change_nothing(family: str, kind: str) -> None:
    model, padded = model_of(family), probe_of(kind)
    methods = (hs.flow.rollout, hs.flow.alti, hs.flow.max_flow)
    flows = [method(model, padded, batch_size=2).matrix for method in methods]
    through = hs.flow.through_heads(model, padded, "some").per_example
    found = hs.flow.norms(model, padded)
    routed = hs.flow.route_scores(model, padded, part_threshold=0.0)
    for example in range(len(padded)):
        real = padded.real[example]
        alone = hs.probes.from_tokens(
            padded.tokens[example][real][None],
            marks={"some": padded.mark("some")[example][real][None]},
        )
        for method, matrix in zip(methods, flows, strict=True):
            here = matrix[example][np.ix_(real, real)]
            assert here == pytest.approx(method(model, alone).matrix[0], abs=2e-5, nan_ok=True)
        single = hs.flow.through_heads(model, alone, "some").per_example[..., 0]
        assert through[..., example] == pytest.approx(single, abs=1e-5)
        own = hs.flow.norms(model, alone)
        assert found.mixing_ratio[:, example, real] == pytest.approx(
            own.mixing_ratio[:, 0], abs=2e-5
        )
        assert found.norm_share.per_example[..., example] == pytest.approx(
            own.norm_share.per_example[..., 0], abs=2e-5
        )
        assert routed["flow"].per_example[..., example] == pytest.approx(
            hs.flow.route_scores(model, alone, part_threshold=0.0)["flow"].mean, abs=1e-4
        )
    assert np.isnan(found.mixing_ratio[:, ~padded.real.numpy()]).all()


@pytest.mark.parametrize("family", SOME)
def test_alti_is_the_slow_way(family: str) -> None:
    model, probe = model_of(family), probe_of(batch=2)
    found = hs.flow.alti(model, probe, memory=12 * 32 * 4 * 2 * 5)
    state = torch.eye(probe.length).repeat(2, 1, 1)
    for layer in slow.layers_of(model, probe):
        vectors = layer.parts.sum(2)  # batch query key d_model
        for place in range(probe.length):
            vectors[:, place, place] += layer.entering[:, place]
        whole = layer.entering + layer.attention
        bias = (whole - vectors.sum(2)).abs().max()
        wanted = layer.bias.abs().max()
        assert float(bias) == pytest.approx(float(wanted), rel=1e-3, abs=1e-4)
        near = whole.abs().sum(-1)[..., None] - (whole[:, :, None] - vectors).abs().sum(-1)
        near = near.clamp_min(0).tril()
        state = (near / near.sum(-1, keepdim=True)) @ state
    assert found.matrix == pytest.approx(state.numpy(), abs=2e-5)
    assert found.matrix.sum(-1) == pytest.approx(1, abs=1e-5)
    assert np.triu(found.matrix, 1).max() == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "granite", "bloom"])
def test_a_logit_is_split_over_tokens_as_the_slow_way_does(family: str) -> None:
    model, tokens = model_of(family), families.tokens()[0, :8]
    found = hs.flow.alti_logits(model, tokens, target=5, foil=9)
    split = hs.lens.attribute(model, tokens, 5, 9, sources=False)
    assert found.whole == pytest.approx(split.whole, rel=1e-4, abs=1e-3)
    size = max(abs(part.value) for part in split)
    assert found.mlp == pytest.approx(split.mlps, abs=1e-4 * size)
    assert found.bias == pytest.approx(split.biases.sum(), abs=1e-4 * size)
    assert found.constant == pytest.approx(split.constant, abs=1e-4 * size)
    # Below the first layer tokens are themselves; above it they are mixed as ALTI has them.
    probe = hs.probes.from_tokens(tokens[None])
    unembedding = model.unembedding
    layers = slow.layers_of(model, probe)
    last = layers[-1]
    scale = unembedding.scale((last.entering + last.attention + last.mlp)[0, -1])
    direction = unembedding.directions(torch.tensor([5, 9])).diff(dim=0)[0] / -scale
    values = torch.zeros(8)
    values[-1] = layers[0].entering[0, -1] @ direction
    state = torch.eye(8)
    for layer in layers:
        vectors = layer.parts.sum(2)[0]
        values = values + vectors[-1] @ direction @ state
        whole = (layer.entering + layer.attention)[0]
        vectors = vectors + torch.diag_embed(layer.entering[0].mT).permute(1, 2, 0)
        near = whole.abs().sum(-1)[:, None] - (whole[:, None] - vectors).abs().sum(-1)
        near = near.clamp_min(0).tril()
        state = near / near.sum(-1, keepdim=True) @ state
    assert found.values == pytest.approx(values.numpy(), abs=2e-4 * size)


@pytest.mark.parametrize("family", SOME)
def test_norms_are_the_slow_way(family: str) -> None:
    model, probe = model_of(family), probe_of(batch=2)
    found = hs.flow.norms(model, probe, memory=12 * 32 * 4 * 2 * 5)
    itself = torch.eye(probe.length).bool()
    for n, layer in enumerate(slow.layers_of(model, probe)):
        per_head = layer.parts.norm(dim=-1).transpose(1, 2)  # batch head query key
        largest = float(per_head.max())
        elsewhere = per_head.masked_fill(itself, 0).sum(-1)
        close = {"abs": 1e-4 * largest, "rel": 1e-4}
        assert found.per_head_norm[n] == pytest.approx(elsewhere.transpose(0, 1).numpy(), **close)
        vectors = layer.parts.sum(2)
        fused = vectors.norm(dim=-1)
        assert found.fused_norm[n] == pytest.approx(
            fused.masked_fill(itself, 0).sum(-1).numpy(), **close
        )
        own = vectors.diagonal(dim1=1, dim2=2).mT
        others = (vectors.sum(2) - own).norm(dim=-1)
        for form, kept in (("attention", own), ("residual", own + layer.entering)):
            ratio = others / (others + kept.norm(dim=-1))
            assert found.mixing_of(form)[n] == pytest.approx(ratio.numpy(), abs=1e-4)
        share = elsewhere[..., 1:].sum(-1) / per_head[:, :, 1:].sum((1, 2, 3))[:, None]
        assert found.norm_share.per_example[n] == pytest.approx(share.T.numpy(), abs=1e-5)
        for form, wanted in (("per_head", per_head), ("fused", fused)):
            matrix = hs.flow.norm_matrix(model, probe, n, form)
            assert matrix == pytest.approx(wanted.numpy(), **close)
    assert (found.fused_norm <= found.per_head_norm.sum(1) * (1 + 1e-5) + 1e-4).all()


def gpt2_without(*, values: bool = True, value_bias: float = 0.0) -> HeadModel:
    """A tiny GPT-2 whose value weights (and biases) are set; the output bias is none."""
    module = families.fresh("gpt2")
    width = module.config.n_embd
    with torch.no_grad():
        for block in module.transformer.h:
            block.attn.c_proj.bias.zero_()
            if not values:
                block.attn.c_attn.weight[:, 2 * width :] = 0
                block.attn.c_attn.bias[2 * width :] = value_bias
    return hs.load(module)


def test_without_values_alti_is_the_identity_and_rollout_is_not() -> None:
    model, probe = gpt2_without(values=False), probe_of()
    identity = np.eye(probe.length)
    assert hs.flow.alti(model, probe).matrix == pytest.approx(identity[None].repeat(4, 0), abs=1e-6)
    assert np.abs(hs.flow.rollout(model, probe).matrix - identity).max() > 0.3
    found = hs.flow.route_scores(model, probe)
    assert found["flow"].mean.max() == 0
    assert found["on_route"].mean.max() == 0


def test_equal_values_leave_attention_itself() -> None:
    model, probe = gpt2_without(values=False, value_bias=0.5), probe_of(batch=1)
    norms = hs.flow.norm_matrix(model, probe, 1, "per_head")[0]
    pattern = hs.capture.collect(model, probe)[1].pattern[0].numpy()
    shares = norms / norms.sum(-1, keepdims=True)
    assert shares == pytest.approx(pattern, abs=1e-5)


def test_a_head_with_values_twice_as_long_has_twice_the_share_and_the_same_rollout() -> None:
    module, width, head = families.fresh("gpt2"), 32, slice(8, 16)
    before = hs.load(families.build("gpt2"))
    with torch.no_grad():  # in the last layer, so that nothing else changes
        attention = module.transformer.h[2].attn.c_attn
        attention.weight[:, 2 * width :][:, head] *= 2
        attention.bias[2 * width :][head] *= 2
    after, probe = hs.load(module), probe_of()
    old, new = hs.flow.norms(before, probe), hs.flow.norms(after, probe)
    factor = new.moved.mean / old.moved.mean
    assert factor[2] == pytest.approx([1, 2, 1, 1], rel=1e-4)
    odds = [one.norm_share.per_example[2, 1] / one.norm_share.per_example[2, 0]
            for one in (old, new)]  # fmt: skip
    assert odds[1] / odds[0] == pytest.approx(2, rel=1e-4)
    assert hs.flow.rollout(before, probe).matrix == pytest.approx(
        hs.flow.rollout(after, probe).matrix, abs=1e-6
    )


def test_the_induction_head_carries_the_rollout_from_where_it_looks() -> None:
    made = hs.compiled.induction()
    tokens = torch.tensor([[0, 3, 5, 2, 6, 1, 4, 3]])
    inputs = torch.zeros_like(tokens, dtype=torch.bool)
    inputs[0, 2] = True
    probe = hs.probes.from_tokens(tokens, marks={"answer": inputs})
    score = hs.flow.through_heads(made.model, probe, "answer")
    # The head of layer 1 looks at position 2 alone; below it half of that stays there.
    assert score.mean[1, 0] == pytest.approx(0.25, abs=1e-4)
    flow = hs.flow.rollout(made.model, probe)
    assert flow.into(0)[[1, 2, 6, 7]] == pytest.approx([0.25] * 4, abs=1e-4)
    most = hs.flow.max_flow(made.model, probe)
    assert most.into(0)[[1, 2, 6, 7]] == pytest.approx([0.5, 0.5, 0.5, 0.5], abs=1e-4)


def test_results_are_saved_and_read(tmp_path: Path) -> None:
    model, probe = model_of("gpt2"), probe_of()
    flow = hs.flow.rollout(model, probe)
    flow.save(tmp_path / "flow.safetensors")
    assert np.array_equal(type(flow).load(tmp_path / "flow.safetensors").matrix, flow.matrix)
    found = hs.flow.norms(model, probe)
    found.save(tmp_path / "norms.safetensors")
    again = type(found).load(tmp_path / "norms.safetensors")
    assert np.array_equal(again.mixing_ratio, found.mixing_ratio, equal_nan=True)
    assert "token flow rollout: 4 texts x 12 tokens" in repr(flow)


def test_what_cannot_be_asked_is_refused_in_a_sentence() -> None:
    model, probe = model_of("gpt2"), probe_of()
    long = hs.probes.from_tokens(torch.randint(3, 60, (1, 70)))
    cases = {
        "70 tokens, and maximum flows take minutes beyond 64": lambda: hs.flow.max_flow(
            model, long
        ),
        "no mark 'other'; it has: some": lambda: hs.flow.through_heads(model, probe, "other"),
        "the inputs are all tokens": lambda: hs.flow.through_heads(model, probe, probe.real),
        "no input token is chosen": lambda: hs.flow.through_heads(model, probe, ~probe.real),
        "did you mean 'mean'": lambda: hs.flow.rollout(model, probe, heads="men"),
        "a mark's name or True and False": lambda: hs.flow.through_heads(
            model, probe, probe.real[:, :3]
        ),
        "has no attention in layer 7": lambda: hs.flow.norm_matrix(model, probe, 7),
        "unknown form 'fuse'": lambda: hs.flow.norm_matrix(model, probe, 0, "fuse"),
        "target and foil are the same": lambda: hs.flow.alti_logits(model, [3, 4], 5, 5),
        "use 'residual'": lambda: hs.flow.norms(model, probe).mixing_of("norm"),
        "the probe has 200 tokens": lambda: hs.flow.rollout(
            model, hs.probes.from_tokens(torch.randint(3, 60, (1, 200)))
        ),
    }
    for message, call in cases.items():
        with pytest.raises(InputError, match=message):
            call()
    padded = probe_of("left")
    with pytest.raises(InputError, match="padding"):
        hs.flow.through_heads(model, padded, ~padded.real)
    with pytest.raises(InputError, match="no position 0"):
        hs.flow.rollout(model, padded).into(1, 0)


def test_a_split_that_is_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hs.load(families.build("gpt2"))
    monkeypatch.setattr(type(model), "limits", {"attention_write": "its write is odd."})
    for call in (
        lambda: hs.flow.alti(model, probe_of()),
        lambda: hs.flow.norms(model, probe_of()),
        lambda: hs.flow.routes(model, [3, 4, 5]),
        lambda: hs.flow.route_scores(model, probe_of()),
    ):
        with pytest.raises(UnsupportedModelError, match="its write is odd"):
            call()
    assert hs.flow.rollout(model, probe_of()).matrix.shape == (4, 12, 12)


def test_a_sum_that_is_not_the_models_own_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hs.load(families.build("gpt2"))
    right = type(model).output_weights
    monkeypatch.setattr(type(model), "output_weights", lambda self, n: right(self, n) * 1.01)
    for call in (
        lambda: hs.flow.alti(model, probe_of()),
        lambda: hs.flow.norms(model, probe_of()),
        lambda: hs.flow.routes(model, [3, 4, 5]),
    ):
        with pytest.raises(HeadscopeError, match="not the sum of what its heads move"):
            call()
