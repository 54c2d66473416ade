"""Cross-attention of a UNet and of a DiT against diffusers' own attention and plain hooks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.errors import InputError, UnsupportedModelError

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

BUILDS: dict[str, Any] = {
    "unet": lambda: diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(2, 4),
    ),
    "dit": lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=12,
        use_additional_conditions=False,
    ),
}  # fmt: skip


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    module = BUILDS[name]()
    with torch.no_grad():
        for path, weight in module.named_parameters():
            if weight.ndim == 2 and "attn" in path:
                weight.normal_(0, 0.4)
    return module.eval()


def inputs_of(name: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": 2 * torch.randn(2, 5, 12, generator=draw),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    if name == "dit":
        found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return {"hidden_states": latents, **found}
    return {"sample": latents, **found}


def eager(
    module: Any, inputs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Rows, head outputs and prediction by diffusers' own code, by the name of the attention."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    rows: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    before, undo = {}, []
    for path, one in module.named_modules():
        if not isinstance(one, Attention) or not one.is_cross_attention:
            continue
        before[path] = one.processor
        one.processor = AttnProcessor()
        known = (path, one.get_attention_scores, one.heads)

        def scores(query: Tensor, key: Tensor, mask: Any = None, at: Any = known) -> Tensor:
            found: Tensor = at[1](query, key, mask)
            rows[at[0]] = found.unflatten(0, (-1, at[2]))
            return found

        def into(_module: Any, args: tuple[Tensor], path: str = path) -> None:
            outputs[path] = args[0]

        one.get_attention_scores = scores
        undo.append(one.to_out[0].register_forward_pre_hook(into))
    try:
        with torch.no_grad():
            said = module(**inputs, return_dict=False)[0]
    finally:
        for path, processor in before.items():
            one = module.get_submodule(path)
            one.processor = processor
            del one.get_attention_scores
        for handle in undo:
            handle.remove()
    return rows, outputs, said


@pytest.mark.parametrize("name", sorted(BUILDS))
def test_rows_outputs_and_predictions_are_diffusers_own(name: str) -> None:
    module, inputs = model_of(name), inputs_of(name)
    processors = {path: type(one) for path, one in module.attn_processors.items()}
    model = hs.diffusion.load(module)
    rows, outputs, said = eager(module, inputs)
    assert set(rows) == {layer.name for layer in model.layers}
    assert [layer.name for layer in model.layers] == list(rows)  # in the order of a pass
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    found = model.run(inputs, read=lambda layer, *what: seen.setdefault(layer, []).append(what))
    torch.testing.assert_close(found, said, atol=1e-5, rtol=1e-5)
    weights = hs.diffusion.token_attention(model, inputs).weights
    for layer, one in enumerate(model.layers):
        ((pattern, z),) = seen[layer]
        own = rows[one.name]
        torch.testing.assert_close(pattern, own, atol=1e-5, rtol=0)
        assert float(own.amax(-1).median()) > 0.3  # far from flat
        size = float(outputs[one.name].abs().max())
        torch.testing.assert_close(
            z.transpose(1, 2).flatten(2), outputs[one.name], atol=1e-5 * size, rtol=0
        )
        np.testing.assert_allclose(weights[:, layer, : one.n_heads], own.mean(2), atol=1e-5)
        assert np.isnan(weights[:, layer, one.n_heads :]).all()
    assert {path: type(one) for path, one in module.attn_processors.items()} == processors
    if name == "unet":
        assert len({layer.n_heads for layer in model.layers}) == 2
    assert float(weights[1, 0, 0, 3:].max()) < 1e-6  # tokens that the mask hides


@pytest.mark.parametrize("name", sorted(BUILDS))
def test_ablations_are_those_of_plain_hooks(name: str) -> None:
    module, inputs = model_of(name), inputs_of(name)
    model = hs.diffusion.load(module)
    zero = hs.diffusion.ablate_heads(model, inputs)
    mean = hs.diffusion.ablate_heads(model, inputs, "mean", "X0H1")
    _, outputs, said = eager(module, inputs)
    for layer, head in ((0, 1), (len(model.layers) - 1, 0)):
        one = model.layers[layer]
        part = slice(head * one.d_head, (head + 1) * one.d_head)
        for method, scores in (("zero", zero), ("mean", mean)):
            if method == "mean" and layer:
                continue
            new = 0 if method == "zero" else outputs[one.name][..., part].mean((0, 1))

            def replaced(_module: Any, args: tuple[Tensor], at: Any = (part, new)) -> Any:
                z = args[0].clone()
                z[..., at[0]] = at[1]
                return (z,)

            handle = module.get_submodule(one.name).to_out[0].register_forward_pre_hook(replaced)
            with torch.no_grad():
                edited = module(**inputs, return_dict=False)[0]
            handle.remove()
            change = (edited - said).flatten(1).norm(dim=1) / said.flatten(1).norm(dim=1)
            np.testing.assert_allclose(scores.per_example[layer, head], change, atol=1e-5)
            assert float(change.min()) > 1e-4
    assert zero.stack == "cross"
    assert np.isfinite(zero.per_example[:, 0]).all()
    assert np.isfinite(mean.per_example).sum() == 2


def test_tokens_are_scored_and_misuse_is_told() -> None:
    module, inputs = model_of("unet"), inputs_of("unet")
    model = hs.diffusion.load(module)
    found = hs.diffusion.token_attention(model, inputs)
    scores = found.to([0, 1])
    np.testing.assert_allclose(
        scores.per_example[0, 1], found.weights[:, 0, 1, :2].sum(-1), atol=1e-12
    )
    np.testing.assert_allclose(found.to(range(5)).mean[0, 0], 1.0, atol=1e-5)
    assert str(scores.top(1)[0][0]).startswith("X")
    hs.plots.heatmap(scores)
    with pytest.raises(InputError, match="the text has tokens 0 to 4"):
        found.to(5)
    with pytest.raises(InputError, match="has no head X9H9"):
        hs.diffusion.ablate_heads(model, inputs, heads="X9H9")
    with pytest.raises(InputError, match="method='median' is unknown"):
        hs.diffusion.ablate_heads(model, inputs, "median")
    with pytest.raises(InputError, match="needs 'encoder_hidden_states'"):
        model.run({"sample": inputs["sample"], "timestep": 3})
    with pytest.raises(InputError, match="is not a diffusers model"):
        hs.diffusion.load(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="has no cross-attention"):
        hs.diffusion.load(
            diffusers.UNet2DModel(
                sample_size=8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            )
        )  # fmt: skip


def test_attention_to_tokens_is_shown_and_comes_back_from_a_file(tmp_path: Path) -> None:
    model = hs.diffusion.load(model_of("unet"))
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": 9,
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }
    found = hs.diffusion.token_attention(model, inputs)
    found.save(tmp_path / "tokens.safetensors")
    again = hs.diffusion.TokenAttention.load(tmp_path / "tokens.safetensors")
    np.testing.assert_array_equal(again.weights, found.weights)
    assert again.summary() == found.summary()
    assert "<table" in found._repr_html_()
    frame = found.to_pandas()
    np.testing.assert_allclose(frame.groupby("head").attention.sum(), 1, atol=1e-5)
    assert set(frame["head"]) == {str(head) for head in model.heads}


def test_inputs_that_a_denoiser_cannot_read_are_told() -> None:
    model = hs.diffusion.load(model_of("unet"))
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": 9}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 12)
    for change, said in (
        ({"encoder_hidden_states": torch.randn(2, 5, 7)}, "cannot read these inputs: mat1"),
        ({"encoder_hidden_states": torch.randn(3, 5, 12)}, "cannot read these inputs: The size"),
        ({"other": 1}, "cannot read these inputs: .*unexpected keyword argument 'other'"),
        ({"sample": torch.full((2, 4, 8, 8), torch.nan)}, "'sample' holds numbers that are not"),
    ):
        with pytest.raises(InputError, match=said):
            hs.diffusion.token_attention(model, {**inputs, **change})
    for heads, said in (([], "no heads given"), (["E0H0"], "has no E0H0")):
        with pytest.raises(InputError, match=said):
            hs.diffusion.ablate_heads(model, inputs, heads=heads)
