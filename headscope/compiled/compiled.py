"""Compiled models: a head program, the real model that computes it, and its ground truth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.arguments import checked
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
from headscope.errors import InputError, nearest, whole
from headscope.heads import HeadIndex
from headscope.models.hf.weights import WrittenLayer, WrittenModel, gpt2, llama, rotary_frequencies
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, from_tokens
from headscope.table.edges import Edge, Slot

Family = Literal["gpt2", "llama"]
BALLAST = 300.0
# Score margin of selected keys: others get at most exp(-30), 1e-13, of their attention.
LEAD = 30.0
LOGIT_SCALE = 10.0
_EPSILON = {"gpt2": 1e-5, "llama": 1e-6}
_STEP = 200.0  # slope of the steps that discretise a numeric variable
_NOISE = 4  # number of coordinates that noise heads write to


@dataclass(frozen=True)
class Build:
    """Options of compiling a program to a model.

    Attributes:
        family: model class. Llama has no position variable: its heads look back through rotary
            planes, so offsets are the only position predicates.
        kv_group: query heads per key/value head (Llama only).
        rotation_seed: rotate the residual stream by a random orthogonal matrix, so that no single
            coordinate is meaningful; None: no rotation.
        noise_heads: number of random heads added to every layer, whose output is not read.
        seed: seed for the noise heads.

    Raises:
        InputError: if the family does not support an option.
    """

    family: Family = "gpt2"
    kv_group: int = 1
    rotation_seed: int | None = None
    noise_heads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the options against the family."""
        if self.family not in _EPSILON:
            raise InputError(f"unknown family {self.family!r}: use 'gpt2' or 'llama'.")
        if self.kv_group > 1 and self.family == "gpt2":
            raise InputError("kv_group: GPT-2 has no grouped heads; use family='llama'.")
        if self.kv_group < 1 or self.noise_heads < 0:
            raise InputError("kv_group must be 1 or more and noise_heads 0 or more.")
        whole(self.seed, "seed", 0)
        if self.rotation_seed is not None:
            whole(self.rotation_seed, "rotation_seed", 0)


@torch.no_grad()
def compile_program(program: Program, build: Build) -> torch.nn.Module:
    """Build a model that computes a program.

    Args:
        program: program to compile.
        build: model class, grouping, rotation and noise.

    Returns:
        A ``GPT2LMHeadModel`` or ``LlamaForCausalLM`` in fp32. Its patterns match the program's to
        within ``length * exp(-30)``, and its logits are 10 times the program's output distribution;
        with mixtures or numeric variables to within 3e-3, or 1e-2 with a rotation.

    Raises:
        InputError: if the program does not fit the family.

    Example:
        >>> from headscope.compiled.library import induction_program
        >>> model = compile_program(induction_program(tokens=4, length=6), Build())
        >>> model(torch.tensor([[0, 1, 2, 1]])).logits[0, -1].argmax().item()
        2
    """
    weights = _Compiler(program, build).weights()
    built = gpt2 if build.family == "gpt2" else llama
    module: torch.nn.Module = built(weights, program.length)
    return module


