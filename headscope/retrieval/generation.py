"""Generation with masked heads, and contrastive decoding against it (DeCoRe)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from random import Random
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import edits
from headscope.ablation.run import present
from headscope.base.arguments import checked
from headscope.base.options import Advance, RunOptions
from headscope.base.result import Glance, Shown, number, sizes
from headscope.edits import HeadEdit, Heads, Scope
from headscope.errors import InputError, nearest
from headscope.interventions import head_means
from headscope.models.decoding import Decoding, decoding, end_tokens
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes import text
from headscope.probes.encoding import bos_prefix, encode, need_tokenizer
from headscope.probes.probe import Probe

Masking = Literal["uniform", "zero", "mean"]
_SCOPES = get_args(Scope)


@dataclass(frozen=True, eq=False)
class Mask:
    """Masked heads with method and scope. Create it with :meth:`of`.

    Attributes:
        edit: edit of the heads, in its scope.
        scope: ``decode``: from the last token of the prompt on, whose query predicts the first new
            token (as in the source): headscope runs that token separately, as the first step of
            decoding; ``prefill``: before it; ``all``: everywhere.

    Example:
        >>> mask = Mask.of(model, ["L2H0"])
        >>> sorted(mask.edit.layers), mask.scope
        ([2], 'decode')
    """

    edit: HeadEdit
    scope: Scope

    @classmethod
    def of(
        cls,
        model: HeadModel,
        heads: Heads,
        method: Masking = "uniform",
        scope: Scope = "decode",
        *,
        reference: Probe | None = None,
    ) -> "Mask":
        """Create a mask for step-by-step generation; arguments are those of :func:`mask_heads`."""
        if scope not in _SCOPES:
            raise InputError(nearest(str(scope), _SCOPES, kind="scope"))
        return cls(_edit(model, heads, method, scope, reference), scope)


@checked
def mask_heads(
    model: HeadModel,
    heads: Heads,
    method: Masking = "uniform",
    scope: Scope = "decode",
    *,
    reference: Probe | None = None,
) -> AbstractContextManager[None]:
    """Context manager in which some heads are masked in every pass of the model.

    ``uniform`` is what Wu et al. 2024 (arXiv 2404.15574) call masking: the query becomes 0, so that
    the head attends to all visible keys equally. ``zero`` sets the head's output to 0, ``mean`` to
    its mean over a reference. Inside the context the model's own ``generate`` runs masked, with its
    key/value cache.

    transformers' ``generate`` reads the whole prompt at once, so its first new token is predicted
    before ``scope="decode"`` begins; in the source the mask begins with the last token of the
    prompt, as in :func:`headscope.retrieval.generate`. In a hand-written loop, a pass that extends
    a cache counts as decoding.

    Args:
        model: from :func:`headscope.load`.
        heads: heads to mask.
        method: ``uniform``, ``zero`` or ``mean``.
        scope: ``decode`` while tokens are generated, ``prefill`` while a prompt is read, ``all`` in
            both.
        reference: reference of ``mean``; default: the bundled passages.

    Raises:
        InputError: if the model has no such head, or an argument is unknown.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> with mask_heads(model, ["L2H0", "L2H1"]):
        ...     said = hs.retrieval.generate(model, "The code of the red door is", new_tokens=2)
        >>> len(said.tokens[0])
        2
    """
    if scope not in _SCOPES:
        raise InputError(nearest(str(scope), _SCOPES, kind="scope"))
    return model.edited([_edit(model, heads, method, scope, reference)])


def _edit(
    model: HeadModel, heads: Heads, method: Masking, scope: Scope, reference: Probe | None
) -> HeadEdit:
    chosen = present(model, heads)
    if method not in get_args(Masking):
        raise InputError(nearest(str(method), get_args(Masking), kind="way to mask heads"))
    if reference is not None and method != "mean":
        raise InputError(f"reference is for method='mean'; {method} needs none.")
    if method == "mean":
        means = head_means(model, text(model) if reference is None else reference)
        return edits.mean(chosen, means, scope=scope)
    return (edits.uniform if method == "uniform" else edits.zero)(chosen, scope=scope)


Prompts = Probe | str | Sequence[str] | Int[Tensor, "batch pos"]
_TOKENS_PER_PASS = 8192


def prompt_ids(model: HeadModel, prompts: Prompts) -> list[list[int]]:
    """Token ids of every prompt; probe examples end at their mark ``end``, if there is one.

    Raises:
        InputError: if there is no prompt, or one is empty or unknown to the model.
    """
    if isinstance(prompts, Probe):
        ids = _of_probe(prompts)
    elif isinstance(prompts, Tensor):
        ids = prompts.tolist()
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokenizer = need_tokenizer(model, "a prompt in words")
        ids = [encode(tokenizer, one, bos_prefix(model, None)).ids for one in texts]
    if not ids or not all(ids):
        raise InputError(
            "prompts= is empty, or contains an empty prompt: give at least one token each."
        )
    low, high = min(map(min, ids)), max(map(max, ids))
    if low < 0 or high >= model.shape.d_vocab:
        raise InputError(
            f"the prompts have token ids {low} to {high}, but {model.name} knows 0 to "
            f"{model.shape.d_vocab - 1}."
        )
    return ids


def _of_probe(probe: Probe) -> list[list[int]]:
    ends = probe.last
    if "end" in probe.marks:
        marked = probe.mark("end")
        ends = torch.where(marked.any(1), marked.int().argmax(1), ends)
    places = zip(probe.tokens, probe.first.tolist(), ends.tolist(), strict=True)
    return [row[first : end + 1].tolist() for row, first, end in places]


def check_room(model: HeadModel, prompts: list[list[int]], new_tokens: int) -> None:
    """Raise InputError if prompt and answer exceed the model's context."""
    if new_tokens < 1:
        raise InputError(f"new_tokens={new_tokens}: give 1 or more.")
    longest = max(map(len, prompts))
    if model.shape.n_ctx is not None and longest + new_tokens - 1 > model.shape.n_ctx:
        raise InputError(
            f"a prompt of {longest} tokens and {new_tokens} new ones are more than the "
            f"{model.shape.n_ctx} that {model.name} takes: shorten it, or ask for fewer."
        )


