"""Encoding of texts and token ids as padded batches; positions are found by character offset."""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.batches import PIXELS, TEXT, TOKENS, Batch
from headscope.base.stacks import PatchGrid, all_causal, grid_of
from headscope.errors import HeadscopeWarning, InputError, UnsupportedModelError
from headscope.heads import ModelShape
from headscope.probes.probe import Probe, of_images


@runtime_checkable
class Tokenizer(Protocol):
    """Interface of a Hugging Face tokenizer as far as probes use it.

    ``bos_token_id`` is not part of it, since transformers creates that attribute on access, which
    protocol checks miss from Python 3.12 on.
    """

    @property
    def is_fast(self) -> bool:
        """Whether it can report character offsets."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of special tokens: BOS, EOS, padding and so on."""

    def __call__(self, text: str, **options: object) -> Mapping[str, Any]:
        """Tokenize one text."""

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Format messages with the model's chat template."""

    def batch_decode(self, sequences: list[list[int]], **options: object) -> list[str]:
        """Decode lists of ids to texts."""


@runtime_checkable
class HasVocabulary(Protocol):
    """Interface of a model as far as probes use it; every ``HeadModel`` satisfies it."""

    @property
    def name(self) -> str:
        """Name used in messages."""

    @property
    def shape(self) -> ModelShape:
        """Gives ``n_ctx`` and ``d_vocab``."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """A Hugging Face tokenizer, or None."""


@checked
def uses_bos(model: HasVocabulary) -> bool:
    """Whether the model's own tokenizer prepends a BOS token.

    If it does, the model saw one in training. GPT-2 and GPT-NeoX define a BOS token but do not
    prepend it, so this is False for them; transformer-lens prepends it anyway, which ``bos=True``
    reproduces.

    Args:
        model: model with or without a tokenizer.

    Returns:
        True if the tokenizer prepends a BOS.

    Example:
        >>> hs.probes.uses_bos(model)
        True
    """
    tokenizer, bos = model.tokenizer, _bos(model)
    if tokenizer is None or bos is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == bos


def bos_prefix(model: HasVocabulary, bos: bool | None) -> list[int]:
    """Tokens to prepend to every example: the BOS, or nothing.

    Args:
        model: its tokenizer defines the BOS.
        bos: whether to use it; None follows :func:`uses_bos`.

    Raises:
        InputError: if a BOS is requested and the tokenizer has none.
    """
    if not (uses_bos(model) if bos is None else bos):
        return []
    token = _bos(model)
    if token is None:
        raise InputError(f"{model.name} has no BOS token: leave bos=True out.")
    return [token]


def frame(model: HasVocabulary, bos: bool | None) -> tuple[list[int], list[int]]:
    """Tokens to put before and after every example.

    A left-to-right model may have a BOS before; an encoder has what its tokenizer puts around a
    text, ``[CLS]`` and ``[SEP]``.

    Args:
        model: its tokenizer defines the tokens.
        bos: whether to use them; None follows the tokenizer.

    Raises:
        InputError: if they are requested and the tokenizer has none.
    """
    if reads_onwards(model):
        return bos_prefix(model, bos), []
    if bos is False or model.tokenizer is None:
        around: tuple[list[int], list[int]] = [], []
    else:
        framed = list(model.tokenizer("a")["input_ids"])
        bare = list(model.tokenizer("a", add_special_tokens=False)["input_ids"])
        places = [at for at in range(len(framed)) if bare and framed[at : at + len(bare)] == bare]
        at = places[0] if places else min(1, len(framed))
        around = framed[:at], framed[at + len(bare) :]
    if bos and not any(around):
        raise InputError(f"{model.name} puts no tokens around a text: leave bos=True out.")
    return around


def reads_onwards(model: HasVocabulary) -> bool:
    """Whether a model reads from left to right, and so predicts the next token."""
    return all_causal(getattr(model, "stacks", {}))


def need_onwards(model: HasVocabulary, what: str) -> None:
    """Refuse next-token probes for models that read in both directions.

    Raises:
        UnsupportedModelError: with the name of the probe.
    """
    if not reads_onwards(model):
        raise UnsupportedModelError(
            f"{what} asks for the token after a text, and {model.name} reads texts in both "
            "directions: use hs.probes.masked."
        )


def _bos(model: HasVocabulary) -> int | None:
    token = getattr(model.tokenizer, "bos_token_id", None)
    return None if token is None else int(token)


def ordinary_tokens(model: HasVocabulary) -> Int[Tensor, " ordinary"]:
    """Ids of ordinary tokens: in the tokenizer, in the embedding, with a logit, and not special.

    Rows that pad the embedding beyond the tokenizer, and reserved special tokens, were never
    trained and are left out. Without a tokenizer every id counts.
    """
    known = min(model.shape.d_vocab, model.shape.n_logits)
    if model.tokenizer is None:
        return torch.arange(known)
    special = set(model.tokenizer.all_special_ids)
    added = getattr(model.tokenizer, "added_tokens_decoder", {})
    special |= {token_id for token_id, token in added.items() if token.special}
    ids = set(model.tokenizer.get_vocab().values()) - special
    return torch.tensor(sorted(i for i in ids if 0 <= i < known))


def check_length(model: HasVocabulary, length: int, *, what: str, fix: str) -> None:
    """Refuse, before any forward pass, examples that exceed the model's context.

    Raises:
        InputError: with the length, the limit and the fix.
    """
    limit = model.shape.n_ctx
    if limit is not None and length > limit:
        raise InputError(
            f"{what} is {length} tokens long, {model.name} reads at most {limit}: {fix}."
        )


def need_tokenizer(model: HasVocabulary, what: str) -> Tokenizer:
    """Return the tokenizer, which must report character offsets.

    Raises:
        InputError: if there is no tokenizer, or it has no offsets.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{what} needs a tokenizer and {model.name} has none: "
            "use repeated_tokens or from_tokens."
        )
    if not getattr(model.tokenizer, "is_fast", False):
        raise InputError(
            f"{what} needs a tokenizer that reports character offsets and that of "
            f"{model.name} does not: load it with use_fast=True."
        )
    return model.tokenizer


