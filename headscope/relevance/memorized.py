"""Memorised text: spans that a model continues verbatim, and the heads involved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope import capture
from headscope.base.arguments import checked
from headscope.base.options import track
from headscope.base.statistics import Design
from headscope.errors import InputError, UnsupportedModelError, whole
from headscope.heads import ModelShape
from headscope.models.decoding import need_continuing
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Reads, Tap, TapView, at_layers
from headscope.origin import origin
from headscope.probes.encoding import bos_prefix, check_length, encode, from_tokens, need_tokenizer
from headscope.probes.probe import Probe
from headscope.table import HeadScores, HeadTable, Provenance
from headscope.table.relevance import Memorized, TextSpan

SOURCE = "Stoehr et al. 2024 (arXiv 2403.19851), localizing paragraph memorization"
Documents = Sequence[str] | Sequence[Sequence[int]]
_MATRICES = ("Q", "K", "V", "O")
# Number of known spans whose prefix is perturbed.
_MOST_KNOWN = 32


@checked
@own_types()
def memorized(
    model: HeadModel,
    texts: Documents,
    *,
    prefix: int = 50,
    length: int = 50,
    stride: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Memorized:
    """Find memorised spans of a corpus, and localise them in the model's heads.

    A span is ``prefix`` tokens followed by ``length`` tokens. It is known if greedy decoding from
    the prefix reproduces all of the rest. One pass over the span itself decides this, since greedy
    decoding agrees with the text up to its first error. ``unknown`` spans go wrong within the first
    fifth.

    Gradients are those of the mean loss on known continuations with respect to every head's
    weights, reported as the largest absolute entry of each matrix. They are NaN without a known
    span, and for families whose weight gradients cannot be computed from activations (query and key
    norms). The source adds a contrast with unknown spans, which has no gradient in the first step
    and is left out here.

    ``rare_attention`` is Kendall's tau, at the last prefix token, between attention to a token
    (mean over its occurrences, since the sum grows with the count) and its frequency in the corpus,
    averaged over known spans, or over all spans if none is known. It is -1 if rarer tokens always
    get more attention. Its control shuffles the counts of the span's tokens. Standard errors and
    tests treat the spans of one text as a cluster.

    Args:
        model: decoder with causal attention.
        texts: corpus, as texts or token ids. Every span is prefixed with a BOS if the model's
            tokenizer adds one to texts.
        prefix: number of tokens given to the model.
        length: number of tokens that it must reproduce.
        stride: distance between the starts of spans, in tokens. Default: ``prefix + length``.
        batch_size: spans per pass.
        seed: seed for the replaced tokens and the shuffled counts.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if no text is long enough, or no token occurs twice in the corpus.
        UnsupportedModelError: if the model is bidirectional.

    Source: Stoehr et al. 2024 (arXiv 2403.19851).

    Example:
        >>> from headscope.models.bundled import stories
        >>> found = hs.relevance.memorized(model, stories(2), prefix=10, length=5)
        >>> found.heads.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    need_continuing(model)
    for name, value in (("prefix", prefix), ("length", length), ("stride", stride)):
        if value is not None:
            whole(value, name, 1)
    corpus = _read(model, texts)
    counts = _counts(corpus, model.shape.d_vocab)
    start = [] if not isinstance(texts[0], str) else bos_prefix(model, None)
    check_length(
        model, len(start) + prefix + length, what="a span", fix="give a smaller prefix or length"
    )
    places = _places(corpus, prefix + length, stride or prefix + length)
    tokens = torch.tensor([[*start, *corpus[t][s : s + prefix + length]] for t, s in places])
    probe = replace(
        _spans_probe(tokens, len(start) + prefix),
        clusters=torch.tensor([text for text, _ in places]),
    )
    capture.check_fits(model, probe, answers=True)
    right, losses = _tried(model, probe, batch_size, progress)
    spans = tuple(
        TextSpan(text, at, int(n), float(one))
        for (text, at), n, one in zip(places, right, losses, strict=True)
    )
    known = right == length
    chosen = np.flatnonzero(known)
    seen = probe.examples(torch.from_numpy(chosen if len(chosen) else np.arange(len(probe))))
    about = origin(model, probe, prefix=prefix, length=length)
    scores = [rare_attention(model, seen, counts, seed, batch_size=batch_size, about=about)]
    scores += _gradients(model, seen if len(chosen) else None, batch_size, about)
    broken = _broken(model, probe, chosen[:_MOST_KNOWN], len(start), prefix, seed, batch_size)
    return Memorized(
        spans=spans,
        prefix=prefix,
        length=length,
        known=known,
        unknown=right <= length // 5,
        heads=HeadTable(scores),
        broken=broken,
        provenance=about,
    )