@dataclass(frozen=True, eq=False)
class _Compiler:
    program: Program
    build: Build

    def weights(self) -> WrittenModel:
        program, turn = self.program, self.turn
        token = torch.zeros(program.tokens, self.width, dtype=torch.float64)
        token += self.pairs("token") + self.pairs("one")
        for feature in program.features:
            values = torch.tensor(feature.values, dtype=torch.float64)
            one_hot = torch.eye(feature.size, dtype=torch.float64)
            rows = one_hot[values.long()] if feature.size else values[:, None]
            token += rows @ self.pairs(feature.name)
        token[:, -2] += self.ballast
        token[:, -1] -= self.ballast
        positions = self.pairs("position") @ turn if self.build.family == "gpt2" else None
        shown = torch.stack([self.reads(output) for output in program.outputs]).sum(0)
        return WrittenModel(
            token @ turn,
            positions,
            [self.layer(number) for number in range(program.n_layers)],
            self.gain(program.n_layers, after_heads=False),
            LOGIT_SCALE / len(program.outputs) * shown.mT,
        )

    @cached_property
    def slots(self) -> dict[str, slice]:
        """Coordinates of each variable's values, followed by those of the negated values."""
        at, found = 0, {}
        for name, size in self.program.sizes.items():
            if name == "position" and self.build.family == "llama":
                continue
            found[name] = slice(at, at + max(size, 1))
            at += 2 * max(size, 1)
        return found

    @cached_property
    def width(self) -> int:
        """Size of the residual stream: variables, noise, ballast."""
        used: int = max(2 * slot.stop - slot.start for slot in self.slots.values())
        used += 2 * _NOISE + 2
        if self.build.family == "llama":
            unit = math.lcm(2, self.n_heads)  # required by some versions of LlamaConfig
            return -(-used // unit) * unit
        return self.n_heads * max(self.d_head, -(-used // self.n_heads))

    @cached_property
    def ballast(self) -> float:
        """Size of the constant that fixes the norm's scale; 0 if there is none."""
        soft = any(not head.hard for head in self.program.heads) or self.build.noise_heads
        numeric = any(size == 0 for size in self.program.sizes.values())
        return BALLAST if soft or numeric else 0.0

    @cached_property
    def turn(self) -> Float[Tensor, "d_model d_model"]:
        """Rotation of the residual stream that preserves the mean."""
        identity = torch.eye(self.width, dtype=torch.float64)
        if self.build.rotation_seed is None:
            return identity
        generator = torch.Generator().manual_seed(self.build.rotation_seed)
        basis = torch.randn(self.width, self.width, generator=generator, dtype=torch.float64)
        basis[:, 0] = 1.0
        frame = torch.linalg.qr(basis).Q  # its first column is the direction of the mean
        inner = torch.randn(self.width - 1, self.width - 1, generator=generator).double()
        turned = torch.block_diag(torch.ones(1, 1).double(), torch.linalg.qr(inner).Q)
        rotation: Tensor = frame @ turned @ frame.mT
        return rotation

    def pairs(self, name: str) -> Float[Tensor, "value d_model"]:
        """Return the write of each value of a variable, before the rotation."""
        slot = self.slots[name]
        size = slot.stop - slot.start
        rows = torch.zeros(size, self.width, dtype=torch.float64)
        value = torch.arange(size)
        rows[value, slot.start + value] = 1.0
        rows[value, slot.stop + value] = -1.0
        return rows

    def reads(self, name: str) -> Float[Tensor, "d_model value"]:
        """Return the matrix that reads a variable from the (rotated) residual stream."""
        if name not in self.slots:
            raise InputError(
                f"program {self.program.name!r} reads {name!r}, which a Llama cannot embed: build "
                "it with family='gpt2'."
            )
        return self.turn.mT @ self.pairs(name).mT / 2

    def gain(self, layer: int, *, after_heads: bool) -> float:
        """Return the multiplier that undoes the norm at a layer's input."""
        program = self.program
        filled = 1 + len(program.features) + 1 + (self.build.family == "gpt2")
        filled += sum(head.layer < layer + after_heads for head in program.heads)
        filled += sum(lookup.layer < layer for lookup in program.lookups)
        variance = 2 * (filled + self.ballast**2) / self.width
        return float((variance + _EPSILON[self.build.family]) ** 0.5)

    @cached_property
    def n_heads(self) -> int:
        """Heads per layer: those of the fullest layer, noise heads, and idle heads as padding."""
        counts = [
            sum(head.layer == layer for head in self.program.heads)
            for layer in range(self.program.n_layers)
        ]
        wanted = max(1, *counts) + self.build.noise_heads
        return -(-wanted // self.build.kv_group) * self.build.kv_group

    @cached_property
    def block(self) -> int:
        """Number of head-space coordinates that one head needs."""
        sizes, needs = self.program.sizes, [_NOISE]
        for head in self.program.heads:
            content = 0 if self.rotary(head) else min(sizes[head.query], sizes[head.key])
            extra = 2 + (self.program.length if head.others_only else 0)
            needs.append(max(content + extra, max(sizes[head.value], 1)))
        return max(needs)

    @cached_property
    def d_head(self) -> int:
        """Size of a head."""
        needed = self.block * self.build.kv_group
        if self.build.family == "gpt2":
            used = sum(2 * max(size, 1) for size in self.program.sizes.values()) + 2 * _NOISE + 2
            return max(needed, -(-used // self.n_heads))
        quarter = -(-needed // 6)  # planes in the rotating quarter; the other three do not rotate
        return max(8 * max(quarter, 1), 128)

    @cached_property
    def still(self) -> Tensor:
        """Coordinates of head space that are not rotated."""
        if self.build.family == "gpt2":
            return torch.arange(self.d_head)
        half = self.d_head // 2
        planes = torch.arange(self.d_head // 8, half)
        return torch.cat([planes, planes + half])

    def rotary(self, head: Head) -> bool:
        """Whether a head attends to a fixed offset through rotary planes."""
        return self.build.family == "llama" and head.predicate.distance is not None

    def layer(self, number: int) -> WrittenLayer:
        """Return the weights of one block."""
        group = self.build.kv_group
        n_kv = self.n_heads // group

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        W_Q, W_O = (zeros(self.n_heads, self.width, self.d_head) for _ in range(2))
        W_K, W_V = (zeros(n_kv, self.width, self.d_head) for _ in range(2))
        b_Q, b_K = zeros(self.n_heads, self.d_head), zeros(n_kv, self.d_head)
        heads = [head for head in self.program.heads if head.layer == number]
        for place, head in enumerate(heads):
            at = self.still[place % group * self.block :][: self.block]
            shared = place // group
            q, k = self.query_key(head)
            W_Q[place][:, at[: q.shape[1]]] = q
            W_K[shared][:, at[: k.shape[1]]] = k
            v, o = self.reads(head.value), self.pairs(head.output) @ self.turn
            W_V[shared][:, at[: v.shape[1]]] = v
            W_O[place][:, at[: len(o)]] = o.mT
            if self.rotary(head):
                self.look_back(b_Q[place], b_K[shared], head)
        self.noise(number, len(heads), W_Q, W_K, W_V, W_O)
        W_in, b_in, W_out = self.mlp([t for t in self.program.lookups if t.layer == number])
        norm_1 = self.gain(number, after_heads=False)
        norm_2 = self.gain(number, after_heads=True)
        return WrittenLayer(W_Q, W_K, W_V, W_O.mT, b_Q, b_K, W_in, b_in, W_out, norm_1, norm_2)

    def query_key(
        self, head: Head
    ) -> tuple[Float[Tensor, "d_model dim"], Float[Tensor, "d_model dim"]]:
        """Return a head's query and key matrices; the product of their outputs is its score."""
        sizes, queries, keys = self.program.sizes, [], []
        lead = 2 * LEAD
        if head.ties == "last":
            self._needs_positions(head, "ties='last'")
            lead = 2 * LEAD * (self.program.length + 1)
            late = torch.arange(self.program.length, dtype=torch.float64)[:, None]
            queries.append(self.reads("one") * LEAD)
            keys.append(self.reads("position") @ late)
        elif head.ties == "largest":
            lead = 2 * LEAD * (sizes[head.key] + 1)
            value = torch.arange(sizes[head.key], dtype=torch.float64)[:, None]
            queries.append(self.reads("one") * LEAD)
            keys.append(self.reads(head.key) @ value)
        if not self.rotary(head):
            matrix = torch.from_numpy(head.predicate.matrix(sizes[head.query], sizes[head.key]))
            q, k = self.reads(head.query), self.reads(head.key)
            if sizes[head.query] <= sizes[head.key]:
                k = k @ matrix.double().mT
            else:
                q = q @ matrix.double()
            queries.append(q * lead)
            keys.append(k)
            if head.default == "first":
                first = "position" if self.build.family == "gpt2" else "token"
                start = value_at_start(self.program, head.key)
                unselected = 1.0 - matrix[:, start : start + 1].double()
                queries.append(self.reads(head.query) @ unselected * (lead / 2))
                keys.append(self.reads(first)[:, :1])
        if head.others_only:
            self._needs_positions(head, "others_only")
            queries.append(self.reads("position") * -lead)
            keys.append(self.reads("position"))
        if not queries:
            return torch.zeros(self.width, 0).double(), torch.zeros(self.width, 0).double()
        return torch.cat(queries, 1), torch.cat(keys, 1)

    def _needs_positions(self, head: Head, what: str) -> None:
        if self.build.family != "gpt2":
            raise InputError(
                f"head {head.output!r} of {self.program.name!r}: {what} needs position embeddings, "
                "which Llama does not have; build it with family='gpt2'."
            )

    def look_back(
        self, b_Q: Float[Tensor, " d_head"], b_K: Float[Tensor, " d_head"], head: Head
    ) -> None:
        """Fill the biases that make a head attend to a fixed offset, in rotary planes."""
        distance = head.predicate.distance or 0
        planes = torch.arange(self.d_head // 8)
        speed = rotary_frequencies(self.d_head)[planes]
        far = torch.arange(self.program.length)[:, None] - distance
        gap = (1 - torch.cos(far * speed)).mean(-1)
        smallest = float(gap[far.squeeze(1) != 0].min())
        strength = LEAD / smallest
        if strength > 1e5 or distance > 3:
            raise InputError(
                f"head {head.output!r} looks back {distance} positions in texts of "
                f"{self.program.length}: rotary planes can only look back up to 3 positions, in "
                "short texts; build it with family='gpt2'."
            )
        half = self.d_head // 2
        b_K[planes] = 1.0
        b_Q[planes] += strength / len(planes) * torch.cos(-distance * speed)
        b_Q[planes + half] += strength / len(planes) * torch.sin(-distance * speed)

    def noise(
        self, number: int, first: int, W_Q: Tensor, W_K: Tensor, W_V: Tensor, W_O: Tensor
    ) -> None:
        """Fill heads that attend at random and write to coordinates that nothing reads."""
        generator = torch.Generator().manual_seed(1000 * self.build.seed + number)
        group = self.build.kv_group
        names = ["token", *(["position"] if self.build.family == "gpt2" else [])]
        read = torch.cat([self.reads(name) for name in names], 1)
        free = torch.zeros(_NOISE, self.width, dtype=torch.float64)
        at = torch.arange(_NOISE)
        free[at, self.width - 2 - 2 * _NOISE + at] = 1.0
        free[at, self.width - 2 - _NOISE + at] = -1.0
        for place in range(first, first + self.build.noise_heads):
            dims = self.still[place % group * self.block :][:_NOISE]

            def drawn(scale: float) -> Tensor:
                shape = (read.shape[1], _NOISE)
                return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

            W_Q[place][:, dims] = read @ drawn(1.5)
            W_K[place // group][:, dims] = read @ drawn(1.5)
            W_V[place // group][:, dims] = read @ drawn(0.1)
            W_O[place][:, dims] = (free @ self.turn).mT

    def mlp(self, lookups: list[Lookup]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights of one MLP, with a hidden unit for every row of its tables."""
        reads: list[Tensor] = []
        biases: list[Tensor] = []
        writes: list[Tensor] = []
        for lookup in lookups:
            made = self.steps(lookup) if lookup.cuts else self.rows(lookup)
            for parts, part in zip((reads, biases, writes), made, strict=True):
                parts.append(part)
        if not lookups:
            empty = torch.zeros(self.width, 1, dtype=torch.float64)
            return empty, empty[0], empty.mT
        return torch.cat(reads, 1), torch.cat(biases), torch.cat(writes, 0)

    def rows(self, lookup: Lookup) -> tuple[Tensor, Tensor, Tensor]:
        """Return one unit for every combination of categorical values."""
        sizes = [self.program.sizes[name] for name in lookup.inputs]
        if 0 in sizes:
            raise InputError(f"lookup {lookup.output!r} reads a numeric variable: give it cuts.")
        values = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(
            -1, len(sizes)
        )
        reads = sum(self.reads(name)[:, values[:, n]] for n, name in enumerate(lookup.inputs))
        outputs = [int(lookup.maps(*row)) for row in values.tolist()]
        bias = torch.full((len(values),), 1.0 - len(sizes), dtype=torch.float64)
        assert isinstance(reads, Tensor)  # noqa: S101  # there is at least one input
        return reads, bias, (self.pairs(lookup.output) @ self.turn)[outputs]

    def steps(self, lookup: Lookup) -> tuple[Tensor, Tensor, Tensor]:
        """Return two units per cut of a numeric variable, and a constant one for lower values."""
        read, one = self.reads(lookup.inputs[0])[:, :1], self.reads("one")
        written = self.pairs(lookup.output) @ self.turn
        values = [int(lookup.maps(n)) for n in range(len(lookup.cuts) + 1)]
        reads, biases, writes = [one], [torch.zeros(1).double()], [written[values[0]][None]]
        for n, cut in enumerate(lookup.cuts):
            change = (written[values[n + 1]] - written[values[n]])[None]
            for late, sign in ((0.0, 1.0), (1.0, -1.0)):
                reads.append(read * _STEP)
                biases.append(torch.tensor([-_STEP * cut + 0.5 - late], dtype=torch.float64))
                writes.append(sign * change)
        return torch.cat(reads, 1), torch.cat(biases), torch.cat(writes, 0)


@dataclass(frozen=True, eq=False)
class Truth:
    """Ground truth of a compiled model, which methods should find.

    Attributes:
        roles: heads by their usual role name, e.g. ``induction``.
        used: heads that the output depends on; the output of other heads is not read.
        redundant: used heads whose function other heads duplicate, so ablating one alone has no
            effect.
        edges: edges between nodes that the output depends on.
        composition: pairs ``(earlier head, later head)`` by slot: ``Q``, ``K`` or ``V``.
        qk_rank: rank of each head's query-key matrix.
    """

    roles: Mapping[str, tuple[HeadIndex, ...]]
    used: frozenset[HeadIndex]
    redundant: frozenset[HeadIndex]
    edges: frozenset[Edge]
    composition: Mapping[str, frozenset[tuple[HeadIndex, HeadIndex]]]
    qk_rank: Mapping[HeadIndex, int]


@checked
def truth_of(program: Program, *, rotary: bool = False) -> Truth:
    """Derive the ground truth of a program from its variables.

    Args:
        program: program that the model computes.
        rotary: whether the model has rotary positions. Heads with a fixed offset then work through
            their biases and do not read queries and keys from the stream.

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

    The features are the query and key variables, the constant, and positions; the score is the sum
    of the terms for predicate, default and tie-breaking.
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
    """Writing node of each variable."""
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
    """A model with known heads, and the program that it was compiled from.

    Attributes:
        program: program to compile.
        build: options that it was built with.
        module: the ``GPT2LMHeadModel`` or ``LlamaForCausalLM``, in fp32 and eval mode.
        truth: ground truth that methods should find.
    """

    program: Program
    build: Build
    module: torch.nn.Module
    truth: Truth

    @cached_property
    def model(self) -> HeadModel:
        """The model, loaded into headscope."""
        return load(self.module)

    def interpret(self, tokens: Int[np.ndarray, "batch pos"]) -> Interpretation:
        """Run the program itself on token ids.

        Args:
            tokens: token ids; every text begins with the BOS (0).
        """
        return interpret(self.program, tokens)

    def probe(self, batch: int = 8, seed: int = 0) -> Probe:
        """Make a probe of random texts that fill the context, each beginning with a BOS.

        Args:
            batch: number of texts.
            seed: seed for the texts.
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


@checked
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
        heads: specifications of the heads.
        tokens: number of token ids; 0 is the BOS, which begins every text.
        length: length of the longest text, in tokens.
        outputs: variables that determine the logits.
        lookups: lookup tables, each built as an MLP.
        features: variables that are functions of the token.
        redundant: output variables of heads whose function others duplicate.
        name: name of the program.
        build: options of :class:`Build`: ``family``, ``kv_group``, ``rotation_seed``,
            ``noise_heads``, ``seed``.

    Returns:
        The model with its program and ground truth.

    Raises:
        InputError: if the program is invalid or does not fit the family.

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


@checked
def compiled(program: Program, **build: Unpack[BuildOptions]) -> Compiled:
    """Compile a program that is already a value.

    Args:
        program: program to compile.
        build: options of :class:`Build`.

    Example:
        >>> from headscope.compiled import pointer_program
        >>> compiled(pointer_program()).truth.roles["pointer"]
        (L1H0,)
    """
    options = Build(**build)
    truth = truth_of(program, rotary=options.family == "llama")
    return Compiled(program, options, compile_program(program, options), truth)


@checked
def induction(tokens: int = 8, length: int = 16, **build: Unpack[BuildOptions]) -> Compiled:
    """Compile the induction pair: a previous-token head that feeds an induction head's keys.

    Args:
        tokens: number of token ids, including the BOS.
        length: length of the longest text, in tokens.
        build: options of :class:`Build`.

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    Example:
        >>> induction().truth.roles
        {'previous_token': (L0H0,), 'induction': (L1H0,)}
    """
    return compiled(induction_program(tokens, length), **build)


@checked
def from_library(name: str, **build: Unpack[BuildOptions]) -> Compiled:
    """Compile a library program by name.

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