_KEPT = "a text already begins with the model's BOS: no second one is added."


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text with each token's character span.

    A prepended token has the span (0, 0). ``unknown`` is the id that the tokenizer gives to what it
    cannot read; None if it reads everything.
    """

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    unknown: int | None = None

    def covering(self, start: int, end: int) -> list[int]:
        """Positions of the tokens that overlap ``text[start:end]``.

        White space at the edges of the range is ignored, since many tokenizers keep the space
        in front of a word in the word's token.
        """
        part = self.text[start:end]
        start, end = end - len(part.lstrip()), start + len(part.rstrip())
        return [i for i, (a, b) in enumerate(self.spans) if a < end and b > start]

    def word(self, start: int, end: int) -> int | None:
        """Position of the token that is exactly ``text[start:end]``; None if there is none.

        The token for unknown words does not count: it stands for all of them alike.
        """
        found = self.covering(start, end)
        if len(found) != 1 or self.ids[found[0]] == self.unknown:
            return None
        a, b = self.spans[found[0]]
        return found[0] if self.text[a:b].strip() == self.text[start:end].strip() else None


def encode(
    tokenizer: Tokenizer, text: str, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
) -> Encoded:
    """Tokenize one text with ``prefix`` instead of the tokenizer's own special tokens.

    If a text already starts with the prefix, such as a copied prompt, it is not added again.

    Args:
        tokenizer: the model's tokenizer.
        text: any text.
        prefix: ids to prepend.
        suffix: ids to append.
    """
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = [(int(a), int(b)) for a, b in out["offset_mapping"]]
    ids = list(out["input_ids"])
    if prefix and ids[: len(prefix)] == list(prefix):
        warnings.warn(_KEPT, HeadscopeWarning, stacklevel=2)
        prefix = ()
    around = [(0, 0)] * len(prefix), [(0, 0)] * len(suffix)
    unknown = getattr(tokenizer, "unk_token_id", None)
    return Encoded(text, [*prefix, *ids, *suffix], [*around[0], *spans, *around[1]], unknown)


def pad_right(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Stack token lists of different lengths, padded on the right."""
    length = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    sizes = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(length)[None] < sizes[:, None]


