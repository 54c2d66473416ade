"""Direct logit attribution: a logit as an exact sum over embedding, heads, MLPs and biases."""

import torch

from headscope.errors import InputError, UnsupportedModelError
from headscope.lens.checks import check_readout, need_readout, over_heads, over_layers, tolerance
from headscope.lens.prompt import Promptish, Token, read_prompt, read_token, token_texts
from headscope.lens.reading import top_of
from headscope.lens.splitting import Split
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.table.lens import Attribution


@own_types()
@torch.no_grad()
def attribute(
    model: HeadModel,
    prompt: Promptish,
    target: Token | None = None,
    foil: Token | None = None,
    *,
    position: int = -1,
    sources: bool = True,
) -> Attribution:
    """Split one logit, or the difference of two, into what every part of the model adds to it.

    ``logit = sum over parts of (part . d) / s + biases``: d is the residual direction of the
    target's logit (less that of the foil), s the final norm's denominator in this run, held fixed.
    Parts: token embedding, position embedding, every head, what attention's biases add, every
    MLP, and biases of the final norm and the unembedding. Multipliers of a family (granite,
    cohere) are in the parts. Where a norm follows attention (gemma2, gemma3, olmo2) its scale is
    held fixed as well, which keeps the split over heads exact; where it follows the MLP, the
    part is what comes out of it. Logits are those before a soft cap, in any sign.

    That the parts sum to the logit, to 1e-4 (or 1e-5 of the largest part; half precision, whose
    residual stream is rounded at every block: 5e-2 of it), and that the logit is the model's own
    is checked every time.

    Args:
        model: from :func:`headscope.load`.
        prompt: text, or token ids.
        target: token, as its text or id; default: the model's most likely next token.
        foil: token whose logit is taken off; default: none.
        position: whose next token is predicted.
        sources: also say which token's value each head moved.

    Raises:
        InputError: if the prompt, position or a token does not fit the model.
        UnsupportedModelError: if the model has no plain final norm, or its blocks are no sums.
        HeadscopeError: if a check fails.

    Source: Elhage et al. 2021; Wang et al. 2022, appendix on direct effects. Unlike the scorer
    ``direct_logit_attribution``, the mean over the vocabulary is not taken off.

    Example:
        >>> import headscope as hs
        >>> split = attribute(hs.load(), [5, 9, 5, 9], target=5, foil=9)
        >>> abs(sum(part.value for part in split) - split.whole) < 1e-4
        True
    """
    text = read_prompt(model, prompt)
    at = text.at(position)
    wanted = None if target is None else read_token(model, target)
    other = None if foil is None else read_token(model, foil, "foil")
    need_readout(model)
    tokens, where = text.ids[None], torch.tensor([at])
    if wanted is None:
        logits = model.forward(tokens, logits_at=where)[:, 0].float()
        wanted = int(top_of(logits, 1).ids[0, 0])
    if wanted == other:
        raise InputError("target and foil are the same token: their difference is always 0.")
    pair = torch.tensor([wanted] if other is None else [wanted, other], device=model.device)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float32, device=model.device)[: len(pair)]
    direction = (model.readout.directions(pair) * sign[:, None]).sum(0, keepdim=True)
    place = torch.zeros(1, dtype=torch.long, device=model.device)
    split = Split(model, place, place + at, direction, with_sources=sources)
    with model.parts.blocks_shown(split):
        logits = model.forward(tokens, observers=[split], logits_at=where)[:, 0].float()
    check_readout(model, split.residual, logits)
    constant = float((model.readout.constant(pair) * sign).sum())
    whole = (model.readout.uncapped(split.residual)[0, pair] * sign).sum()
    names = token_texts(model.tokenizer, pair.tolist())
    return Attribution(
        target=names[0],
        foil=None if other is None else names[1],
        position=at,
        tokens=text.texts[: at + 1],
        embedding=_embedding(model, int(text.ids[at]), split),
        heads=over_heads(model, split.heads)[..., 0],
        biases=over_layers(model, split.biases)[:, 0],
        mlps=over_layers(model, split.mlps)[:, 0],
        constant=constant,
        whole=float(whole),
        sources=over_heads(model, split.sources)[..., 0] if sources else None,
        tolerance=tolerance(model),
        kv_heads=model.shape.n_kv_heads,
        provenance=origin(
            model, reading="attribution", tokens=len(text), position=at, target=wanted, foil=other
        ),
    )


def _embedding(model: HeadModel, token: int, split: Split) -> dict[str, float]:
    """Token and position apart, where a token enters as a row of the embedding."""
    whole = float(split.embedding[0])
    try:
        row = model.parts.embedding[token].float()
    except UnsupportedModelError:
        return {"embedding": whole}
    by_token = float((row * split.direction[0]).sum() / split.scale[0])
    rest = whole - by_token
    # What rounding of the row itself may come to: half precision has multipliers of its own.
    rounding = 4 * torch.finfo(model.dtype).eps * row.norm() * split.direction[0].norm()
    if abs(rest) < max(1e-5 * max(1.0, abs(whole)), float(rounding / split.scale[0])):
        return {"token embedding": whole}
    return {"token embedding": by_token, "position embedding": rest}
