"""A compiled model: a head program, the real model that computes it, and the truth about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Int

from headscope.compiled.compiler import Build, Family, compile_program
from headscope.compiled.library import LIBRARY, induction_program
from headscope.compiled.program import (
    Feature,
    Head,
    Interpretation,
    Lookup,
    Program,
    interpret,
    value_at_start,
)
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, from_tokens

Slot = Literal["query", "key", "value", "mlp", "output"]


@dataclass(frozen=True, order=True)
class Edge:
    """One node reading what another wrote.

    Attributes:
        source: ``embed``, an address such as ``L0H1``, or an MLP such as ``MLP0``.
        target: an address, an MLP, or ``logits``.
        slot: by which input: ``query``, ``key``, ``value`` of a head, ``mlp``, ``output``.
    """

    source: str
    target: str
    slot: Slot


@dataclass(frozen=True, eq=False)
class Truth:
    """What a method that looks at a compiled model should find.

    Attributes:
        roles: heads by the role that the field calls them.
        used: heads that the output depends on; what the others compute is not read.
        redundant: used heads whose work others do as well: ablating one alone shows nothing.
        edges: who reads from whom, among nodes that the output depends on.
        composition: pairs ``(earlier head, later head)`` by the letter of the slot, ``Q K V``.
        qk_rank: rank of each head's query-key matrix.
    """

    roles: Mapping[str, tuple[HeadIndex, ...]]
    used: frozenset[HeadIndex]
    redundant: frozenset[HeadIndex]
    edges: frozenset[Edge]
    composition: Mapping[str, frozenset[tuple[HeadIndex, HeadIndex]]]
    qk_rank: Mapping[HeadIndex, int]


def truth_of(program: Program, *, rotary: bool = False) -> Truth:
    """Work out the truth of a program from its variables.

    Args:
        program: what the model computes.
        rotary: it is built with rotary positions. Heads that look back by a fixed distance then do
            so by their biases, and read nothing as queries and keys.

    Example:
        >>> from headscope.compiled.library import induction_program
        >>> truth = truth_of(induction_program(tokens=4, length=6))
        >>> truth.composition["K"]
        frozenset({(L0H0, L1H0)})
    """
    writers = _writers(program)
    reads = _reads(program, rotary)
    used = _needed(program, writers, reads)
    edges = frozenset(
        Edge(writers[variable], target, slot)
        for target, slots in reads.items()
        if target in used or target == "logits"
        for variable, slot in slots
    )
    by_name = {str(head): head for head in program.addresses.values()}
    composition = {
        slot[0].upper(): frozenset(
            (by_name[edge.source], by_name[edge.target])
            for edge in edges
            if edge.slot == slot and edge.source in by_name
        )
        for slot in ("query", "key", "value")
    }
    roles: dict[str, tuple[HeadIndex, ...]] = {}
    for head in program.heads:
        if head.role:
            address = program.addresses[head.output]
            roles[head.role] = (*roles.get(head.role, ()), address)
    return Truth(
        roles=roles,
        used=frozenset(head for name, head in by_name.items() if name in used),
        redundant=frozenset(program.addresses[output] for output in program.redundant),
        edges=edges,
        composition=composition,
        qk_rank={program.addresses[h.output]: qk_rank(program, h) for h in program.heads},
    )


def qk_rank(program: Program, head: Head) -> int:
    """Return the rank of a head's scores as a bilinear form of its query and key features.

    The features are the query and key variables, the constant, and positions; the score adds the
    predicate, the default and the order of ties.
    """
    sizes = program.sizes
    starts, at = {}, 0
    for name in dict.fromkeys((head.query, head.key, "one", "position")):
        starts[name] = at
        at += sizes[name]
    scores = np.zeros((at, at))
    matrix = head.predicate.matrix(sizes[head.query], sizes[head.key])
    q, k, one, position = (starts[name] for name in (head.query, head.key, "one", "position"))
    scores[q : q + sizes[head.query], k : k + sizes[head.key]] += 2.0 * matrix
    if head.default == "first":
        scores[q : q + sizes[head.query], position] += ~matrix[:, value_at_start(program, head.key)]
    if head.ties == "last":
        scores[one, position : position + sizes["position"]] += np.arange(sizes["position"])
    if head.ties == "largest":
        scores[one, k : k + sizes[head.key]] += np.arange(sizes[head.key])
    if head.others_only:
        along = np.arange(sizes["position"])
        scores[position + along, position + along] -= 2.0
    return int(np.linalg.matrix_rank(scores))


def _writers(program: Program) -> dict[str, str]:
    """Node that writes each variable."""
    embedded = ("token", "position", "one", *(feature.name for feature in program.features))
    writers = dict.fromkeys(embedded, "embed")
    writers |= {output: str(head) for output, head in program.addresses.items()}
    return writers | {lookup.output: f"MLP{lookup.layer}" for lookup in program.lookups}


def _reads(program: Program, rotary: bool) -> dict[str, list[tuple[str, Slot]]]:
    """Variables that each node reads, by slot."""
    reads: dict[str, list[tuple[str, Slot]]] = {
        "logits": [(output, "output") for output in program.outputs]
    }
    for head in program.heads:
        by_bias = rotary and head.predicate.distance is not None
        matched: list[tuple[str, Slot]] = [(head.query, "query"), (head.key, "key")]
        reads[str(program.addresses[head.output])] = [
            *([] if by_bias else matched),
            (head.value, "value"),
        ]
    for lookup in program.lookups:
        node = reads.setdefault(f"MLP{lookup.layer}", [])
        node += [(name, "mlp") for name in lookup.inputs]
    return reads


def _needed(
    program: Program, writers: Mapping[str, str], reads: Mapping[str, list[tuple[str, Slot]]]
) -> frozenset[str]:
    """Nodes that the output depends on."""
    found: set[str] = set()
    waiting = [writers[output] for output in program.outputs]
    while waiting:
        node = waiting.pop()
        if node not in found and node != "embed":
            found.add(node)
            waiting += [writers[variable] for variable, _ in reads[node]]
    return frozenset(found)


class BuildOptions(TypedDict, total=False):
    """Options of :class:`Build`, by name."""

    family: Family
    kv_group: int
    rotation_seed: int | None
    noise_heads: int
    seed: int


@dataclass(frozen=True, eq=False)
class Compiled:
    """A model whose every head is known, and the program it was made from.

    Attributes:
        program: what it computes.
        build: how it was made.
        module: the ``GPT2LMHeadModel`` or ``LlamaForCausalLM``, in fp32 and eval mode.
        truth: what a method that looks at it should find.
    """

    program: Program
    build: Build
    module: torch.nn.Module
    truth: Truth

    @cached_property
    def model(self) -> HeadModel:
        """The model as the rest of headscope takes it."""
        return load(self.module)

    def interpret(self, tokens: Int[np.ndarray, "batch pos"]) -> Interpretation:
        """Run the program on token ids, without the model.

        Args:
            tokens: ids; every text begins with the BOS (0).
        """
        return interpret(self.program, tokens)

    def probe(self, batch: int = 8, seed: int = 0) -> Probe:
        """Draw random texts that fill the context; every one begins with the BOS.

        Args:
            batch: number of texts.
            seed: of the draw.
        """
        drawn = np.random.default_rng(seed)
        words = drawn.integers(1, self.program.tokens, (batch, self.program.length - 1))
        tokens = np.concatenate([np.zeros((batch, 1), int), words], 1)
        return from_tokens(torch.from_numpy(tokens))

    def __repr__(self) -> str:
        """Name, class and number of heads."""
        return (
            f"Compiled({self.program.name!r}, {self.build.family}, {self.program.n_layers} layers, "
            f"{len(self.program.heads)} heads of known purpose)"
        )


def program(
    heads: Sequence[Head],
    *,
    tokens: int,
    length: int,
    outputs: Sequence[str],
    lookups: Sequence[Lookup] = (),
    features: Sequence[Feature] = (),
    redundant: Sequence[str] = (),
    name: str = "program",
    **build: Unpack[BuildOptions],
) -> Compiled:
    """Compile heads and lookup tables into a real model.

    Args:
        heads: what each head looks for, reads and writes.
        tokens: number of token ids; 0 is the BOS, which begins every text.
        length: longest text.
        outputs: variables that the logits show.
        lookups: MLPs.
        features: variables that are functions of the token.
        redundant: outputs of heads whose work others do as well.
        name: of the program.
        build: options of :class:`Build`: ``family``, ``kv_group``, ``rotation_seed``,
            ``noise_heads``, ``seed``.

    Returns:
        The model, its program and its truth.

    Raises:
        InputError: if the program is not well formed or does not fit the family.

    Example:
        >>> from headscope.compiled import Head, offset
        >>> head = Head(0, "position", "position", offset(1), "token", "before")
        >>> made = program([head], tokens=5, length=8, outputs=["before"])
        >>> made.module(torch.tensor([[0, 3, 4]])).logits.argmax(-1).tolist()
        [[0, 0, 3]]
    """
    made = Program(
        name, tokens, length, tuple(heads), tuple(outputs), tuple(lookups), tuple(features),
        frozenset(redundant),
    )  # fmt: skip
    return compiled(made, **build)


def compiled(program: Program, **build: Unpack[BuildOptions]) -> Compiled:
    """Compile a program that is already a value.

    Args:
        program: what to compute.
        build: options of :class:`Build`.

    Example:
        >>> from headscope.compiled import pointer_program
        >>> compiled(pointer_program()).truth.roles["pointer"]
        (L1H0,)
    """
    options = Build(**build)
    truth = truth_of(program, rotary=options.family == "llama")
    return Compiled(program, options, compile_program(program, options), truth)


def induction(tokens: int = 8, length: int = 16, **build: Unpack[BuildOptions]) -> Compiled:
    """Compile the induction pair: a previous-token head whose output an induction head's keys read.

    Args:
        tokens: number of token ids, the BOS included.
        length: longest text.
        build: options of :class:`Build`.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    Example:
        >>> induction().truth.roles
        {'previous_token': (L0H0,), 'induction': (L1H0,)}
    """
    return compiled(induction_program(tokens, length), **build)


def from_library(name: str, **build: Unpack[BuildOptions]) -> Compiled:
    """Compile a program of the library by its name.

    Args:
        name: one of ``LIBRARY``.
        build: options of :class:`Build`.

    Raises:
        InputError: if there is no such program, or it does not fit the family.

    Example:
        >>> from_library("indirect object").truth.roles["name_mover"]
        (L2H0,)
    """
    if name not in LIBRARY:
        raise InputError(nearest(name, LIBRARY, kind="program"))
    return compiled(LIBRARY[name](), **build)
