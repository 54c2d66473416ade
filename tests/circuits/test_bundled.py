"""Weights alone show a trained circuit: previous-token heads feed induction heads."""

import headscope as hs


def test_previous_token_heads_are_what_induction_heads_keys_read_most() -> None:
    model = hs.load("tiny-gpt2")
    table = hs.score(model, scorers=["previous_token", "induction"], seed=4321, progress=False)
    previous = set(table.filter("previous_token", minimum=0.7))
    induction = table.filter("induction", minimum=0.7)
    assert previous
    assert induction
    pairs = hs.circuits.composition(model, "K")
    for reader in induction:
        fed = [first for first, second, _ in pairs.top(pairs.values.size) if second == reader]
        assert set(fed[: len(previous)]) == previous
    copying = hs.circuits.copying_eigenvalues(
        hs.circuits.ov(model), hs.circuits.Dictionary(model, "mlp")
    )
    assert min(float(copying[head]) for head in induction) > 0.9
