"""Head programs: specifications of small exact models, head by head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.base.arguments import checked
from headscope.errors import InputError, nearest, whole
from headscope.heads import HeadIndex

EMBEDDED = ("token", "position", "one")


@dataclass(frozen=True)
class Predicate:
    """Relation between query and key values that a head attends along.

    Attributes:
        name: short description, shown in tables of programs.
        holds: ``(query value, key value) -> bool``.
        distance: distance of a fixed position offset; None for other predicates. Rotary models have
            no position variable but can express offsets.
    """

    name: str
    holds: Callable[[int, int], bool]
    distance: int | None = None

    def matrix(self, queries: int, keys: int) -> Bool[np.ndarray, "query_value key_value"]:
        """Return the predicate as a table over all values of both variables."""
        return np.array([[self.holds(q, k) for k in range(keys)] for q in range(queries)], bool)


@checked
def same() -> Predicate:
    """Select keys whose value equals the query's.

    Example:
        >>> hs.compiled.same().matrix(2, 2).tolist()
        [[True, False], [False, True]]
    """
    return Predicate("same", lambda query, key: query == key)


@checked
def offset(distance: int) -> Predicate:
    """Select the key ``distance`` positions before the query.

    Args:
        distance: number of positions to look back; 0 is the query's own position.

    Raises:
        InputError: if the distance is not a whole number of at least 0.

    Example:
        >>> hs.compiled.offset(1).matrix(2, 2).tolist()
        [[False, False], [True, False]]
    """
    whole(distance, "distance", 0)
    return Predicate(f"offset {distance}", lambda query, key: query - key == distance, distance)


@checked
def always() -> Predicate:
    """Select every key.

    Example:
        >>> bool(hs.compiled.always().matrix(3, 4).all())
        True
    """
    return Predicate("always", lambda query, key: True)


@checked
def table(name: str, pairs: Mapping[int, Sequence[int]]) -> Predicate:
    """Select, for each query value, the key values listed for it.

    Args:
        name: short description, shown in tables of programs.
        pairs: ``{query value: key values}``; missing query values select nothing.

    Example:
        >>> hs.compiled.table("swap", {0: [1], 1: [0]}).matrix(2, 2).tolist()
        [[False, True], [True, False]]
    """
    listed = {query: frozenset(keys) for query, keys in pairs.items()}
    return Predicate(name, lambda query, key: key in listed.get(query, ()))


@dataclass(frozen=True)
class Head:
    """Specification of one attention head.

    The head selects the keys (up to and including the query) whose ``key`` variable satisfies the
    predicate, averages their ``value`` variable, and writes the mean to a new variable ``output``.

    Attributes:
        layer: layer of the head.
        query, key, value: variables that it reads.
        predicate: relation that selects keys.
        output: variable that it writes.
        ties: ``mean`` averages over all selected keys; ``last`` takes the latest (GPT-2 only);
            ``largest`` averages over those with the largest key value.
        default: where the head attends if no key is selected: ``first`` (position 0) or ``spread``
            (all).
        others_only: never select the query's own position (GPT-2 only).
        role: usual name of such a head, e.g. ``previous_token``; empty if there is none.
    """

    layer: int
    query: str
    key: str
    predicate: Predicate
    value: str
    output: str
    ties: Literal["mean", "last", "largest"] = "mean"
    default: Literal["first", "spread"] = "first"
    others_only: bool = False
    role: str = ""

    @property
    def hard(self) -> bool:
        """Whether the head attends to a single key on every text."""
        single = self.ties == "last" or self.predicate.distance is not None
        return single and self.default == "first"


@dataclass(frozen=True)
class Lookup:
    """Specification of one MLP: a table from the values of some variables to a new variable.

    Attributes:
        layer: layer of the MLP; it reads the outputs of the heads in its layer.
        inputs: categorical variables that it reads, or one numeric variable.
        output: variable that it writes.
        size: number of values of the output.
        maps: ``(value, ...) -> value``; for a numeric input, the argument is the index of its
            interval.
        cuts: increasing boundaries between the intervals of a numeric input; empty for categorical
            inputs.
    """

    layer: int
    inputs: tuple[str, ...]
    output: str
    size: int
    maps: Callable[..., int]
    cuts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Feature:
    """A variable that is a function of the token.

    Attributes:
        name: name of the variable.
        values: value for every token id; numbers in [0, 1] if it is numeric.
        size: number of values; 0 for a numeric variable.
    """

    name: str
    values: tuple[int | float, ...]
    size: int = 0


@dataclass(frozen=True)
class Program:
    """Heads and lookup tables over named variables.

    Every text begins with the BOS, token 0. The variables ``token``, ``position`` and ``one`` (a
    constant) are predefined, and so is one for each feature.

    Attributes:
        name: name of the program.
        tokens: number of token ids, the BOS included.
        length: longest text.
        heads: heads in any order; several may share a layer.
        outputs: variables whose values are token ids; the logits represent the mean of their
            distributions.
        lookups: MLPs.
        features: variables that are functions of the token.
        redundant: heads whose function other heads duplicate, so ablating one has no effect.

    Raises:
        InputError: if a variable is unknown, read before it is written, or written twice.
    """

    name: str
    tokens: int
    length: int
    heads: tuple[Head, ...]
    outputs: tuple[str, ...]
    lookups: tuple[Lookup, ...] = ()
    features: tuple[Feature, ...] = ()
    redundant: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        """Check that every variable is written once, before it is read."""
        if self.tokens < 2 or self.length < 2:
            raise InputError(f"program {self.name!r} needs at least 2 tokens and 2 positions.")
        known = {*EMBEDDED, *(feature.name for feature in self.features)}
        for feature in self.features:
            if len(feature.values) != self.tokens:
                raise InputError(
                    f"feature {feature.name!r} has {len(feature.values)} values for "
                    f"{self.tokens} tokens."
                )
        for layer in range(self.n_layers):
            written = [head.output for head in self.heads if head.layer == layer]
            for head in self.heads:
                if head.layer == layer:
                    self._check_distance(head)
                    self._check_read((head.query, head.key, head.value), known, f"L{layer}")
            self._check_new(written, known)
            known |= set(written)
            tables = [lookup for lookup in self.lookups if lookup.layer == layer]
            for lookup in tables:
                self._check_read(lookup.inputs, known, f"MLP {layer}")
            self._check_new([lookup.output for lookup in tables], known)
            known |= {lookup.output for lookup in tables}
        self._check_read(self.outputs, known, "the logits")
        for output in self.outputs:
            if self.sizes[output] != self.tokens:
                raise InputError(
                    f"the output {output!r} has {self.sizes[output]} values, not one for each of "
                    f"the {self.tokens} tokens."
                )

    def _check_distance(self, head: Head) -> None:
        distance = head.predicate.distance
        if distance is not None and distance > self.length:
            raise InputError(
                f"the head that writes {head.output!r} of program {self.name!r} looks back "
                f"{distance} positions, and texts have {self.length} after the BOS."
            )

    def _check_read(self, names: Sequence[str], known: set[str], reader: str) -> None:
        for name in names:
            if name not in known:
                what = nearest(name, known, kind="variable")
                raise InputError(f"{reader} of program {self.name!r}: {what}")

    def _check_new(self, names: Sequence[str], known: set[str]) -> None:
        for name in names:
            if name in known or names.count(name) > 1:
                raise InputError(f"program {self.name!r} writes variable {name!r} twice.")

    @cached_property
    def n_layers(self) -> int:
        """Number of layers."""
        layers = [head.layer for head in self.heads] + [table.layer for table in self.lookups]
        return 1 + max(layers, default=0)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Number of values of every variable; 0 for a numeric one."""
        sizes = {"token": self.tokens, "position": self.length, "one": 1}
        sizes |= {feature.name: feature.size for feature in self.features}
        for layer in range(self.n_layers):
            sizes |= {h.output: sizes[h.value] for h in self.heads if h.layer == layer}
            sizes |= {t.output: t.size for t in self.lookups if t.layer == layer}
        return sizes

    @cached_property
    def addresses(self) -> Mapping[str, HeadIndex]:
        """Address of every head, by the variable it writes, numbered in the given order."""
        counts = dict.fromkeys(range(self.n_layers), 0)
        found = {}
        for head in self.heads:
            found[head.output] = HeadIndex(head.layer, counts[head.layer])
            counts[head.layer] += 1
        return found

    def texts(self, length: int) -> Int[np.ndarray, "text pos"]:
        """Return every text of BOS and ``length`` further tokens, ``[text length + 1]``."""
        words = list(product(range(1, self.tokens), repeat=length))
        return np.array([(0, *word) for word in words], int)


