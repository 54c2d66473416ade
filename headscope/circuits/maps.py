"""MAPS: which relations a head's weights implement, and what a head maps to what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.glance import Glance, Shown, number
from headscope.base.saved import Saved
from headscope.circuits.dictionary import Dictionary
from headscope.circuits.factors import HeadFactors
from headscope.circuits.ov import ov
from headscope.circuits.ranks import Ranks, target_ranks
from headscope.circuits.relations import Relation, relations
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.origin import of_weights
from headscope.progress import Advance, track
from headscope.table import HeadScores, HeadTable


def relation_scores(
    model: HeadModel,
    pairs: Mapping[str, Relation] | None = None,
    k: int = 10,
    *,
    first_mlp: bool = True,
    fold_norm: bool = False,
    heads: "Sequence[str | tuple[int, int]] | None" = None,
    progress: bool | None = None,
) -> HeadTable:
    """Relation scores of every head: share of pairs whose target is in the source's top k.

    ``phi = mean(target in top_k((E[source] @ W_V @ W_O @ W_U.T)))``; scores named ``maps_R`` and,
    with the k smallest logits, ``maps_R_suppressed``. Range [0, 1]; chance is k / vocabulary.
    ``copy`` has a tenth of k, rounded up, as in the paper: 1 for 10, 3 for 25. Biases are left out.

    Args:
        model: any model whose heads write linearly.
        pairs: relations; None: those of :func:`relations`.
        k: largest rank that counts; the paper has 10, and 25 for large vocabularies.
        first_mlp: heads above layer 0 see what the first MLP makes of the embedding, alone, as
            the paper does; False: the raw embedding.
        fold_norm: fold the gains of the norms and centre; the paper does not.
        heads: only these; the others have no value. None: all.
        progress: show a bar; None: on a terminal or in a notebook.

    Source: Elhelo and Geva 2024, "Inferring Functionality of Attention Heads from their
    Parameters" (MAPS). Ties go to the lowest token id.

    Example:
        >>> table = hs.circuits.relation_scores(model)
        >>> "copy" in list(table)[0]
        True
    """
    chosen = relations(model) if pairs is None else pairs
    if not chosen:
        raise InputError("there are no relations to score: none has enough single-token pairs.")
    words = Dictionary(model, "mlp_only" if first_mlp else "raw", fold_norm)
    asked = None if heads is None else [model.shape.check(HeadIndex.parse(one)) for one in heads]
    source = torch.cat([one.source for one in chosen.values()])
    target = torch.cat([one.target for one in chosen.values()])

    def ranks_of(factors: HeadFactors, advance: Advance | None = None) -> Ranks:
        def vectors(layer: int) -> Tensor:
            return words.inputs(source, layer)

        return target_ranks(
            factors, vectors, words.outputs, target, words.size, limit=k, advance=advance
        )

    size = (model.shape.n_layers, model.shape.n_heads)
    ranks = {side: np.full((*size, len(target)), np.nan) for side in Ranks._fields}
    if asked is None:
        factors = ov(model, fold_norm)
        with track(1, "scoring relations", show=progress) as advance:
            found = ranks_of(factors, advance)
        for side in Ranks._fields:
            ranks[side][list(factors.layers)] = getattr(found, side).cpu().numpy()
    for head in asked or ():
        found = ranks_of(ov(model, fold_norm, layers=[head.layer]).only(head))
        for side in Ranks._fields:
            ranks[side][head] = getattr(found, side)[0, 0].cpu().numpy()
    facts = of_weights(model, circuit="MAPS", k=k, first_mlp=first_mlp, fold_norm=fold_norm)
    scores, at = [], 0
    for name, one in chosen.items():
        limit = -(-k // 10) if name == "copy" else k
        for suffix, side in (("", "promoted"), ("_suppressed", "suppressed")):
            part = ranks[side][..., at : at + len(one)]
            scored = np.isfinite(part[..., 0])
            share = np.where(scored, (part < limit).mean(-1), np.nan)
            scores.append(
                HeadScores.from_summary(
                    f"maps_{name}{suffix}",
                    share,
                    kv_heads=model.shape.n_kv_heads,
                    n=scored * len(one),
                    unit="share of pairs",
                    bounds=(0.0, 1.0),
                    description=f"{'demotes' if suffix else 'promotes'} the {name} of a token",
                    source=f"MAPS, Elhelo and Geva 2024, k={limit}",
                    provenance=facts,
                )
            )
        at += len(one)
    return HeadTable(scores)


@dataclass(frozen=True, eq=False, repr=False)
class Mappings(Saved, Shown):
    """What one head makes of the tokens that it responds to most.

    Attributes:
        head: whose mappings they are.
        source: tokens, most salient first.
        saliency: length of the write over length of the input.
        promoted: tokens with the largest logits, for each source.
        suppressed: tokens with the smallest.
    """

    head: HeadIndex
    source: Int[Tensor, " source"]
    saliency: Float[Tensor, " source"]
    promoted: Int[Tensor, "source target"]
    suppressed: Int[Tensor, "source target"]

    def glance(self) -> Glance:
        """Most salient tokens and what they become, as ids."""
        rows = [
            (str(source), number(size), " ".join(map(str, ids[:5])))
            for source, size, ids in zip(
                self.source.tolist(), self.saliency.tolist(), self.promoted.tolist(), strict=True
            )
        ]
        return Glance(
            f"mappings of {self.head}",
            [f"{len(rows)} source tokens"],
            ("source id", "saliency", "promoted ids"),
            rows[:10],
            hint="model.tokenizer.decode(mappings.promoted[0])",
        )


def salient_mappings(
    model: HeadModel,
    head: "str | tuple[int, int]",
    sources: int = 20,
    targets: int = 10,
    *,
    first_mlp: bool = True,
    fold_norm: bool = False,
) -> Mappings:
    """Strongest mappings of one head: tokens by ``|e @ W_OV| / |e|``, and what they become.

    The first MLP is applied as in :func:`relation_scores`, above layer 0 alone (the paper's
    saliency figures applied it in layer 0 too).

    Source: Elhelo and Geva 2024, section 3.

    Example:
        >>> found = hs.circuits.salient_mappings(model, "L2H1", sources=3, targets=2)
        >>> type(found).__name__
        'Mappings'
    """
    index = model.shape.check(HeadIndex.parse(head))
    factors = ov(model, fold_norm, layers=[index.layer])
    left = factors.left[0, model.shape.kv_head(index.head)]
    right = factors.right[0, index.head]
    words = Dictionary(model, "mlp_only" if first_mlp else "raw", fold_norm)
    gram, parts = right @ right.T, []
    for block in words.blocks():
        x = words.inputs(block, index.layer)
        inner = x @ left
        written = ((inner @ gram) * inner).sum(-1).clamp_min(0).sqrt()
        parts.append(written / x.norm(dim=-1).clamp_min(1e-12))
    saliency = torch.cat(parts)
    order = saliency.argsort(descending=True, stable=True)[:sources]
    writes = words.inputs(order, index.layer) @ left @ right
    logits = torch.cat([writes @ words.outputs(block).T for block in words.blocks()], 1)
    most = logits.argsort(dim=1, descending=True, stable=True)[:, :targets]
    least = logits.argsort(dim=1, stable=True)[:, :targets]
    return Mappings(index, order, saliency[order], most, least)
