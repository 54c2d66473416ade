"""Catalogue of the built-in scorers. To add a scorer: write its file, and add a line here."""

from collections.abc import Iterable
from typing import Any

from headscope.base.arguments import checked
from headscope.circuits.scores import weight_scorers
from headscope.errors import InputError, nearest
from headscope.scorer import Scorer, value_weighted, without_sink
from headscope.scorers.long_need import (
    default_long_need,
    default_predicted,
    default_predicted_local,
    default_streaming_gap,
    rotary_slowness,
)
from headscope.scorers.patterns import (
    class_token,
    current_token,
    detect_head_duplicate_token,
    detect_head_induction,
    detect_head_previous_token,
    duplicate_token,
    induction,
    next_token,
    patch_neighbours,
    previous_token,
    registers,
)
from headscope.scorers.relation import (
    Relation,
    ioi_duplicate,
    ioi_induction,
    ioi_previous,
    name_mover,
    s_inhibition,
)
from headscope.scorers.retrieval import (
    importance_weighted_retrieval,
    needle_mass,
    query_focused_retrieval,
    retrieval,
    retrieval_copy_only,
    retrieval_first_token,
    retrieval_needle_only,
)
from headscope.scorers.spread import (
    attention_distance,
    delimiter,
    density,
    entropy,
    first_token,
    head_diversity,
    local_window,
    max_attention,
    normalised_entropy,
    separator,
)
from headscope.scorers.writing import (
    copying,
    direct_logit_attribution,
    direct_logit_difference,
    head_output_norm,
    loss_sensitivity,
    needle_write,
    needle_write_contrast,
)

CATALOGUE: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        previous_token,
        next_token,
        current_token,
        duplicate_token,
        induction,
        first_token,
        delimiter,
        separator,
        local_window,
        attention_distance,
        entropy,
        normalised_entropy,
        max_attention,
        density,
        head_diversity,
        patch_neighbours,
        class_token,
        registers,
        without_sink(previous_token),
        without_sink(current_token),
        without_sink(duplicate_token),
        without_sink(induction),
        without_sink(delimiter),
        without_sink(local_window),
        without_sink(attention_distance),
        without_sink(entropy),
        without_sink(normalised_entropy),
        without_sink(max_attention),
        value_weighted(previous_token),
        value_weighted(duplicate_token),
        value_weighted(induction),
        value_weighted(first_token),
        value_weighted(delimiter),
        copying,
        direct_logit_attribution,
        direct_logit_difference,
        head_output_norm,
        name_mover,
        s_inhibition,
        ioi_induction,
        ioi_duplicate,
        ioi_previous,
        retrieval,
        retrieval_first_token,
        retrieval_needle_only,
        retrieval_copy_only,
        needle_mass,
        query_focused_retrieval,
        importance_weighted_retrieval,
        needle_write,
        needle_write_contrast,
        default_streaming_gap,
        default_long_need,
        default_predicted,
        default_predicted_local,
        rotary_slowness,
        detect_head_previous_token,
        detect_head_duplicate_token,
        detect_head_induction,
        loss_sensitivity,
        *weight_scorers(),
    )
}

# Scorers of a plain scan, minus those that do not apply to a family: two short passes and a
# control.
DEFAULT: tuple[str, ...] = (
    "previous_token",
    "next_token",
    "current_token",
    "duplicate_token",
    "induction",
    "first_token",
    "delimiter",
    "separator",
    "local_window",
    "attention_distance",
    "entropy",
    "patch_neighbours",
    "class_token",
    "registers",
    "copying",
    "direct_logit_attribution",
)


@checked
def resolve(scorers: Iterable[str | Scorer | Relation] | Scorer) -> tuple[Scorer, ...]:
    """Turn names and scorers into scorers, in the order given.

    Args:
        scorers: names, scorers and relations.

    Returns:
        Scorers in the same order.

    Raises:
        InputError: for an unknown name, with the nearest one, or two scorers of one name.

    Example:
        >>> [scorer.name for scorer in resolve("induction")]
        ['induction']
    """
    wanted = [scorers] if isinstance(scorers, (str, Scorer)) else _flattened(scorers)
    found: dict[str, Scorer] = {}
    for one in wanted:
        if not isinstance(one, (str, Scorer)):
            raise InputError(
                f"{one!r} is not a scorer: give a name, or decorate it with row_scorer."
            )
        if isinstance(one, str) and one not in CATALOGUE:
            raise InputError(nearest(one, CATALOGUE, kind="scorer"))
        scorer = CATALOGUE[one] if isinstance(one, str) else one
        if scorer.name in found:
            raise InputError(f"two scorers are named {scorer.name!r}: leave one out or rename it.")
        found[scorer.name] = scorer
    return tuple(found.values())


def _flattened(scorers: Iterable[object]) -> list[Any]:
    """Flatten a list in which relations stand for their scorers."""
    return [
        one for given in scorers for one in (given if isinstance(given, Relation) else (given,))
    ]
