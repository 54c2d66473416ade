"""``Batch``: named model inputs with their mask and targets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.base.stacks import PatchGrid
from headscope.errors import InputError

PIXELS = "pixel_values"
PATCHES = "patches"  # name of the sequence that the patches of an image make
TOKENS, MASK, SEGMENTS = "input_ids", "attention_mask", "token_type_ids"
TEXT = "text"  # name of the sequence that token ids make
GRID = "image_grid_thw"
TURNS = "mm_token_type_ids"  # which tokens are pieces of images, for positions in space
# What processors give a vision-language model beside images and tokens.
WITH_IMAGES = (GRID, "image_sizes", "pixel_attention_mask", SEGMENTS, TURNS)
# Examples and positions of a test input: two, so that no axis is mistaken for another.
TINY = (2, 5)


@dataclass(frozen=True, eq=False)
class Batch:
    """Input of a model: named tensors, which positions are real, and targets.

    Attributes:
        inputs: tensors by the name that the model's ``forward`` has for them.
        masks: for every sequence, False at padding; ``text`` is that of ``input_ids``, ``patches``
            that of ``pixel_values``. A sequence without one has no padding.
        targets: token that each position should predict; -1 where none is asked for; None if
            nothing is.

    Example:
        >>> from headscope.base.batches import Batch
        >>> batch = Batch.of({"input_ids": torch.tensor([[5, 7, 0]]),
        ...                   "attention_mask": torch.tensor([[1, 1, 0]])})
        >>> len(batch), batch.masks["text"].tolist()
        (1, [[True, True, False]])
    """

    inputs: Mapping[str, Tensor]
    masks: Mapping[str, Bool[Tensor, "batch pos"]]
    targets: Int[Tensor, "batch pos"] | Int[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        """Check that all fields have the same examples, and freeze the mappings.

        Raises:
            InputError: if it is not.
        """
        sizes = {name: value.shape[0] for name, value in (*self.inputs.items(), *self._others())}
        if len(set(sizes.values())) != 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(f"the inputs of a batch have different numbers of examples: {told}.")
        object.__setattr__(self, "inputs", MappingProxyType(dict(self.inputs)))
        object.__setattr__(self, "masks", MappingProxyType(dict(self.masks)))

    def _others(self) -> list[tuple[str, Tensor]]:
        named = [(f"mask of {name}", mask) for name, mask in self.masks.items()]
        return named if self.targets is None else [*named, ("targets", self.targets)]

    @classmethod
    def of(cls, inputs: Mapping[str, Any], targets: Any = None) -> "Batch":
        """Make a batch from inputs as tokenizers and processors return them.

        Args:
            inputs: ``input_ids [batch pos]``, and ``attention_mask``, 1 at real tokens; segments
                (``token_type_ids``) only where all are 0. Or ``pixel_values [batch channel height
                width]`` alone. Or both, as the processor of a vision-language model gives them,
                with what it gives beside (``image_grid_thw``, ``image_sizes``,
                ``pixel_attention_mask``, ``token_type_ids``): images of all texts in a row, as many
                for each text.
            targets: token to predict at each position, or class of each image; -1 for none.

        Raises:
            InputError: if there are no token ids, shapes differ, or an input would change what
                the model computes in a way that headscope does not hand on.
        """
        if PIXELS in inputs and TOKENS not in inputs:
            return cls({PIXELS: _pixels(inputs)}, {}, targets)
        if TOKENS not in inputs:
            named = ", ".join(inputs) or "nothing"
            raise InputError(
                f"a batch needs {TOKENS!r}, the tokens of a text, or {PIXELS!r}, images; it has: "
                f"{named}."
            )
        tokens = _whole_numbers(TOKENS, inputs[TOKENS])
        if tokens.ndim != 2:
            raise InputError(f"{TOKENS!r} has shape {tuple(tokens.shape)}, not [batch pos].")
        mask = torch.ones_like(tokens) if inputs.get(MASK) is None else inputs[MASK]
        real = _of_shape(MASK, mask, tokens) != 0
        seen = _images_by_text(inputs, tokens) if PIXELS in inputs else {}
        segments = None if seen else inputs.get(SEGMENTS)
        if segments is not None and bool((_of_shape(SEGMENTS, segments, tokens) * real).any()):
            raise InputError(
                f"{SEGMENTS!r} names second segments, and headscope reads texts of one: give each "
                "text as a separate example."
            )
        if unknown := sorted(set(inputs) - {TOKENS, MASK, SEGMENTS, *seen}):
            hint = ": give targets=, -1 if there is none" if unknown[0] == "labels" else ""
            raise InputError(
                f"headscope hands a model {TOKENS!r} and {MASK!r}, and cannot hand it "
                f"{unknown[0]!r}{hint}."
            )
        asked = None if targets is None else _of_shape("targets", targets, tokens)
        return cls({TOKENS: tokens, **seen}, {TEXT: real}, asked)

    @classmethod
    def tiny(cls, d_vocab: int) -> "Batch":
        """Make a small batch of distinct valid tokens for trial runs.

        They start above the low ids where padding often is: some families warn of it at an edge.

        Args:
            d_vocab: tokens that the model knows.

        Example:
            >>> Batch.tiny(100).inputs["input_ids"].shape
            torch.Size([2, 5])
        """
        ids = (torch.arange(TINY[0] * TINY[1]) * 7 + 3) % max(d_vocab - 1, 1)
        tokens = ids.view(TINY)
        return cls({TOKENS: tokens}, {TEXT: torch.ones_like(tokens, dtype=torch.bool)})

    def __len__(self) -> int:
        """Number of examples."""
        return int(next(iter(self.inputs.values())).shape[0])

    @property
    def sequence(self) -> str:
        """Name of the sequence that attention runs over."""
        return PATCHES if PIXELS in self.inputs and TOKENS not in self.inputs else TEXT

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Token ids.

        Raises:
            InputError: if the batch holds none.
        """
        if TOKENS not in self.inputs:
            raise InputError(f"this needs the tokens of a text, and the batch holds {PIXELS!r}.")
        return self.inputs[TOKENS]

    @property
    def real(self) -> Bool[Tensor, "batch pos"] | None:
        """False at padding; None if there is none."""
        return self.masks.get(self.sequence)

    def repeated(self, copies: int) -> "Batch":
        """Repeat the batch, whole copies one after the other.

        Args:
            copies: how often.
        """
        return self._each(lambda value: value.repeat(copies, *[1] * (value.ndim - 1)))

    def examples(self, chosen: Any) -> "Batch":
        """Select some examples.

        Args:
            chosen: a slice or numbers of examples.
        """
        return self._each(lambda value: value[chosen])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            {name: change(value) for name, value in self.inputs.items()},
            {name: change(mask) for name, mask in self.masks.items()},
            None if self.targets is None else change(self.targets),
        )

    def trial(self, length: int) -> "Batch":
        """Take two short examples like these, for trying a way to run a model.

        Args:
            length: tokens that they have at most.
        """
        if self.sequence == PATCHES:
            one = self.inputs[PIXELS][:1]
            return Batch({PIXELS: torch.cat([one, one.flip(2)])}, {})
        real = self.real
        text = (self.tokens[0] if real is None else self.tokens[0, real[0]])[:length]
        rows = torch.stack([text, text.roll(1)])
        shown = torch.ones_like(rows, dtype=torch.bool)
        if real is not None and not bool(real.all()) and len(text) > 2:
            shown[1, :1] = False
        return Batch({TOKENS: rows}, {TEXT: shown})

    def misfit(
        self, reader: str, n_ctx: int | None, d_vocab: int, grid: PatchGrid | None = None
    ) -> str | None:
        """Reason why a model cannot read the batch; None if it can.

        Args:
            reader: what the message calls the model.
            n_ctx: tokens that it reads at most; None: no limit.
            d_vocab: tokens that it knows.
            grid: how it cuts images; None: it reads none.

        Example:
            >>> Batch.tiny(100).misfit("gpt2", 4, 100)[:46]
            'the probe has 5 tokens, but gpt2 sees at most '
        """
        if self.sequence == PATCHES or grid is not None:
            return self._misfit_image(reader, grid)
        real = self.masks[TEXT]
        longest = int(real.sum(1).max())
        if n_ctx is not None and longest > n_ctx:
            return (
                f"the probe has {longest} tokens, but {reader} sees at most {n_ctx}: shorten it, "
                "or load a model of rotary positions with extrapolate=True."
            )
        used = self.inputs[TOKENS][real]
        if int(used.min()) < 0 or int(used.max()) >= d_vocab:
            return (
                f"the probe has token ids {int(used.min())} to {int(used.max())}, but {reader} "
                f"knows 0 to {d_vocab - 1}."
            )
        return None

    def _misfit_image(self, reader: str, grid: PatchGrid | None) -> str | None:
        if grid is None:
            return (
                f"the probe holds images, and {reader} reads texts: give it a probe of texts, such "
                "as hs.probes.text."
            )
        if self.sequence != PATCHES:
            return (
                f"the probe holds a text, and {reader} reads images: give it a probe of images, "
                "such as hs.probes.images."
            )
        given, wanted = tuple(self.inputs[PIXELS].shape[1:]), grid.size
        if given != wanted:
            return (
                f"the images have {given[0]} channels and {given[1]} x {given[2]} pixels (height x "
                f"width), and {reader} reads {wanted[0]} channels and {wanted[1]} x {wanted[2]}: "
                "hs.probes.images resizes pictures to that."
            )
        return None

    def labels(self, tokenizer: Any, example: int = 0) -> list[str]:
        """Label of each position of an example in plots.

        Args:
            tokenizer: tokenizer that decodes tokens; None: show ids.
            example: index of the example.

        Example:
            >>> Batch.tiny(100).labels(None)
            ['3', '10', '17', '24', '31']
        """
        ids = self.inputs[TOKENS][example].tolist()
        if tokenizer is None:
            return [str(one) for one in ids]
        return [str(text) for text in tokenizer.batch_decode([[one] for one in ids])]