def _read(model: HeadModel, texts: Documents) -> list[list[int]]:
    if isinstance(texts, str) or not len(texts):
        raise InputError("give the corpus as a list of texts, at least one.")
    if not isinstance(texts[0], str):
        try:
            return [[whole(one, "a token id") for one in _listed(row)] for row in texts]
        except TypeError as error:
            raise InputError(
                f"the corpus is neither texts nor lists of token ids: {error}."
            ) from error
    tokenizer = need_tokenizer(model, "a corpus of texts")
    return [encode(tokenizer, str(one)).ids for one in texts]


def _listed(row: Any) -> Any:
    return row.tolist() if isinstance(row, Tensor) else row


def _counts(corpus: Sequence[Sequence[int]], d_vocab: int) -> Int[Tensor, " d_vocab"]:
    """Number of occurrences of every token.

    Raises:
        InputError: if no token occurs twice.
    """
    ids = torch.tensor([one for row in corpus for one in row] or [0])
    wrong = ids[(ids < 0) | (ids >= d_vocab)]
    if len(wrong):
        raise InputError(
            f"the corpus has token {int(wrong[0])}: the model knows 0 to {d_vocab - 1}."
        )
    counts = torch.bincount(ids, minlength=d_vocab)
    if int(counts.max()) < 2:
        raise InputError(
            "no token of the corpus occurs twice, so token frequencies are meaningless: give more "
            "text."
        )
    return counts


def _places(corpus: Sequence[Sequence[int]], size: int, stride: int) -> list[tuple[int, int]]:
    found = [
        (text, at)
        for text, row in enumerate(corpus)
        for at in range(0, len(row) - size + 1, stride)
    ]
    if not found:
        longest = max(map(len, corpus))
        raise InputError(
            f"a span is {size} tokens and the longest text has {longest}: give longer texts, or a "
            "smaller prefix or length."
        )
    return found


def _spans_probe(tokens: Int[Tensor, "batch pos"], start: int) -> Probe:
    """Probe of spans: continuations are targets, the last prefix token is marked ``end``."""
    targets = torch.full_like(tokens, -1)
    targets[:, start - 1 : -1] = tokens[:, start:]
    end = torch.zeros_like(tokens, dtype=torch.bool)
    end[:, start - 1] = True
    return from_tokens(tokens, marks={"end": end}, targets=targets)


def _tried(
    model: HeadModel, probe: Probe, batch_size: int | None, progress: bool | None
) -> tuple[Int[np.ndarray, " span"], Float[np.ndarray, " span"]]:
    """Number of correct tokens before the first error of every continuation, and its loss."""

    @torch.no_grad()
    def run(batch: Probe, _: int) -> tuple[Tensor, Tensor]:
        asked = batch.host.targets >= 0
        rows, unembedding = capture.final_rows(model, batch, asked)
        targets = batch.host.targets[asked].to(rows.device)
        if unembedding is None:
            best = rows.argmax(-1)
            losses = torch.nn.functional.cross_entropy(rows.float(), targets, reduction="none")
        else:
            best, losses = unembedding.best(rows), unembedding.losses(rows, targets)
        right = (best == targets).view(len(batch), -1).int().cumprod(1).sum(1)
        return right, losses.view(len(batch), -1).mean(1)

    found = []
    with track(len(probe), "continuing spans", show=progress) as advance:
        for chosen, part in capture.passes(model, probe, run, batch_size=batch_size):
            found.append(part)
            advance(chosen.stop - chosen.start)
    rights, losses = zip(*found, strict=True)
    return torch.cat(rights).cpu().numpy(), torch.cat(losses).cpu().double().numpy()


