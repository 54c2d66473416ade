"""Run a head program on token ids, position by position: the slow, obvious semantics."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from headscope.compiled.program import Head, Lookup, Program
from headscope.errors import InputError
from headscope.heads import HeadIndex


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What a program does with some texts.

    Attributes:
        variables: by name, the distribution over values at each position, ``[batch pos value]``;
            a numeric variable has one number, ``[batch pos 1]``.
        patterns: by head, what each query attends to, ``[batch query key]``; rows sum to 1.
        output: distribution over tokens that the logits show, ``[batch pos token]``.
    """

    variables: Mapping[str, Float[np.ndarray, "batch pos value"]]
    patterns: Mapping[HeadIndex, Float[np.ndarray, "batch query key"]]
    output: Float[np.ndarray, "batch pos token"]


def interpret(program: Program, tokens: Int[np.ndarray, "batch pos"]) -> Interpretation:
    """Run a program.

    Args:
        program: what to run.
        tokens: ids; every text begins with the BOS (0).

    Raises:
        InputError: if a text lacks the BOS, is too long or has unknown ids.

    Example:
        >>> from headscope.compiled.library import induction_program
        >>> found = interpret(induction_program(tokens=4, length=6), np.array([[0, 1, 2, 1]]))
        >>> int(found.output[0, -1].argmax())
        2
    """
    _check(program, tokens)
    variables = _embedded(program, tokens)
    patterns = {}
    for layer in range(program.n_layers):
        written = {}
        for head in program.heads:
            if head.layer == layer:
                pattern = _pattern(head, variables)
                patterns[program.addresses[head.output]] = pattern
                written[head.output] = pattern @ variables[head.value]
        variables = {**variables, **written}
        looked = {t.output: _looked_up(t, variables) for t in program.lookups if t.layer == layer}
        variables = {**variables, **looked}
    shown = np.mean([variables[output] for output in program.outputs], 0)
    return Interpretation(variables, patterns, shown)


def value_at_start(program: Program, name: str) -> int:
    """Return the value of a categorical variable at position 0, which is the same in every text."""
    start = interpret(program, np.zeros((1, 1), int))
    return int(start.variables[name][0, 0].argmax())


def _check(program: Program, tokens: Int[np.ndarray, "batch pos"]) -> None:
    if tokens.shape[1] > program.length:
        raise InputError(
            f"texts of {tokens.shape[1]} tokens: {program.name!r} takes at most {program.length}."
        )
    if tokens.min() < 0 or tokens.max() >= program.tokens:
        raise InputError(f"token ids must be 0 to {program.tokens - 1} for {program.name!r}.")
    if (tokens[:, 0] != 0).any():
        raise InputError(f"every text of {program.name!r} must begin with the BOS, token 0.")


def _embedded(
    program: Program, tokens: Int[np.ndarray, "batch pos"]
) -> dict[str, Float[np.ndarray, "batch pos value"]]:
    position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    variables = {
        "token": np.eye(program.tokens)[tokens],
        "position": np.eye(program.length)[position],
        "one": np.ones((*tokens.shape, 1)),
    }
    for feature in program.features:
        values = np.array(feature.values)[tokens]
        categorical = feature.size > 0
        variables[feature.name] = (
            np.eye(feature.size)[values.astype(int)] if categorical else values[..., None]
        )
    return variables


def _pattern(
    head: Head, variables: Mapping[str, Float[np.ndarray, "batch pos value"]]
) -> Float[np.ndarray, "batch query key"]:
    queries, keys = (_single(name, variables) for name in (head.query, head.key))
    batch, length = queries.shape
    pattern = np.zeros((batch, length, length))
    for b in range(batch):
        for i in range(length):
            chosen = [
                j
                for j in range(i + 1)
                if head.predicate.holds(int(queries[b, i]), int(keys[b, j]))
                and not (head.others_only and i == j)
            ]
            if head.ties == "last":
                chosen = chosen[-1:]
            elif head.ties == "largest" and chosen:
                most = max(keys[b, chosen])
                chosen = [j for j in chosen if keys[b, j] == most]
            if not chosen:
                chosen = [0] if head.default == "first" else list(range(i + 1))
            pattern[b, i, chosen] = 1 / len(chosen)
    return pattern


def _looked_up(
    lookup: Lookup, variables: Mapping[str, Float[np.ndarray, "batch pos value"]]
) -> Float[np.ndarray, "batch pos looked_up"]:
    if lookup.cuts:
        inputs = [np.searchsorted(lookup.cuts, variables[lookup.inputs[0]][..., 0])]
    else:
        inputs = [_single(name, variables) for name in lookup.inputs]
    values = np.vectorize(lookup.maps, otypes=[int])(*inputs)
    one_hot: Float[np.ndarray, "batch pos looked_up"] = np.eye(lookup.size)[values]
    return one_hot


def _single(
    name: str, variables: Mapping[str, Float[np.ndarray, "batch pos value"]]
) -> Int[np.ndarray, "batch pos"]:
    """Return the value of a variable that holds a single one everywhere."""
    if (variables[name].max(-1) < 1 - 1e-6).any():
        raise InputError(
            f"variable {name!r} is a mixture of values here, and it is read as a single one: "
            "let the head that writes it take ties='last'."
        )
    values: Int[np.ndarray, "batch pos"] = variables[name].argmax(-1)
    return values