def _images_by_text(inputs: Mapping[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    """Images with what belongs to them, grouped by text.

    Images of one text stay in their order. Patches of images of different sizes are filled up with
    zeros behind the last (``image_grid_thw`` says how many there are).

    Raises:
        InputError: if there are not as many images for every text.
    """
    texts, found = len(tokens), {}
    for name in (PIXELS, *WITH_IMAGES):
        if (given := inputs.get(name)) is None:
            continue
        value = torch.as_tensor(given)
        if name == SEGMENTS or name == "mm_token_type_ids":
            found[name] = _of_shape(name, value, tokens)
        elif name == PIXELS and GRID in inputs and value.ndim == 2:
            found[name] = value
        elif value.ndim == 0 or len(value) == 0 or len(value) % texts:
            count = 0 if value.ndim == 0 else len(value)
            raise InputError(
                f"{name!r} has {count} images for {texts} texts: give every text as many images."
            )
        elif len(value) == texts and (name != GRID or value.ndim == 3):
            found[name] = value
        else:
            found[name] = value.unflatten(0, (texts, -1))
    if not bool(torch.isfinite(found[PIXELS]).all()):
        raise InputError(f"{PIXELS!r} holds numbers that are not finite.")
    if found[PIXELS].ndim == 2:
        found[PIXELS] = _patches_by_text(found[PIXELS], found[GRID])
    return found


def _patches_by_text(patches: Tensor, grid: Tensor) -> Tensor:
    """Rows of image patches, grouped by text."""
    counts = grid.prod(-1).sum(-1).tolist()
    if sum(counts) != len(patches):
        raise InputError(
            f"{PIXELS!r} has {len(patches)} patches, and {GRID!r} speaks of {sum(counts)}."
        )
    parts = patches.split(counts)
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def _pixels(inputs: Mapping[str, Any]) -> Tensor:
    """Images alone, as numbers."""
    try:
        found = torch.as_tensor(inputs[PIXELS])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{PIXELS!r} does not hold numbers of one shape: give a tensor [batch channel height "
            "width]."
        ) from error
    if found.ndim != 4 or 0 in found.shape:
        raise InputError(
            f"{PIXELS!r} has shape {tuple(found.shape)}, not [batch channel height width]."
        )
    if unknown := sorted(set(inputs) - {PIXELS}):
        raise InputError(
            f"headscope hands a model of images {PIXELS!r} alone, and cannot hand it "
            f"{unknown[0]!r}."
        )
    found = found if found.is_floating_point() else found.float()
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{PIXELS!r} holds numbers that are not finite.")
    return found


def _whole_numbers(name: str, value: Any) -> Int[Tensor, "..."]:
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name!r} does not hold rows of whole numbers of one length: pad the rows, and say "
            f"with {MASK!r} which tokens are real."
        ) from error
    if found.is_floating_point():
        raise InputError(f"{name!r} holds fractions, not whole numbers.")
    return found.long()


def _of_shape(name: str, value: Any, tokens: Tensor) -> Tensor:
    found = _whole_numbers(name, value)
    if found.shape != tokens.shape:
        raise InputError(
            f"{name!r} has shape {tuple(found.shape)}, {TOKENS!r} {tuple(tokens.shape)}."
        )
    return found
