"""Weights alone show a trained circuit: previous-token heads feed induction heads."""

import headscope as hs


def test_previous_token_heads_compose_with_induction_heads() -> None:
    model = hs.load("tiny-gpt2")
    table = hs.score(model, scorers=["previous_token", "induction"], seed=4321, progress=False)
    previous = set(table.filter("previous_token", minimum=0.7))
    induction = set(table.filter("induction", minimum=0.7))
    strongest = hs.circuits.composition(model, "K").top(len(previous) * len(induction))
    assert {first for first, _, _ in strongest} <= previous
    assert {second for _, second, _ in strongest} <= induction