def next_tokens(
    tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> Int[Tensor, "batch pos"]:
    """Token after each position; -1 at the last one and at padding."""
    targets = torch.full_like(tokens, -1)
    targets[:, :-1] = tokens[:, 1:].where(real[:, 1:] & real[:, :-1], -1)
    return targets


def is_delimiter(text: str) -> bool:
    """Whether a token's text is a line break, or only punctuation and spaces."""
    shown = text.strip()
    if not shown:
        return "\n" in text
    return all(unicodedata.category(c).startswith("P") or c.isspace() for c in shown)


def delimiters(
    tokenizer: Tokenizer, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """Mark ``delimiter``: punctuation, line breaks and special separators, by decoded text.

    The first token of each example is never included: attention there is the sink's, which
    ``first_token`` measures.
    """
    ids = sorted(set(tokens[real].tolist()))
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    chosen = [i for i, text in zip(ids, texts, strict=True) if i in special or is_delimiter(text)]
    mark = torch.isin(tokens, torch.tensor(chosen, dtype=tokens.dtype)) & real
    return mark & (real.cumsum(1) > 1)


def separators(
    tokenizer: Tokenizer, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Mark ``separator`` of an encoder's text, ``[SEP]`` or ``</s>``; empty if there is none."""
    token = getattr(tokenizer, "sep_token_id", None)
    return {} if token is None else {"separator": (tokens == int(token)) & real}


def at_positions(
    length: int, positions: Sequence[int | Sequence[int]]
) -> Bool[Tensor, "batch pos"]:
    """Build a mark that is True at each example's positions."""
    mark = torch.zeros(len(positions), length, dtype=torch.bool)
    for row, places in zip(mark, positions, strict=True):
        row[places] = True
    return mark


@checked
def from_tokens(
    tokens: Int[Tensor, "batch pos"] | Sequence[Sequence[int]],
    real: Bool[Tensor, "batch pos"] | None = None,
    marks: Mapping[str, Bool[Tensor, "batch pos"]] | None = None,
    targets: Int[Tensor, "batch pos"] | None = None,
    clusters: Sequence[int] | Int[Tensor, " batch"] | None = None,
) -> Probe:
    """Make a probe from token ids; equal tokens count as repetitions.

    Args:
        tokens: token ids, as the model reads them (including a BOS if you want one).
        real: False at padding, on either side; None means no padding.
        marks: named sets of positions.
        targets: token to predict at each position, -1 for none; None means the next token, which is
            not allowed for an encoder.
        clusters: a label per example; examples with the same label (a needle, a document, a
            template) count as one observation in errors, intervals and tests.

    Raises:
        InputError: if the shapes do not match.

    Example:
        >>> probe = from_tokens([[5, 7, 9, 5, 7, 9]])
        >>> probe.targets.tolist()
        [[7, 9, 5, 7, 9, -1]]
    """
    try:
        given = torch.as_tensor(tokens)
        whole_numbers = not (given.is_floating_point() or given.is_complex())
        if given.numel() and (given.dtype == torch.bool or not whole_numbers):
            raise TypeError
        ids = given.long()
    except (TypeError, ValueError) as error:
        raise InputError(
            "tokens= must be rows of whole numbers of one length: pad them, and mark the real "
            "tokens with real=."
        ) from error
    shown = torch.ones_like(ids, dtype=torch.bool) if real is None else torch.as_tensor(real).bool()
    named = {str(name): torch.as_tensor(mark).bool() for name, mark in (marks or {}).items()}
    probe = Probe(tokens=ids, real=shown, structure=ids, targets=ids, marks=named)
    return replace(
        probe,
        structure=ids.where(shown, -1),
        targets=next_tokens(ids, shown) if targets is None else targets,
        next_token=targets is None,
        clusters=None if clusters is None else torch.as_tensor(clusters).long(),
    )


@checked
def from_batch(
    inputs: Mapping[str, Any],
    marks: Mapping[str, Any] | None = None,
    targets: Int[Tensor, "batch pos"] | Int[Tensor, " batch"] | None = None,
    *,
    labels: Sequence[int] | Int[Tensor, " batch"] | None = None,
    model: HasVocabulary | None = None,
) -> Probe:
    """Make a probe from a model's input batch, with the names of tokenizers and image processors.

    Args:
        inputs: ``input_ids [batch pos]``, and ``attention_mask`` if there is padding; for an
            encoder-decoder also ``decoder_input_ids`` and ``decoder_attention_mask``, whose
            positions are then the probe's, and ``input_features`` for speech; or ``pixel_values
            [batch channel height width]`` alone; or both, with the further outputs of a
            vision-language model's processor, as many images for every text.
        marks: named sets of positions; those of an encoder-decoder's source under ``"source"``; for
            images also boxes of patches: first row and column, and one past the last, one box for
            all images or one for each.
        targets: token to predict at each position, -1 for none; None means the next token, which is
            not allowed for an encoder. For images, the class of each, -1 for none.
        labels: alias of targets for images.
        model: the model that will read images; needed for marks, since it determines the number of
            patches.

    Raises:
        InputError: if there are no token ids and no images, shapes differ, a box lies outside the
            image, or an input (such as a second segment) would change the model's computation in an
            unsupported way.

    Example:
        >>> read = {"input_ids": [[5, 7, 9], [5, 7, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
        >>> hs.probes.from_batch(read).real.sum(1).tolist()
        [3, 2]
        >>> seen = hs.probes.from_batch({"pixel_values": torch.zeros(2, 3, 8, 8)}, labels=[4, 1])
        >>> seen.targets[:, 0].tolist()
        [4, 1]
    """
    if labels is not None and targets is not None:
        raise InputError(
            "labels= and targets= are both given: for images they are the same, so give one of "
            "them."
        )
    if PIXELS in inputs and TOKENS not in inputs:
        classes = labels if targets is None else targets
        return _of_images(Batch.of(inputs), marks or {}, classes, model)
    if labels is not None:
        raise InputError("labels= are the classes of images: give targets= for a text.")
    if "decoder_input_ids" in inputs:
        return _from_sides(inputs, marks, targets)
    batch = Batch.of(inputs, targets)
    probe = from_tokens(batch.inputs[TOKENS], batch.masks[TEXT], marks, batch.targets)
    beside = {name: value for name, value in batch.inputs.items() if name != TOKENS}
    return replace(probe, inputs=beside) if beside else probe


_SIDES = {"input_ids", "input_features", "attention_mask", "decoder_input_ids"}


def _from_sides(inputs: Mapping[str, Any], marks: Any, targets: Any) -> Probe:
    """Make the probe from an encoder-decoder's inputs."""
    from headscope.probes.translation import of_sides

    if unknown := sorted(set(inputs) - _SIDES - {"decoder_attention_mask"}):
        hint = ": give targets=, -1 if there is none" if unknown[0] == "labels" else ""
        raise InputError(f"headscope cannot hand an encoder-decoder {unknown[0]!r}{hint}.")
    names = {TOKENS: "decoder_input_ids", "attention_mask": "decoder_attention_mask"}
    given = {name: inputs[own] for name, own in names.items() if inputs.get(own) is not None}
    decoder = Batch.of(given, targets)
    if (features := inputs.get("input_features")) is not None:
        beside = {"input_features": torch.as_tensor(features)}
        if beside["input_features"].ndim != 3:
            raise InputError(
                f"'input_features' has shape {tuple(beside['input_features'].shape)}, not "
                "[batch mel frame]."
            )
    elif inputs.get(TOKENS) is None:
        raise InputError(
            "'decoder_input_ids' come without a source: give input_ids or input_features too."
        )
    else:
        source = Batch.of({n: inputs[n] for n in (TOKENS, "attention_mask") if n in inputs})
        beside = {TOKENS: source.inputs[TOKENS], "attention_mask": source.masks[TEXT].long()}
    return of_sides(
        decoder.inputs[TOKENS], decoder.masks[TEXT], beside, targets=decoder.targets, marks=marks
    )


@checked
def paired(first: Probe, second: Probe) -> Probe:
    """Pair the examples of two probes: ``first``, with ``second`` as its ``corrupt`` pair.

    For metrics of similarity, which only need equal numbers of examples; patching also requires
    that both are aligned position by position.

    Args:
        first: the probe that is run and edited.
        second: example i is the partner of example i.

    Raises:
        InputError: if they differ in their number of examples.

    Example:
        >>> pairs = hs.probes.paired(probe, probe.examples(torch.tensor([1, 0])))
        >>> torch.equal(pairs.corrupt.tokens, probe.tokens.flip(0))
        True
    """
    if len(first) != len(second):
        raise InputError(f"{len(first)} examples and {len(second)} partners: give as many of both.")
    return replace(first, corrupt=second)


def _of_images(
    batch: Batch, marks: Mapping[str, Any], classes: Any, model: HasVocabulary | None
) -> Probe:
    grid = None if model is None else grid_of(getattr(model, "stacks", {}))
    if model is not None:
        misfit = batch.misfit(model.name, None, 0, grid)
        if misfit is not None:
            raise InputError(misfit)
    asked = None if classes is None else one_class_each(classes, len(batch))
    if marks and grid is None:
        raise InputError(
            "marks of images need model=: how many patches an image has is known to the model that "
            "reads it."
        )
    marked = {} if grid is None else marks_of(grid, marks, len(batch))
    return of_images(batch.inputs[PIXELS], grid, asked, marks=marked)


def one_class_each(classes: Any, count: int) -> Int[Tensor, " batch"]:
    """Validate classes of images.

    Raises:
        InputError: unless there is one integer per image.
    """
    found = torch.as_tensor(classes)
    if found.is_floating_point() or found.shape not in ((count,), (count, 1)):
        raise InputError(
            f"the labels have shape {tuple(found.shape)}: give one class number for each of the "
            f"{count} images, -1 if there is none."
        )
    return found.reshape(count).long()


def marks_of(
    grid: PatchGrid, marks: Mapping[str, Any], count: int
) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Validate marks given as positions or as boxes of patches.

    Args:
        grid: patch grid of the images.
        marks: ``[batch pos]`` booleans, a box, or a box for each image.
        count: number of images.

    Raises:
        InputError: if a box lies outside the image, or the number of boxes is wrong.
    """
    found = {}
    for name, given in marks.items():
        if isinstance(given, Tensor) and given.dtype == torch.bool:
            found[name] = given
            continue
        boxes = torch.as_tensor(given)
        each = boxes.tolist() if boxes.ndim == 2 else [boxes.tolist()] * count
        if len(each) != count:
            raise InputError(f"{name!r} has {len(each)} boxes for {count} images.")
        found[name] = torch.stack([grid.box(name, one) for one in each])
    return found
