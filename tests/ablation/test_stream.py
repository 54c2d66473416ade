"""Patching of the residual stream equals plain hooks on the model's own modules."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import headscope as hs
from headscope.errors import InputError, UnsupportedModelError
from headscope.table import EffectGrid
from tests.models import families

# By family: its blocks, and in a block the modules whose outputs are added to the stream.
PARTS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "gpt2": (lambda m: m.transformer.h, "attn", "mlp"),
    "llama": (lambda m: m.model.layers, "self_attn", "mlp"),
    "gpt_neox": (lambda m: m.gpt_neox.layers, "attention", "mlp"),
    "gemma2": (lambda m: m.model.layers, "post_attention_layernorm", "post_feedforward_layernorm"),
}


def pair(real: Tensor | None = None) -> hs.probes.Probe:
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    clean, corrupt = (hs.probes.from_tokens(one, real) for one in (ids, ids.roll(1, 0)))
    end = torch.zeros(3, 7, dtype=torch.bool)
    end[:, 5] = True
    clean = replace(clean, targets=torch.where(end, targets, -1), marks={"late": end})
    return replace(clean, corrupt=corrupt)


def answer_log_prob(logits: Tensor, probe: hs.probes.Probe) -> Tensor:
    rows = logits[:, 5].float().log_softmax(-1)
    return rows.gather(1, probe.targets[:, 5:6].to(rows.device))[:, 0]


@torch.no_grad()
def by_hooks(family: str, site: str, probe: hs.probes.Probe) -> np.ndarray:
    """Effects ``[layer position example]`` by hooks of torch on eager attention."""
    module = families.fresh(family)
    module.set_attn_implementation("eager")
    find, attention, mlp = PARTS[family]
    blocks = find(module)

    def part(layer: int) -> nn.Module:
        name = {"attn_out": attention, "mlp_out": mlp}.get(site)
        return blocks[layer] if name is None else getattr(blocks[layer], name)

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def run(tokens: Tensor, layer: int, act: Callable[[Tensor], Tensor]) -> Tensor:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (act(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": act(kwargs["hidden_states"])}

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            made = act(first(output))
            return (made, *output[1:]) if isinstance(output, tuple) else made

        if site == "resid_pre":
            handle = part(layer).register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = part(layer).register_forward_hook(after)
        try:
            return answer_log_prob(module(tokens, use_cache=False).logits, probe)
        finally:
            handle.remove()

    clean = answer_log_prob(module(probe.tokens, use_cache=False).logits, probe)
    effects = np.zeros((len(blocks), probe.length, len(probe)))
    for layer in range(len(blocks)):
        kept: list[Tensor] = []
        run(probe.corrupt.tokens, layer, lambda x, kept=kept: kept.append(x.clone()) or x)
        for at in range(probe.length):

            def put(x: Tensor, at: int = at, kept: list[Tensor] = kept) -> Tensor:
                x = x.clone()
                x[:, at] = kept[0][:, at]
                return x

            effects[layer, at] = (run(probe.tokens, layer, put) - clean).numpy()
    return effects


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "resid_post"])
@pytest.mark.parametrize("family", PARTS)
def test_e16_effects_are_those_of_plain_hooks(family: str, site: str) -> None:
    probe = pair()
    grid = hs.patch_stream(
        hs.load(families.build(family), check=False),
        probe,
        hs.metrics.answer_log_prob,
        site,
        progress=False,
    )
    assert grid.axes == ("layer", "position")
    expected = by_hooks(family, site, probe)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(grid.per_example, expected, atol=1e-5 * np.abs(expected).max())


def test_e16_ends_and_directions() -> None:
    model, probe = hs.load(families.build("llama"), check=False), pair()
    noise, denoise = (
        hs.patch_stream(model, probe, hs.metrics.answer_log_prob, "resid_post", direction=one,
                        positions="late", progress=False)
        for one in ("noise", "denoise")
    )  # fmt: skip
    assert noise.labels == (("L0", "L1", "L2"), ("late",))
    # At the last layer nothing but the patched position is read: the other run's own value.
    np.testing.assert_allclose(noise.normalised()[-1], [0.0], atol=1e-4)
    np.testing.assert_allclose(denoise.normalised()[-1], [1.0], atol=1e-4)
    np.testing.assert_allclose(noise.pair, denoise.pair, atol=1e-5)


def test_e16_batches_padding_and_layers() -> None:
    model = hs.load(families.build("llama"), check=False)
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, :2] = False
    probe = pair(real)
    whole = hs.patch_stream(model, probe, hs.metrics.answer_log_prob, "mlp_out", progress=False)
    parts = hs.patch_stream(
        model, probe, hs.metrics.answer_log_prob, "mlp_out", layers=[2, 0], batch_size=1,
        memory="1MB", progress=False,
    )  # fmt: skip
    assert parts.labels[0] == ("L2", "L0")
    np.testing.assert_allclose(parts.per_example, whole.per_example[[2, 0]], atol=1e-5)
    assert np.isnan(whole.per_example[:, :2, 1]).all()
    assert np.isfinite(np.delete(whole.per_example, 1, axis=2)).all()


def test_e16_a_grid_is_saved_and_drawn(tmp_path: Any) -> None:
    model = hs.load(families.build("gpt2"), check=False)
    grid = hs.patch_stream(model, pair(), hs.metrics.answer_log_prob, progress=False)
    grid.save(tmp_path / "grid.safetensors")
    again = EffectGrid.load(tmp_path / "grid.safetensors")
    np.testing.assert_array_equal(again.per_example, grid.per_example)
    assert again.labels == grid.labels
    drawn = hs.plots.heatmap(again).data[0]
    np.testing.assert_allclose(np.array(drawn.z), grid.mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "resid_mid"}, "unknown site of the residual stream 'resid_mid'"),
        ({"site": "z"}, "unknown site of the residual stream 'z'"),
        ({"layers": [9]}, "needs a layer of .*, 0 to 2; got 9"),
        ({"layers": []}, "name each layer once"),
        ({"layers": [1, 1]}, "name each layer once"),
        ({"direction": "both"}, "'noise' or 'denoise'"),
        ({"positions": "nowhere"}, "nowhere"),
    ],
)
def test_e16_what_does_not_fit_is_refused_before_a_pass(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hs.load(families.build("gpt2"), check=False)
    monkeypatch.setattr(type(model), "run", lambda *_, **__: pytest.fail("a pass ran"))
    with pytest.raises(InputError, match=message):
        hs.patch_stream(model, pair(), hs.metrics.answer_log_prob, **options)
    with pytest.raises(InputError, match="needs a pair"):
        hs.patch_stream(model, replace(pair(), corrupt=None), hs.metrics.loss)


def test_e16_sums_that_are_none_are_refused() -> None:
    """Layers without attention add one thing, which is neither attention's nor an MLP's alone."""
    model = hs.load(families.build("gpt2"), check=False)
    model.parts.__dict__["_writers"] = {}
    with pytest.raises(UnsupportedModelError, match="read resid_post"):
        hs.patch_stream(model, pair(), hs.metrics.answer_log_prob, "mlp_out", progress=False)