@dataclass
class _LastRows:
    """Reader of the last prefix token's attention in every layer, kept on the device."""

    at: Int[Tensor, " 1"]
    found: dict[int, Float[Tensor, "batch head key"]] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Read every layer's row."""
        return at_layers(shape, self._add)

    def _add(self, view: TapView) -> None:
        self.found[view.layer] = view.rows(self.at).pattern[:, :, 0]

    def on_host(self) -> Float[np.ndarray, "layer batch head key"]:
        """Rows of all layers, moved to the host in one transfer."""
        return torch.stack(list(self.found.values())).cpu().double().numpy()


# Entries of the token-pair table that are held at once.
_MOST_PAIRS = 4_000_000


def _tau(
    attention: Float[np.ndarray, "*any token"], counts: Int[np.ndarray, " token"]
) -> Float[np.ndarray, "*any"]:
    """Kendall's tau-b of each row with the counts; NaN if either is constant."""
    first, second = np.triu_indices(len(counts), 1)
    other = np.sign(counts[first].astype(float) - counts[second])
    flat = attention.reshape(-1, len(counts))
    size = max(1, _MOST_PAIRS // max(1, len(first)))
    parts = []
    for start in range(0, len(flat), size):
        rows = flat[start : start + size]
        apart = np.sign(rows[:, first] - rows[:, second])
        varied = np.abs(apart).sum(-1) * np.abs(other).sum()
        agree = apart @ other
        parts.append(
            np.divide(agree, np.sqrt(varied), out=np.full(len(rows), np.nan), where=varied > 0)
        )
    return np.concatenate(parts).reshape(attention.shape[:-1])


def _by_token(
    ids: Int[np.ndarray, " key"], rows: Float[np.ndarray, "*any key"]
) -> tuple[Int[np.ndarray, " token"], Float[np.ndarray, "*any token"]]:
    """Distinct tokens of a text, and the mean attention to the occurrences of each."""
    tokens, place, often = np.unique(ids, return_inverse=True, return_counts=True)
    return tokens, rows @ np.eye(len(tokens))[place] / often


@checked
def rare_attention(
    model: HeadModel,
    probe: Probe,
    counts: Int[Tensor, " d_vocab"],
    seed: int = 0,
    *,
    batch_size: int | None = None,
    about: Provenance | None = None,
) -> HeadScores:
    """Kendall's tau between attention from ``end`` and token frequency in a corpus.

    Attention to a token is the mean over its occurrences; the control shuffles the counts of the
    example's tokens. It is -1 if rarer tokens always get more attention. A leading BOS is left out:
    it does not occur in the corpus, so a head that uses it as an attention sink would seem to
    attend to rare tokens.

    Args:
        model: model to run.
        probe: probe with one position marked ``end``, the same in every example.
        counts: number of occurrences of every token in the corpus.
        seed: seed for the shuffled counts.
        batch_size: examples per pass.
        about: provenance to record with the score.

    Raises:
        InputError: if the examples do not have one ``end`` each, at the same position.

    Source: Stoehr et al. 2024 (arXiv 2403.19851), section 5.

    Example:
        >>> end = torch.zeros_like(probe.real)
        >>> end[:, -1] = True
        >>> marked = hs.probes.from_tokens(probe.tokens, marks={"end": end})
        >>> counts = torch.arange(model.shape.d_vocab)
        >>> hs.relevance.rare_attention(model, marked, counts).bounds
        (-1.0, 1.0)
    """
    if not isinstance(counts, Tensor) or counts.shape != (model.shape.d_vocab,):
        raise InputError(
            f"counts: give a tensor of {model.shape.d_vocab} numbers, the occurrences of each "
            "token."
        )
    ends = probe.host.mark("end").sum(1), probe.host.mark("end").int().argmax(1)
    if not bool((ends[0] == 1).all()) or len(set(ends[1].tolist())) > 1:
        raise InputError("every example needs one position marked 'end', the same in all.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(probe.tokens.shape, generator=generator).numpy()
    shape, often, start = model.shape, counts.cpu().numpy(), bos_prefix(model, None)
    own = np.full((shape.n_layers, shape.n_heads, len(probe)), np.nan)
    null = own.copy()
    layers = np.array(shape.attention_layers)
    for chosen, part in capture.stream(
        model, probe, lambda _, __: _LastRows(ends[1][:1]), batch_size=batch_size
    ):
        rows = part.on_host()
        for row, example in enumerate(range(chosen.start, chosen.stop)):
            keys = np.flatnonzero(probe.host.real[example, : rows.shape[-1]].numpy())
            ids = probe.host.tokens[example].numpy()
            if start and ids[keys[0]] == start[0]:
                keys = keys[1:]
            tokens, mean = _by_token(ids[keys], rows[:, row][..., keys])
            other = np.argsort(drawn[example, : len(tokens)], kind="stable")
            own[layers, :, example] = _tau(mean, often[tokens])
            null[layers, :, example] = _tau(mean, often[tokens][other])
    for layer, head in shape.removed:
        own[layer, head] = null[layer, head] = np.nan
    return HeadScores.from_examples(
        "rare_attention",
        own,
        kv_heads=shape.n_kv_heads,
        control_per_example=null,
        design=Design(paired=True, clusters=probe.cluster_labels),
        alternative="two-sided",
        unit="tau",
        bounds=(-1.0, 1.0),
        description="attention rises with token frequency; below 0: rare tokens get more",
        source=SOURCE,
        provenance=about or Provenance(),
    )


def _gradients(
    model: HeadModel, probe: Probe | None, batch_size: int | None, about: Provenance
) -> list[HeadScores]:
    """Largest absolute gradient entry of every head's matrices; NaN without examples."""
    shape = model.shape
    found = np.full((4, shape.n_layers, shape.n_heads), np.nan)
    if probe is not None and _readable(model):
        for layer, values in weight_gradients(model, probe, batch_size=batch_size).items():
            for number, name in enumerate(_MATRICES):
                one = values[name].abs().amax((-2, -1)).cpu().double().numpy()
                found[number, layer] = np.repeat(one, shape.n_heads // len(one))
    said = "the loss on known spans depends more on an entry of the head's"
    return [
        HeadScores.from_summary(
            f"grad_{name}",
            values,
            kv_heads=shape.n_kv_heads,
            unit="nats",
            bounds=(0.0, None),
            description=f"{said} W_{name}",
            source=SOURCE,
            provenance=about,
        )
        for name, values in zip(_MATRICES, found, strict=True)
    ]


def _readable(model: HeadModel) -> bool:
    """Whether gradients of weights can be computed from those of activations."""
    try:
        for layer in model.shape.attention_layers:
            _need_plain(model, layer)
            model.parts.input_norm(layer)
    except UnsupportedModelError:
        return False
    return True


def _need_plain(model: HeadModel, layer: int) -> None:
    shaped = model.parts.query_key(layer)
    if shaped.query_norm is not None or shaped.key_norm is not None:
        raise UnsupportedModelError(
            f"{model.name} norms its queries and keys, so gradients of W_Q and W_K cannot be "
            "computed from those of its scores."
        )


@checked
@own_types()
def weight_gradients(
    model: HeadModel, probe: Probe, *, batch_size: int | None = None
) -> dict[int, dict[str, Float[Tensor, "head first second"]]]:
    """Gradient of the mean loss with respect to ``W_Q``, ``W_K``, ``W_V`` and ``W_O``.

    Returned by layer and letter, in the shapes of ``model.weights(layer)``, with key/value heads
    not repeated. They are computed from activation gradients: ``d L / d W_V = sum of x_i^T (d L / d
    v_i)``, and likewise for queries and keys with the rotation undone; no parameter gradient is
    taken or stored.

    Args:
        model: model without query and key norms.
        probe: probe with targets.
        batch_size: examples per pass.

    Raises:
        InputError: if the probe has no targets.
        UnsupportedModelError: if the model norms its queries and keys, or attention's input is not
            a norm of the residual stream.

    Example:
        >>> found = hs.relevance.weight_gradients(model, probe)
        >>> found[0]["V"].shape == model.weights(0).W_V.shape
        True
    """
    count = int((probe.host.targets >= 0).sum())
    if not count:
        raise InputError(
            "the probe has no targets, so there is no loss to differentiate: add targets."
        )
    found: dict[int, dict[str, Tensor]] = {}
    for _, part in capture.passes(
        model, probe, lambda batch, _: _of_batch(model, batch, count), batch_size=batch_size
    ):
        for layer, values in part.items():
            before = found.setdefault(layer, {})
            for letter, one in values.items():
                before[letter] = before[letter] + one if letter in before else one
    return found


def _of_batch(
    model: HeadModel, probe: Probe, count: int
) -> dict[int, dict[str, Float[Tensor, "head first second"]]]:
    """Contribution of some examples to the gradients of a mean over ``count`` targets."""
    shape, held = model.shape, dict[Tap, Tensor]()
    sites = ("resid_pre", "query", "key", "value", "z", "head_sum")
    taps = [Tap(site, layer) for layer in shape.attention_layers for site in sites]

    def keep(view: TapView) -> None:
        held[view.tap] = view.value

    if not bool((probe.host.targets >= 0).any()):
        return {}
    wanted = [tap for tap in taps if tap.site in ("query", "key", "value", "head_sum")]
    with torch.enable_grad():
        reads = dict.fromkeys(taps, keep)
        total = capture.loss_sum(model, probe, probe.host.targets, reads=reads)
        slopes = torch.autograd.grad(total / count, [held[tap] for tap in wanted])
    by_tap = dict(zip(wanted, slopes, strict=True))
    return {
        layer: _of_layer(
            model,
            layer,
            {site: held[Tap(site, layer)].detach() for site in ("resid_pre", "z")},
            {site: by_tap[Tap(site, layer)] for site in ("query", "key", "value", "head_sum")},
        )
        for layer in shape.attention_layers
    }


def _of_layer(
    model: HeadModel, layer: int, seen: Mapping[str, Tensor], slope: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    parts = model.parts
    _need_plain(model, layer)
    shaped = parts.query_key(layer)
    x = parts.input_norm(layer)(seen["resid_pre"])
    found: dict[str, Any] = {}
    scales = {"query": shaped.query_scale, "key": shaped.key_scale, "value": 1.0}
    for letter, site in zip("QKV", scales, strict=True):
        back = slope[site].float() * scales[site]
        if site != "value":
            gain = shaped.rotation.gain**2
            turned = [
                shaped.rotation.turned(back[:, :, at], -at) / gain for at in range(back.shape[2])
            ]
            back = torch.stack(turned, 2) * shaped.rotation.gain
        found[letter] = torch.einsum("bpm,bhpd->hmd", x, back)
    found["O"] = torch.einsum("bphd,bpm->hdm", seen["z"].float(), slope["head_sum"].float())
    return found


def _broken(
    model: HeadModel,
    probe: Probe,
    known: Int[np.ndarray, " known"],
    start: int,
    prefix: int,
    seed: int,
    batch_size: int | None,
) -> Float[np.ndarray, "known prefix"]:
    """Number of tokens still correct when one prefix token is replaced, for each position."""
    if not len(known):
        return np.full((0, prefix), np.nan)
    generator = torch.Generator().manual_seed(seed)
    used = torch.unique(probe.tokens)
    rows = []
    for number in known.tolist():
        row = probe.tokens[number].repeat(prefix, 1)
        places = torch.arange(prefix)
        old = row[places, start + places]
        drawn = used[torch.randint(len(used), (prefix,), generator=generator)]
        following = used[(torch.searchsorted(used, old) + 1) % len(used)]
        row[places, start + places] = drawn.where(drawn != old, following)
        rows.append(row)
    changed = _spans_probe(torch.cat(rows), start + prefix)
    right, _ = _tried(model, changed, batch_size, None)
    return right.reshape(len(known), prefix).astype(float)
