"""What heads write, given what they read: ``W_OV = W_V W_O``."""

from collections.abc import Sequence

import torch

from headscope.circuits.factors import HeadFactors
from headscope.circuits.reading import chosen_layers, need_write
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types


@own_types()
def ov(
    model: HeadModel, fold_norm: bool = True, *, layers: Sequence[int] | None = None
) -> HeadFactors:
    """OV circuit of every head: a token that is attended to adds ``x @ W_V @ W_O``.

    With ``fold_norm`` the gain of the norm before attention multiplies the rows of ``W_V``, and
    under LayerNorm both sides are centred (the norm cannot see, and no later one will see, the
    mean over d_model), so that the product acts on ``x / scale(x)``. What stays apart is the
    scale of each position, and, in ``left_bias``, the value bias and the norm's own:
    ``left_bias @ W_O`` is written whatever is attended to, since rows sum to 1, and is what
    weight folding elsewhere moves into the output bias.

    Exact as a map of normalised inputs; the scale is the only thing that weights do not know.
    ``W_O`` is the one that reaches the residual stream: where a family multiplies what attention
    writes (granite), that factor is in it, folded or not, so spectra are of what heads add.
    So is the gain of a norm that follows attention (gemma2, gemma3, olmo2), with its centring;
    that norm's scale is another positive number of each position that weights do not know, so
    sizes compare within a layer only, and ranks, ratios and composition scores are exact.

    Args:
        model: any model whose heads write linearly.
        fold_norm: False gives the bare ``W_V W_O``, value bias still apart.
        layers: layer numbers; None means all that have attention.

    Raises:
        UnsupportedModelError: where what follows attention is not a plain norm, or values are not
            what their weights give.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    Example:
        >>> factors = hs.circuits.ov(model)
        >>> factors.svd().S.shape == (model.shape.n_layers, model.shape.n_heads, model.shape.d_head)
        True
    """
    need_write(model, "its OV circuit")
    numbers = chosen_layers(model, layers)
    left, right, bias = [], [], []
    for layer in numbers:
        weights = model.weights(layer)
        model.parts.need_values(layer)
        W_V, b_V = weights.W_V.float(), weights.b_V.float()
        W_O = model.output_weights(layer).float()
        if "linear_write" in model.limits:
            W_O = model.parts.attention_write(layer).folded(W_O)
        if fold_norm:
            norm = model.parts.input_norm(layer)
            b_V = b_V + torch.einsum("d,hde->he", norm.bias.float(), W_V)
            W_V = norm.folded(W_V)
            W_O = W_O - W_O.mean(-1, keepdim=True) if norm.centred else W_O
        left.append(W_V)
        right.append(W_O)
        bias.append(b_V)
    out = torch.stack(right)
    return HeadFactors(
        left=torch.stack(left),
        right=out,
        left_bias=torch.stack(bias),
        right_bias=torch.zeros_like(out[..., 0]),
        layers=numbers,
        n_heads=model.shape.n_heads,
        name="OV",
    )
