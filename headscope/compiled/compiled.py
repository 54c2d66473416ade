"""A compiled model: a head program, the real model that computes it, and the truth about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Int

from headscope.compiled.compiler import Build, Family, compile_program
from headscope.compiled.interpreter import Interpretation, interpret
from headscope.compiled.library import LIBRARY, induction_program
from headscope.compiled.program import Feature, Head, Lookup, Program
from headscope.compiled.truth import Truth, truth_of
from headscope.errors import InputError, nearest
from headscope.models.loading.load import load
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, from_tokens


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