@dataclass(frozen=True, eq=False)
class Padded:
    """Some prompts padded to one batch; ``rows`` are their indices."""

    rows: list[int]
    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]


def batches(prompts: list[list[int]], options: RunOptions) -> Iterator[Padded]:
    """Batches of prompts of similar lengths, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    while order:
        longest = len(prompts[order[0]])
        count = options.per_pass(longest, _TOKENS_PER_PASS)
        rows, order = order[:count], order[count:]
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        for at, row in enumerate(rows):
            ids = prompts[row]
            tokens[at, longest - len(ids) :] = torch.tensor(ids)
            real[at, longest - len(ids) :] = True
        yield Padded(rows, tokens, real)


@dataclass(frozen=True)
class Chooser:
    """Chooses the next token: the most likely, or sampled with a generator per prompt.

    Attributes:
        temperature: 0 for the most likely (on ties the lowest token).
        seed: seed of the draws; a prompt's draws do not depend on its batch.
    """

    temperature: float
    seed: int

    def __post_init__(self) -> None:
        """Validate the temperature."""
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature}: give 0 (greedy) or more.")

    def __call__(
        self, logits: Float[Tensor, "batch d_vocab"], draws: list[Random]
    ) -> Int[Tensor, " batch"]:
        """Choose one token per row."""
        if self.temperature == 0:
            return (logits == logits.amax(1, keepdim=True)).int().argmax(1).cpu()
        shares = (logits.cpu().double() / self.temperature).softmax(1).cumsum(1)
        at = torch.tensor([one.random() for one in draws], dtype=torch.float64)[:, None]
        found = torch.searchsorted(shares, at * shares[:, -1:], right=True)
        return found[:, 0].clamp_max(logits.shape[1] - 1)

    def draws(self, rows: list[int]) -> list[Random]:
        """Random number generator of each prompt."""
        return [Random(f"{self.seed} {row}") for row in rows]  # noqa: S311 - words, not secrets


@dataclass(frozen=True, repr=False)
class Generated(Shown):
    """Tokens generated after each prompt.

    Attributes:
        tokens: new tokens, without the end-of-sequence token.
        texts: the same as text; ids separated by spaces without a tokenizer.
        alphas: weight of the contrast at every step; empty without one.
    """

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    alphas: tuple[tuple[float, ...], ...] = ()

    def glance(self) -> Glance:
        """The text that follows each prompt, and the mean weight of the contrast."""
        columns = ("prompt", "tokens", "text", "mean weight")
        weights = [number(sum(one) / len(one)) if one else "-" for one in self.alphas]
        rows = [
            (str(at), str(len(tokens)), text, *weights[at : at + 1])
            for at, (tokens, text) in enumerate(zip(self.tokens, self.texts, strict=True))
        ]
        return Glance(
            f"text after {sizes(('prompt',), (len(rows),))}",
            columns=columns if self.alphas else columns[:3],
            rows=rows,
            hint="said.texts, said.tokens",
        )


class Mixed(NamedTuple):
    """Mixed next-token scores of several runs, and the weight used."""

    scores: Float[Tensor, "batch d_vocab"]
    alpha: Float[Tensor, " batch"] | None = None


Mixer = Callable[[list[Tensor]], Mixed]


@checked
@own_types()
def generate(
    model: HeadModel,
    prompts: Prompts,
    *,
    mask: Mask | None = None,
    new_tokens: int = 20,
    temperature: int | float = 0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Generated:
    """Continue prompts, optionally with masked heads.

    The prompt is read up to its last token, then one token at a time: the last token's query
    predicts the first new one, and belongs to decoding. Keys and values are cached;
    transformer-lens bridges read the whole text again, with the same results.

    Args:
        model: from :func:`headscope.load`.
        prompts: texts, token ids ``[batch pos]``, or a probe, whose examples end at ``end``.
        mask: heads to mask, e.g. ``hs.retrieval.Mask.of(model, heads)``.
        new_tokens: maximum number of new tokens.
        temperature: 0: always the most likely token; else sampled from ``softmax(logits / t)``.
        seed: seed of the draws.
        batch_size: prompts per batch; default: about 8192 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if a prompt does not fit, or an argument is invalid.
        UnsupportedModelError: if the model's cache holds more than keys and values.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> mask = hs.retrieval.Mask.of(model, ["L2H0"], scope="all")
        >>> said = generate(model, ["One day the", "Every night the"], mask=mask, new_tokens=3)
        >>> [len(one) for one in said.tokens]
        [3, 3]
    """
    return write(
        model,
        prompts,
        [mask],
        lambda runs: Mixed(runs[0]),
        new_tokens=new_tokens,
        chooser=Chooser(float(temperature), seed),
        options=RunOptions(batch_size, seed=seed, progress=progress),
    )


def write(
    model: HeadModel,
    prompts: Prompts,
    masks: Sequence[Mask | None],
    mix: Mixer,
    *,
    new_tokens: int,
    chooser: Chooser,
    options: RunOptions,
) -> Generated:
    """Generate with one run per mask on the same text; ``mix`` combines their scores."""
    ids = prompt_ids(model, prompts)
    check_room(model, ids, new_tokens)
    said: dict[int, list[int]] = {}
    weights: dict[int, list[float]] = {}
    with options.track(len(ids) * new_tokens, f"{model.name} writes") as advance:
        for batch in batches(ids, options):
            texts = [Text(model, batch.real, mask) for mask in masks]
            tokens, alphas = _written(model, batch, texts, mix, chooser, new_tokens, advance)
            for at, row in enumerate(batch.rows):
                said[row] = tokens[at]
                weights[row] = alphas[at][: len(tokens[at])]
    in_order = [tuple(said[row]) for row in range(len(ids))]
    contrasted = [tuple(weights[row]) for row in range(len(ids))]
    decode = None if model.tokenizer is None else model.tokenizer.decode
    return Generated(
        tuple(in_order),
        tuple(" ".join(map(str, one)) if decode is None else decode(one) for one in in_order),
        tuple(contrasted) if any(contrasted) else (),
    )


@dataclass
class Text:
    """One incremental run of a model over a growing batch, under a mask."""

    model: HeadModel
    real: Bool[Tensor, "batch pos"]
    mask: Mask | None
    _state: Decoding = field(init=False)

    def __post_init__(self) -> None:
        """Start; every prompt's last token is real, and read separately."""
        prompt = self.real.shape[1] - 1
        self._state = decoding(self.model, self.real[:, : max(1, prompt)], prompt=prompt)

    @property
    def length(self) -> int:
        """Number of positions read."""
        return self._state.length

    def prompt(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
        """Read the prompt, its last token separately."""
        if tokens.shape[1] > 1:
            self.read(tokens[:, :-1])
        return self.read(tokens[:, -1:])

    def read(self, tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch d_vocab"]:
        """Read further tokens and return the next-token logits in fp32."""
        edits = () if self.mask is None else (self.mask.edit,)
        return self._state.step(tokens, edits=edits).float()


def _written(
    model: HeadModel,
    batch: Padded,
    texts: list[Text],
    mix: Mixer,
    chooser: Chooser,
    new_tokens: int,
    advance: Advance,
) -> tuple[list[list[int]], list[list[float]]]:
    """New tokens of a batch, and the weights of each step."""
    ends = end_tokens(model)
    draws = chooser.draws(batch.rows)
    said: list[list[int]] = [[] for _ in batch.rows]
    alphas: list[list[float]] = [[] for _ in batch.rows]
    open_rows = set(range(len(batch.rows)))
    runs = [text.prompt(batch.tokens) for text in texts]
    for step in range(new_tokens):
        mixed = mix(runs)
        tokens = chooser(mixed.scores, draws)
        open_rows -= {row for row in open_rows if int(tokens[row]) in ends}
        for row in open_rows:
            said[row].append(int(tokens[row]))
            if mixed.alpha is not None:
                alphas[row].append(float(mixed.alpha[row]))
        advance(len(batch.rows))
        if not open_rows or step == new_tokens - 1:
            break
        runs = [text.read(tokens[:, None]) for text in texts]
    return said, alphas


Alpha = Literal["entropy", "gain"] | int | float
# Largest weight that an entropy gives, and the share of the most likely token's probability below
# which a token is excluded (Li et al. 2022, arXiv 2210.15097: 0.1).
MOST = 1.0
PLAUSIBLE = 0.1


@dataclass(frozen=True)
class Contrast:
    """Contrastive scores ``(1 + alpha) log p_base - alpha log p_masked`` (Gema et al. 2024).

    An entropy of several nats weights the difference so strongly that tokens win which both models
    consider impossible. So by default alpha is at most 1, and tokens with less than a tenth of the
    most likely one's base probability are excluded: the plausibility constraint of contrastive
    decoding (Li et al. 2022, arXiv 2210.15097, section 3.3). The source of DeCoRe has neither; use
    :meth:`published` for its setting.

    Attributes:
        alpha: a number >= 0 for all steps (0.5 in the source); ``entropy``: that of the base
            model's next token, in nats; ``gain``: how much masking adds to it, at least 0.
        most: largest alpha that ``entropy`` and ``gain`` give; None: no limit. A number given as
            alpha is used unchanged.
        share: divide an entropy by that of the uniform distribution, so that it is at most 1.
        plausible: tokens with ``p_base < plausible * max(p_base)`` are excluded (score -inf); from
            0, which excludes none, to 1, which leaves the base model's choice.

    Example:
        >>> base, masked = torch.zeros(1, 4), torch.eye(4)[:1]
        >>> Contrast(0.5)(base, masked).scores.argmin().item()  # what masking makes more likely
        0
    """

    alpha: Alpha = "entropy"
    most: int | float | None = MOST
    share: bool = False
    plausible: int | float = PLAUSIBLE

    @classmethod
    def published(cls, alpha: Alpha = "entropy") -> "Contrast":
        """Settings of Gema et al. 2024: unlimited alpha, and no token excluded.

        Example:
            >>> Contrast.published().most is None
            True
        """
        return cls(alpha, most=None, plausible=0.0)

    def __post_init__(self) -> None:
        """Validate alpha and its limits."""
        if isinstance(self.alpha, str):
            if self.alpha not in ("entropy", "gain"):
                raise InputError(f"alpha={self.alpha!r} is unknown: 'entropy', 'gain' or a number.")
        elif not 0 <= self.alpha < float("inf"):
            raise InputError(f"alpha={self.alpha} must be 0 or more.")
        if self.most is not None and self.most < 0:
            raise InputError(f"most={self.most} must be 0 or more.")
        if not 0 <= self.plausible <= 1:
            raise InputError(f"plausible={self.plausible} is a share of a probability: 0 to 1.")

    def __call__(
        self, base: Float[Tensor, "batch d_vocab"], masked: Float[Tensor, "batch d_vocab"]
    ) -> Mixed:
        """Mix the logits of both runs."""
        own, other = base.float().log_softmax(1), masked.float().log_softmax(1)
        alpha = self._weight(own, other)
        scores = own + alpha[:, None] * (own - other)
        out = own.isneginf()
        if self.plausible:
            out = out | (own < own.amax(1, keepdim=True) + math.log(self.plausible))
        return Mixed(scores.masked_fill(out, -torch.inf), alpha)

    def _weight(self, own: Tensor, other: Tensor) -> Float[Tensor, " batch"]:
        if not isinstance(self.alpha, str):
            return torch.full((len(own),), float(self.alpha), device=own.device)
        weight = _entropy(own)
        if self.alpha == "gain":
            weight = (_entropy(other) - weight).clamp_min(0)
        if self.share:
            weight = weight / math.log(own.shape[1])
        return weight if self.most is None else weight.clamp_max(float(self.most))


def _entropy(log_probabilities: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
    """Entropy in nats."""
    entropy: Tensor = torch.special.entr(log_probabilities.exp()).sum(1)
    return entropy


@checked
@own_types()
def decore(
    model: HeadModel,
    prompts: Prompts,
    heads: Heads,
    alpha: Alpha = "entropy",
    *,
    most: int | float | None = MOST,
    share: bool = False,
    plausible: int | float = PLAUSIBLE,
    method: Masking = "uniform",
    scope: Scope = "decode",
    new_tokens: int = 20,
    temperature: int | float = 0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Generated:
    """Generate by contrasting retrieval heads (DeCoRe, Gema et al. 2024, arXiv 2410.18860).

    Two runs read the same text, one with the heads masked; each has its own key/value cache. The
    next token is chosen by ``(1 + alpha) log p_base - alpha log p_masked``, with ``alpha`` the
    entropy of ``p_base``, at most 1: the less certain the model is, the more the contribution of
    its retrieval heads counts. Only tokens with at least a tenth of the most likely one's
    probability can be chosen, as in contrastive decoding (Li et al. 2022). The source has no such
    limits: ``most=None, plausible=0`` is its setting, with which small models and large
    vocabularies, whose entropies are several nats, produce nonsense. ``alpha=0`` is the base model.
    Takes about twice as long as plain generation.

    Args:
        model: from :func:`headscope.load`.
        prompts: as for :func:`headscope.retrieval.generate`.
        heads: heads to mask, e.g. ``retrieval.heads()``.
        alpha: see :class:`headscope.retrieval.Contrast`, as for the next three.
        most: largest alpha that an entropy gives; None: no limit, as in the source.
        share: divide an entropy by that of the uniform distribution.
        plausible: least share of the most likely token's probability; 0: none, as in the source.
        method: how heads are masked; ``uniform`` in the source.
        scope: when; ``decode`` in the source.
        new_tokens: maximum number of new tokens.
        temperature: 0: the highest score; else sampled from ``softmax(scores / t)``.
        seed: seed of the draws.
        batch_size: prompts per batch.
        progress: show a progress bar.

    Returns:
        Generated texts, with the alpha of every step.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> prompt = "The code of the red door is seven. The code of the red door is"
        >>> said = decore(model, prompt, ["L2H0", "L2H1"], new_tokens=2)
        >>> len(said.alphas[0])
        2
    """
    contrast = Contrast(alpha, most, share, plausible)
    return write(
        model,
        prompts,
        [None, Mask.of(model, heads, method, scope)],
        lambda runs: contrast(runs[0], runs[1]),
        new_tokens=new_tokens,
        chooser=Chooser(float(temperature), seed),
        options=RunOptions(batch_size, seed=seed, progress=progress),
    )


@dataclass
class DeCoReProcessor:
    """DeCoRe as a logits processor for transformers' ``generate``, greedy or sampled.

    transformers runs the base model with its own cache; the processor runs the masked model with
    another. Prompts are those of the first call, padded on the left or not at all; a new prompt
    starts anew. Beam search works, but reads the text again whenever beams are reordered.

    Attributes:
        model: from :func:`headscope.load`; call ``generate`` of ``model.module``.
        heads: heads to mask.
        contrast: how both runs are combined.
        real: mask of the prompts, False at padding; default: no padding.
        method: how heads are masked.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> processor = DeCoReProcessor(model, ["L2H0"])
        >>> ids = hs.probes.repeated_tokens(model, length=8, batch=2).tokens
        >>> out = model.module.generate(
        ...     ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0,
        ...     logits_processor=[processor],
        ... )
        >>> out.shape[1] - ids.shape[1]
        2
    """

    model: HeadModel
    heads: Heads
    contrast: Contrast = field(default_factory=Contrast)
    real: Bool[Tensor, "batch pos"] | None = None
    method: Masking = "uniform"
    _mask: Mask = field(init=False)
    _text: Text | None = field(init=False, default=None)
    _read: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Validate the heads."""
        self._mask = Mask.of(self.model, self.heads, self.method)

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        """Combine the base model's scores with the masked model's."""
        masked = self._masked(input_ids.cpu()).to(scores.device)
        return self.contrast(scores, masked).scores.to(scores.dtype)

    def _masked(self, ids: Tensor) -> Tensor:
        known = self._read
        self._read = ids.clone()
        if known is not None and self._text is not None and ids.shape[1] == known.shape[1] + 1:
            if torch.equal(ids[:, :-1], known):
                return self._text.read(ids[:, -1:])
            prompt = self._text.real.shape[1]  # beams were reordered
            self._text = Text(self.model, self._text.real, self._mask)
            self._text.prompt(ids[:, :prompt])
            return self._text.read(ids[:, prompt:])
        real = torch.ones_like(ids, dtype=torch.bool)
        if self.real is not None:
            if len(ids) % len(self.real) or self.real.shape[1] != ids.shape[1]:
                raise InputError(
                    f"real has shape {tuple(self.real.shape)}, but the prompts have "
                    f"{tuple(ids.shape)}."
                )
            real = self.real.repeat_interleave(len(ids) // len(self.real), 0)
        self._text = Text(self.model, real, self._mask)
        return self._text.prompt(ids)