@dataclass(frozen=True, eq=False)
class Interpretation:
    """Values of a program's variables on some texts.

    Attributes:
        variables: by name, the distribution over values at each position, ``[batch pos value]``;
            numeric variables have shape ``[batch pos 1]``.
        patterns: by head, the attention pattern ``[batch query key]``; rows sum to 1.
        output: output distribution over tokens, ``[batch pos token]``.
    """

    variables: Mapping[str, Float[np.ndarray, "batch pos value"]]
    patterns: Mapping[HeadIndex, Float[np.ndarray, "batch query key"]]
    output: Float[np.ndarray, "batch pos token"]


@checked
def interpret(program: Program, tokens: Int[np.ndarray, "batch pos"]) -> Interpretation:
    """Run a program.

    Args:
        program: program to run.
        tokens: ids; every text begins with the BOS (0).

    Raises:
        InputError: if a text lacks the BOS, is too long, or has unknown ids.

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
    """Return the values of a variable that is a single value at every position."""
    if (variables[name].max(-1) < 1 - 1e-6).any():
        raise InputError(
            f"variable {name!r} is a mixture of values here but is read as a single value: use "
            "ties='last' in the head that writes it."
        )
    values: Int[np.ndarray, "batch pos"] = variables[name].argmax(-1)
    return values
