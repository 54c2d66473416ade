"""Importance scores that look at no metric: size of the weights, of the outputs, confidence."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.models.protocol import HeadModel
from headscope.origin import of_weights
from headscope.probes.probe import Probe
from headscope.rows import AttentionRows
from headscope.scorers import row_scorer
from headscope.scoring import score
from headscope.table import HeadScores


def weight_norm(model: HeadModel) -> HeadScores:
    """Frobenius norm of ``W_V W_O``: how long a head's write is for inputs in all directions.

    The plain magnitude baseline of pruning (Han et al. 2015, arXiv 1506.02626, for heads). From 0
    up; under grouped-query attention with the key/value head that the head reads. No norm or
    residual multiplier is folded in. Computed from the Gram matrices of the two factors.

    Raises:
        UnsupportedModelError: if the weights cannot be split by heads.

    Example:
        >>> bool((hs.pruning.weight_norm(model).mean > 0).all())
        True
    """
    shape = model.shape
    values = np.full((shape.n_layers, shape.n_heads), np.nan)
    for layer in shape.attention_layers:
        weights = model.weights(layer)
        reads, writes = weights.W_V.float(), weights.W_O.float()
        reads = (reads.mT @ reads).cpu().double().repeat_interleave(shape.group_size, dim=0)
        squared = (reads * (writes @ writes.mT).cpu().double()).sum((1, 2))
        values[layer] = squared.clamp_min(0).sqrt().numpy()
    return HeadScores.from_summary(
        "weight_norm",
        values,
        kv_heads=shape.n_kv_heads,
        bounds=(0.0, None),
        description="Frobenius norm of W_V W_O.",
        source="magnitude pruning, Han et al. 2015, arXiv 1506.02626",
        provenance=of_weights(model),
    )


def output_norm(model: HeadModel, probe: Probe, *, batch_size: int | None = None) -> HeadScores:
    """Mean length of what a head writes, ``E |z W_O|``, over a probe: the activation baseline.

    The scorer ``head_output_norm`` of :func:`headscope.score`, by itself.

    Example:
        >>> bool((hs.pruning.output_norm(model, probe).mean > 0).all())
        True
    """
    return score(model, probe, "head_output_norm", batch_size=batch_size)["head_output_norm"]


def confidence(model: HeadModel, probe: Probe, *, batch_size: int | None = None) -> HeadScores:
    """Mean over queries of a head's largest attention weight, sinks left out.

    From 0 to 1. Source: Voita et al. 2019 (arXiv 1905.09418), section 4: the average of a
    head's maximum attention weight, the end-of-sentence symbol excluded. Excluded as keys are
    end-of-sequence tokens, and the first real token, on which decoder-only models park attention
    as the paper's encoders do on the end of the sentence. Weights are not renormalised. The first
    query is in no mean.

    Args:
        model: from :func:`headscope.load`.
        probe: what to run: text.
        batch_size: examples per pass; changes nothing but time and memory.

    Example:
        >>> bool((hs.pruning.confidence(model, probe).mean <= 1).all())
        True
    """
    end = getattr(model.tokenizer, "eos_token_id", None)

    @row_scorer(
        unit="attention",
        bounds=(0.0, 1.0),
        probe="text",
        source="Voita et al. 2019, arXiv 1905.09418, section 4",
    )
    def confidence(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        """Largest attention weight of a query, first and end-of-sequence tokens left out."""
        keys = torch.arange(rows.pattern.shape[-1], device=rows.pattern.device)
        sink = keys == probe.first[:, None]
        if end is not None:
            sink = sink | (probe.tokens[:, : len(keys)] == end)
        return rows.pattern.masked_fill(sink[:, None, None], 0.0).amax(-1)

    return score(model, probe, confidence, batch_size=batch_size)["confidence"]
