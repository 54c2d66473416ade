"""Studies that need a certain kind of model: checkpoints, groups, images, seq2seq, mixers."""

import inspect
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headscope.ablation import restore
from headscope.alignment import find
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import mean_interval
from headscope.capture import collect
from headscope.comparing import emergence
from headscope.diffusion import Diffusion, token_attention
from headscope.errors import UnsupportedModelError
from headscope.flow import source_contribution
from headscope.heads import HeadIndex
from headscope.metrics import answer_probability, loss
from headscope.models import bundled
from headscope.models.bundled.tasks import on_patches, orders, shapes
from headscope.models.hf.sublayers import need_encoder_decoder
from headscope.models.protocol import HeadModel
from headscope.probes import (
    Probe,
    copied_tokens,
    from_batch,
    images,
    random_images,
    recall,
    translation,
)
from headscope.probes.encoding import ordinary_tokens, uses_bos
from headscope.scoring.score import score
from headscope.studies.study import (
    LEVEL,
    MATTERS,
    Claim,
    Evidence,
    Study,
    StudySetting,
    above_draws,
    best_head,
    control_mean,
    control_of,
    metric_of,
    nanmean,
    paired,
    skilled,
    unpaired,
)
from headscope.table import HeadScores
from headscope.vision import (
    Clip,
    OcrHeads,
    class_space,
    contributions,
    image_keys,
    importance,
    ocr_heads,
    text_span,
)


def _together(model: HeadModel, setting: StudySetting) -> Evidence:
    steps = bundled.checkpoints(model.name) if model.name in bundled.READERS else ()
    if len(steps) < 4:
        raise UnsupportedModelError("it comes without training checkpoints.")
    few = setting.size(len(steps), 4)
    chosen = [
        steps[at] for at in np.unique(np.linspace(0, len(steps) - 1, few).round().astype(int))
    ]
    found = emergence(model.name, chosen, ["induction"], seed=setting.seed, progress=False)
    best = found.best("induction")
    rise = np.diff([table["induction"].mean[best.layer, best.head] for table in found.tables])
    step = int(np.nanargmax(rise))
    fall = {
        name: -np.diff(np.asarray(found.losses[name]), axis=0)[step]
        for name in ("second copy", "first copy")
    }
    return paired(
        fall["second copy"],
        fall["first copy"],
        note=f"{best}, from {chosen[step]} to {chosen[step + 1]}",
        results={"emergence": found},
    )


EMERGENCE = Study(
    "emergence",
    "Induction heads and in-context learning emerge together",
    "Olsson et al. 2022, In-context Learning and Induction Heads, arXiv 2209.11895",
    (
        Claim(
            "together",
            "While the induction head forms, the loss falls on repeated tokens and not on new "
            "ones.",
            "drop in the loss on the second copy of random tokens, between the two checkpoints "
            "with the largest rise in induction score",
            "drop in the loss on the first copy between the same checkpoints",
            _together,
            0.5,
            "nats",
        ),
    ),
    "Needs training checkpoints; the bundled models have them.",
)


def _alike(model: HeadModel, setting: StudySetting) -> Evidence:
    shape = model.shape
    size = shape.n_heads // shape.n_kv_heads
    if size == 1 or shape.n_kv_heads == 1:
        raise UnsupportedModelError(
            "each of its query heads has its own keys."
            if size == 1
            else "all its query heads share one key head."
        )
    probe, _ = skilled(model, setting)
    few = probe.examples(slice(0, setting.size(6, 3)))
    same, other = [], []
    for layer in shape.attention_layers:
        pattern = collect(model, few, [layer])[layer].pattern
        flat = torch.nn.functional.normalize(pattern.transpose(0, 1).flatten(1).double(), dim=1)
        near = (flat @ flat.T).numpy()
        pairs = list(combinations(range(shape.n_heads), 2))
        within = [near[a, b] for a, b in pairs if a // size == b // size]
        across = [near[a, b] for a, b in pairs if a // size != b // size]
        same.append(np.mean(within))
        other.append(np.mean(across))
    return paired(np.array(same), np.array(other), note="n is the number of layers")


GROUPS = Study(
    "grouped-queries",
    "Query heads that share keys",
    "Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models from "
    "Multi-Head Checkpoints, arXiv 2305.13245",
    (
        Claim(
            "alike",
            "Query heads that share a key head attend more alike than heads that do not.",
            "cosine between patterns of two heads in the same group, mean per layer",
            "the same for two heads in different groups of the same layer",
            _alike,
            0.05,
            "cosine",
        ),
    ),
    "The paper shows that sharing keys costs little; whether heads that share keys also behave "
    "alike matters for pruning and masking whole groups.",
)


def _pairs(model: HeadModel, setting: StudySetting, seed: int) -> Probe:
    words = ordinary_tokens(model)
    rng = np.random.default_rng(0)
    drawn = rng.permutation(len(words))[: min(60, len(words) // 2 * 2)]
    ids = [int(words[int(at)]) for at in drawn]
    half = len(ids) // 2
    tokenizer = model.tokenizer
    start = [tokenizer.bos_token_id] if tokenizer is not None and uses_bos(model) else []
    return recall(ids[:half], ids[half:], pairs=4, batch=16, start=start, seed=seed)


def _in_place(model: HeadModel, setting: StudySetting) -> Evidence:
    first, second = (_pairs(model, setting, setting.seed + k) for k in range(2))
    right = float(np.nanmean(metric_of(model, second, answer_probability)))
    if not right > 2 * MATTERS:
        raise UnsupportedModelError(
            f"it gives the value of a key a probability of only {right:.2f}."
        )
    names = ("value", "others")
    chosen, tried = (
        restore(model, one, answer_probability, positions=names, progress=False)
        for one in (first, second)
    )
    mixer = chosen.labels[0].index("mixer_out")
    layer = int(np.nanargmax(chosen.mean[mixer, :, 0]))
    found = tried.per_example[mixer, layer]
    return paired(
        found[0],
        found[1],
        note=f"attention of {chosen.labels[1][layer]}",
        results={"restored": tried},
    )


RECALL = Study(
    "recall-in-place",
    "Where key-value pairs are stored for later recall",
    "Arora et al. 2023, Zoology: Measuring and Improving Recall in Efficient Language Models, "
    "arXiv 2312.04927; Meng et al. 2022, Locating and Editing Factual Associations in GPT, "
    "arXiv 2202.05262",
    (
        Claim(
            "in-place",
            "Attention writes the key to the position of its value: restoring its output there "
            "restores the answer.",
            "answer probability recovered by restoring the attention output at the value, in the "
            "layer chosen on other texts",
            "the same at all other pairs",
            _in_place,
            MATTERS,
            "probability",
        ),
    ),
    "Four pairs of random tokens followed by one of the keys; the corrupt text has that key "
    "replaced in its pair. State-space models look the pair up only when queried; "
    "headscope.ablation.restore supports them too.",
)


def _aligned(model: HeadModel, setting: StudySetting) -> Evidence:
    if "cross" not in model.stacks:
        raise UnsupportedModelError("it has no cross-attention.")
    probes = [
        copied_tokens(model, 12, setting.size(24, 12), seed=setting.seed + k) for k in range(2)
    ]
    first, scores = (find(model, one, seed=setting.seed)["path_mass"] for one in probes)
    head = first.top(1)[0][0]
    return paired(
        scores.per_example[head.layer, head.head],
        control_of(scores, head),
        note=str(head),
        results={"path_mass": scores},
    )


ALIGNMENT = Study(
    "alignment-heads",
    "Cross-attention heads that align target and source",
    "Li et al. 2019, On the Word Alignment from Neural Machine Translation, arXiv 1906.10282; "
    "Radford et al. 2022, Robust Speech Recognition via Large-Scale Weak Supervision, "
    "arXiv 2212.04356",
    (
        Claim(
            "aligned",
            "A cross-attention head follows the source in order.",
            "attention on the best monotone path, for the head chosen on other texts",
            "the same rows in a random order",
            _aligned,
            MATTERS,
            "attention",
        ),
    ),
    "Random tokens to copy, since no text can be translated by every model.",
)


def _of_images(scorer: str, model: HeadModel, setting: StudySetting) -> HeadScores:
    if "vision" not in model.stacks:
        raise UnsupportedModelError("it reads no images.")
    batch = setting.size(16, 8)
    probes = [random_images(model, batch, seed=setting.seed + k) for k in range(2)]
    return setting.share(
        ("images", scorer), lambda: score(model, probes[1], [scorer], progress=False)[scorer]
    )


def _neighbours(model: HeadModel, setting: StudySetting) -> Evidence:
    _of_images("patch_neighbours", model, setting)
    batch = setting.size(16, 8)
    probes = [random_images(model, batch, seed=setting.seed + k) for k in range(2)]
    return best_head(model, "patch_neighbours", *probes)[1]


def _widening(model: HeadModel, setting: StudySetting) -> Evidence:
    scores = _of_images("patch_neighbours", model, setting)
    half = scores.per_example.shape[0] // 2
    if not half:
        raise UnsupportedModelError("it has a single layer.")
    mean = nanmean(scores.per_example, -1)
    return unpaired(
        mean[-half:].ravel(),
        mean[:half].ravel(),
        note="deeper half against lower half; n counts heads",
        results={"patch_neighbours": scores},
        less=True,
    )


IMAGES = Study(
    "vision-locality",
    "Vision heads that attend to neighbouring patches",
    "Dosovitskiy et al. 2020, An Image is Worth 16x16 Words, arXiv 2010.11929; Raghu et al. 2021, "
    "Do Vision Transformers See Like Convolutional Neural Networks?, arXiv 2108.08810",
    (
        Claim(
            "neighbours",
            "A head attends to the patches around the query.",
            "attention to neighbouring patches of the best head, chosen on other images",
            "uniform attention over all patches",
            _neighbours,
            MATTERS,
            "attention",
        ),
        Claim(
            "widening",
            "Deeper heads attend less to neighbouring patches than shallow ones.",
            "attention to neighbouring patches, mean over heads in the deeper half of the layers",
            "mean over heads in the shallower half",
            _widening,
            0.02,
            "attention",
        ),
    ),
    "Images of random blobs at all scales, since no picture is familiar to every model.",
)


def _with_source(model: HeadModel, setting: StudySetting) -> tuple[Probe, Probe]:
    """Translations with their own sources, and with the sources of other examples."""
    if "cross" not in model.stacks:
        raise UnsupportedModelError("it has no cross-attention.")
    batch = setting.size(48, 16)
    if model.name == "tiny-marian":
        drawn = orders(batch, setting.seed, words=(6, 6))
        sources: Any = drawn.sources
        targets: Any = drawn.targets
        turned: Any = [*sources[1:], sources[0]]
    else:
        made = copied_tokens(model, 12, batch, seed=setting.seed)
        sources, targets = made.of_source.tokens, made.targets
        turned = sources.roll(-1, 0)
    own, other = (translation(model, some, targets) for some in (sources, turned))
    cross = need_encoder_decoder(model).stack("cross")
    gain = metric_of(cross, other, loss) - metric_of(cross, own, loss)
    if not float(mean_interval(gain[None], LEVEL)[0][0]) > 0:
        raise UnsupportedModelError(
            "the right source makes a translation no more likely than a wrong one: the gain is "
            f"{float(np.nanmean(gain)):.2f} nats."
        )
    return own, other


def _detached(model: HeadModel, setting: StudySetting) -> Evidence:
    own, other = (source_contribution(model, one) for one in _with_source(model, setting))
    return paired(own.sentence, other.sentence, results={"source contribution": own})


DETACHED = Study(
    "translation-sources",
    "Translations detached from their source",
    "Dale et al. 2023, Detecting and Mitigating Hallucinations in Machine Translation, "
    "arXiv 2212.08597; Ferrando et al. 2022, Towards Opening the Black Box of Neural Machine "
    "Translation, arXiv 2205.11631",
    (
        Claim(
            "detached",
            "A translation draws more on its own source than on an unrelated source.",
            "share of the source in the tokens of a translation (ALTI+), mean by text",
            "the same words after the source of another text",
            _detached,
            0.02,
            "share",
        ),
    ),
    "The paper detects hallucinated translations; here a translation is forced after another "
    "source, so it is detached by construction. Copied or reversed words for tiny-marian, random "
    "tokens to "
    "copy for other models; for models whose loss distinguishes the sources.",
)


def _drawings(model: HeadModel, setting: StudySetting, number: int) -> tuple[Probe, torch.Tensor]:
    """Pictures whose classes the model knows, and which patches each object covers."""
    if "vision" not in model.stacks:
        raise UnsupportedModelError("it reads no images.")
    if model.name != "tiny-vit":
        raise UnsupportedModelError(
            "headscope ships no pictures of classes that it knows: pass your own to "
            "hs.vision.importance."
        )
    drawn = shapes(setting.size(96, 48), setting.seed + number)
    probe = images(model, list(drawn.pictures), drawn.labels)
    return probe, torch.from_numpy(on_patches(drawn.covered)).flatten(1)


def _masked(model: HeadModel, setting: StudySetting, number: int) -> HeadScores:
    """Drop in the probability of the true class when each head is masked."""
    probe, _ = _drawings(model, setting, number)
    table = setting.share(("masked images", number), lambda: importance(model, probe))
    return table["probability_drop"]


def _few_matter(model: HeadModel, setting: StudySetting) -> Evidence:
    head = _masked(model, setting, 0).top(1)[0][0]
    scores = _masked(model, setting, 1)
    return paired(
        scores.per_example[head.layer, head.head],
        control_mean(scores, head),
        note=str(head),
        results={"probability_drop": scores},
    )


def _on_object(model: HeadModel, setting: StudySetting) -> Evidence:
    head = _masked(model, setting, 0).top(1)[0][0]
    probe, covered = _drawings(model, setting, 1)
    size = covered.shape[1]
    seen = collect(model, probe, [head.layer])[head.layer].pattern[:, head.head, 0]
    mass = (seen[:, -size:] * covered).sum(1) / seen[:, -size:].sum(1)
    return paired(mass.numpy(), covered.float().mean(1).numpy(), note=str(head))


VIT = Study(
    "vit-importance",
    "Vision heads that carry the class",
    "Li et al. 2023, How Does Attention Work in Vision Transformers? A Visual Analytics Attempt, "
    "arXiv 2303.13731",
    (
        Claim(
            "few",
            "One head matters more to the class than the others.",
            "drop in the probability of the true class without the head, chosen on other images",
            "mean of all other heads",
            _few_matter,
            MATTERS,
            "probability",
        ),
        Claim(
            "object",
            "The head that carries the class attends to the object.",
            "share of the class token's attention to patches that falls on the object",
            "share of the patches that the object covers",
            _on_object,
            MATTERS,
            "share",
        ),
    ),
    "Heads are zero-ablated one at a time. Drawn shapes, for the bundled tiny-vit.",
)


def _class_heads(model: HeadModel, setting: StudySetting) -> Evidence:
    first, second = (
        class_space(model, _drawings(model, setting, number)[0]).heads for number in range(2)
    )
    head = first.top(1)[0][0]
    values = second.per_example[head.layer, head.head]
    chance = float(second.null[head.layer, head.head])
    return paired(
        values,
        np.full(values.shape, chance),
        note=str(head),
        results={"identifiability": second},
    )


CLASS_SPACE = Study(
    "class-space",
    "Reading vision heads in class space",
    "Vilas et al. 2023, Analyzing Vision Transformers for Image Classification in Class Embedding "
    "Space, arXiv 2310.18969",
    (
        Claim(
            "identified",
            "A head's write at the class token identifies the true class better than chance.",
            "identifiability of the true class in the head's write, of the head chosen on other "
            "images",
            "chance",
            _class_heads,
            MATTERS,
            "identifiability",
        ),
    ),
    "Identifiability is 1 minus the normalised rank of the true class among all classes. Drawn "
    "shapes, for the bundled tiny-vit.",
)
_COLOURS = {
    "red": (225, 25, 25), "green": (25, 150, 45), "blue": (35, 60, 225), "yellow": (240, 225, 40),
    "orange": (245, 140, 20), "purple": (125, 35, 165), "pink": (250, 130, 190),
    "brown": (115, 70, 30), "white": (245, 245, 245), "turquoise": (45, 210, 200),
}  # fmt: skip
_PLACES = (
    "top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom",
    "bottom-right",
)  # fmt: skip
_TOLD = {"colour": "a picture of something {}", "place": "something at the {} of the picture"}
_SIDE, _DRAWS = 96, 199  # of a picture; shuffles of names


def _discs(
    setting: StudySetting, number: int
) -> tuple[list[np.ndarray], dict[str, Int[np.ndarray, " image"]]]:
    """Discs of ten colours at nine places of dark pictures, with the number of each name."""
    rng = np.random.default_rng([18, setting.seed + number])
    count = setting.size(270, 90)
    labels = {
        "colour": rng.permutation(np.arange(count) % len(_COLOURS)),
        "place": rng.permutation(np.arange(count) % len(_PLACES)),
    }
    pictures = []
    y, x = np.mgrid[:_SIDE, :_SIDE]
    for colour, place in zip(*labels.values(), strict=True):
        row, column = (int(at) * 32 + 16 + rng.integers(-4, 5) for at in divmod(place, 3))
        picture = np.full((_SIDE, _SIDE, 3), rng.integers(15, 45), np.uint8)
        picture[(y - row) ** 2 + (x - column) ** 2 < 11**2] = list(_COLOURS.values())[colour]
        pictures.append(picture)
    return pictures, labels


def _names(kind: str) -> tuple[str, ...]:
    return tuple(_COLOURS) if kind == "colour" else _PLACES


def _texts(both: Clip, kind: str) -> Float[np.ndarray, "name width"]:
    """Embeddings of a picture's colours or places in words."""
    found: Float[np.ndarray, "name width"] = (
        both.embed([_TOLD[kind].format(name) for name in _names(kind)]).double().cpu().numpy()
    )
    return found


def _disc_writes(
    both: Clip, setting: StudySetting, number: int
) -> tuple[Float[np.ndarray, "image layer head width"], dict[str, Int[np.ndarray, " image"]]]:
    """What each head writes into the embeddings of pictures, less its mean."""
    pictures, labels = _discs(setting, number)

    def make() -> Float[np.ndarray, "image layer head width"]:
        found = contributions(both.vision, images(both.vision, pictures))
        return np.asarray(np.nan_to_num(found.heads - found.heads.mean(0)))

    return setting.share(("disc writes", number), make), labels


def _right(both: Clip, setting: StudySetting, kind: str, number: int) -> HeadScores:
    """Whether the name that a head's write is most like is that of the colour, or the place."""
    writes, labels = _disc_writes(both, setting, number)
    texts = _texts(both, kind)
    said = (writes @ (texts - texts.mean(0)).T).argmax(-1)
    spec = ScoreSpec(
        f"{kind}_named",
        unit="share",
        bounds=(0.0, 1.0),
        source="Gandelsman et al. 2024 (arXiv 2310.05916)",
        description=f"Share of pictures whose {kind} a head's write is most like in words.",
    )
    right = np.moveaxis(said == labels[kind][:, None, None], 0, -1).astype(float)
    return HeadScores.from_examples(spec, right, kv_heads=right.shape[1])


def _naming(kind: str, both: Clip, setting: StudySetting) -> Evidence:
    """Share of pictures that the best head names right, against names shuffled among texts."""
    texts = _texts(both, kind)
    (first, chosen), (second, tried) = (_disc_writes(both, setting, k) for k in range(2))
    centred = texts - texts.mean(0)
    said = [(one @ centred.T).argmax(-1) for one in (first, second)]
    truth = [one[kind][:, None, None] for one in (chosen, tried)]
    rng = np.random.default_rng(setting.seed)
    orders = [np.arange(len(texts)), *(rng.permutation(len(texts)) for _ in range(_DRAWS))]
    found, head = [], HeadIndex(0, 0)
    for number, order in enumerate(orders):
        lead = (order[said[0]] == truth[0]).mean(0)
        layer, best = np.unravel_index(int(lead.argmax()), lead.shape)
        found.append(float((order[said[1][:, layer, best]] == tried[kind]).mean()))
        if not number:
            head = HeadIndex(int(layer), int(best))
    return above_draws(
        found[0],
        np.array(found[1:]),
        note=str(head),
        results={f"{kind} named": _right(both, setting, kind, 1)},
    )


def _namer(both: Clip, setting: StudySetting, kind: str) -> HeadIndex:
    """The head that names colours, or places.

    Raises:
        UnsupportedModelError: if no head does.
    """
    found = setting.share(("naming", kind), lambda: _naming(kind, both, setting))
    if not found.low > MATTERS:
        raise UnsupportedModelError(
            f"no head of it names the {kind} (best: {found.note}, {found.value:.2f} against "
            f"{found.control:.2f} with shuffled names)."
        )
    return HeadIndex.parse(found.note)


def _specialised(both: Clip, setting: StudySetting) -> Evidence:
    own, other = (_namer(both, setting, kind) for kind in _TOLD)
    right = _right(both, setting, "colour", 1).per_example
    return paired(
        right[own.layer, own.head],
        right[other.layer, other.head],
        note=f"{own} names colours, {other} places",
    )


def _described(both: Clip, setting: StudySetting) -> Evidence:
    head = _namer(both, setting, "colour")
    pool = np.concatenate([_texts(both, kind) for kind in _TOLD])
    writes, _ = _disc_writes(both, setting, 1)
    late = range(max(0, writes.shape[1] - 4), writes.shape[1])
    others = [
        writes[:, layer, other]
        for layer in late
        for other in range(writes.shape[2])
        if (layer, other) != (head.layer, head.head)
    ]
    values, control = [], []
    for part in np.array_split(np.arange(len(writes)), setting.size(12, 9)):
        values.append(_of_colours(writes[part, head.layer, head.head], pool))
        control.append(np.nanmean([_of_colours(one[part], pool) for one in others]))
    return paired(np.array(values), np.array(control), note=f"{head}; n counts draws of pictures")


def _of_colours(
    writes: Float[np.ndarray, "image width"], pool: Float[np.ndarray, "text width"]
) -> float:
    """Share of colours in what the first five texts that describe a head account for."""
    found = text_span(writes, pool, 5)
    gains = np.diff(found.explained, prepend=0.0)
    return (
        float(gains[np.array(found.texts) < len(_COLOURS)].sum() / gains.sum())
        if len(gains)
        else np.nan
    )


TEXT_SPAN = Study(
    "clip-text-span",
    "Heads of CLIP that each tell one property, in words",
    "Gandelsman et al. 2024, Interpreting CLIP's Image Representation via Text-Based "
    "Decomposition, arXiv 2310.05916",
    (
        *(
            Claim(
                kind,
                f"What a head writes into the embedding of a picture names the {kind} of what is "
                "shown.",
                f"share of pictures whose {kind} in words is closest to the write of the head that "
                "was chosen on other pictures",
                f"the same with the {kind}s in words shuffled before the head is chosen",
                partial(_naming, kind),
                MATTERS,
                "share of pictures",
            )
            for kind in _TOLD
        ),
        Claim(
            "specialised",
            "The head that names colours does so better than the head that names places.",
            "share of pictures whose colour the head for colours names",
            "share that the head for places names",
            _specialised,
            MATTERS,
            "share of pictures",
        ),
        Claim(
            "described",
            "The texts that TextSpan finds for the head that names colours are of colours.",
            "share of colours in the variance that the first five texts account for",
            "mean of all other heads of the last four layers",
            _described,
            MATTERS,
            "share of the variance",
        ),
    ),
    "Drawn discs of ten colours at nine places, and texts that name these. Writes are centred over "
    "pictures, texts over their kind. The paper has thousands of texts and the pictures of "
    "ImageNet, and reads the texts; here the properties are drawn, so that right names can be "
    "counted.",
    of="clip",
)

# Twelve words each; the first six choose heads, the others try them.
_CONCEPTS = {
    "colours": "red blue green yellow white purple orange pink brown grey golden black",
    "animals": "dog cat horse bird fish sheep cow lion bear rabbit duck mouse",
    "food": "bread cheese apple soup cake rice egg meat salad pizza honey butter",
    "vehicles": "car train bus ship truck bicycle plane boat tractor van taxi tram",
    "buildings": "house church castle tower barn school palace temple hut bridge mill factory",
    "clothes": "shirt hat coat shoe dress glove scarf sock skirt jacket belt boot",
    "weather": "rain snow fog storm sunshine wind cloud ice thunder frost mist hail",
    "materials": "wood stone glass metal paper plastic leather silk clay wool marble steel",
}


def _votes(
    model: Diffusion, setting: StudySetting, words: list[list[list[Tensor]]], turned: Tensor
) -> Float[np.ndarray, "half layer head concept"]:
    """Share of draws in which a concept's word gets most of a head's attention, by half."""
    rng = np.random.default_rng([19, setting.seed])
    config, weight = model.module.config, next(model.module.parameters())
    edge = config.sample_size
    size = (edge, edge) if isinstance(edge, int) else tuple(edge)
    latents, *_ = inspect.signature(model.module.forward).parameters
    votes = []
    for half in range(2):
        texts = [
            [of[half][int(rng.integers(len(of[half])))] @ turned for of in words]
            for _ in range(setting.size(48, 16))
        ]
        noise = torch.from_numpy(rng.standard_normal((len(texts), config.in_channels, *size)))
        whole = [torch.cat(one) for one in texts]
        shown = [torch.ones(len(one)) for one in whole]
        inputs = {
            latents: noise.to(weight),
            "timestep": torch.tensor([500], device=weight.device),
            "encoder_hidden_states": pad_sequence(whole, batch_first=True).to(weight),
            "encoder_attention_mask": pad_sequence(shown, batch_first=True).to(weight),
        }
        seen = token_attention(model, inputs).weights
        found = []
        for row, one in zip(seen, texts, strict=True):
            ends = np.cumsum([0, *map(len, one)])
            mean = np.stack([row[..., a:b].mean(-1) for a, b in pairwise(ends)], -1)
            found.append(mean.argmax(-1)[..., None] == np.arange(len(words)))
        votes.append(np.where(np.isnan(row[..., :1]), -1.0, np.mean(found, 0)))
    return np.stack(votes)


def _relevant(model: Diffusion, setting: StudySetting) -> Evidence:
    read = setting.need(
        "read", "a function that embeds a word, as [token width] without start and end"
    )
    words = [
        [
            [read(word).float().cpu() for word in listed.split()[half * 6 : half * 6 + 6]]
            for half in range(2)
        ]
        for listed in _CONCEPTS.values()
    ]
    width = words[0][0][0].shape[-1]
    draw = torch.Generator().manual_seed(setting.seed)
    plain = torch.eye(width)
    turns = [
        torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
        for _ in range(setting.size(199, 19))
    ]
    found, note = [], ""
    for number, turned in enumerate([plain, *turns]):
        first, second = _votes(model, setting, words, turned)
        layer, head, concept = np.unravel_index(int(first.argmax()), first.shape)
        found.append(float(second[layer, head, concept]))
        if not number:
            note = f"X{layer}H{head}, {list(_CONCEPTS)[concept]}"
    return above_draws(found[0], np.array(found[1:]), note=note)


RELEVANCE = Study(
    "cross-attention-relevance",
    "Heads of cross-attention that stand for a visual concept",
    "Park et al. 2024, Cross-Attention Head Position Patterns Can Align with Human Visual Concepts "
    "in Text-to-Image Generative Models, arXiv 2412.02237",
    (
        Claim(
            "votes",
            "A head of a denoiser gives the words of one concept most of the image's attention, "
            "whichever word it is.",
            "share of draws in which the concept's word gets most of the head's attention, head "
            "and concept chosen on other words",
            "the same with the embeddings of all words turned by a random rotation",
            _relevant,
            0.3,
            "share of draws",
        ),
    ),
    "One word of each of eight concepts at a time, as in the paper's head relevance vectors, but "
    "in one denoising step from noise and with these words as the text. A rotation of the "
    "embeddings leaves how alike words are and takes what the heads' keys know of them. Give "
    "given={'read': ...}, a function from a word to its embedding as the model's pipeline makes "
    "it.",
    of="diffusion",
)

_WRITTEN = (
    "HOUSE", "RIVER", "BREAD", "MUSIC", "TRAIN", "GREEN", "PAPER", "STONE", "WATER", "LIGHT",
    "HORSE", "NIGHT", "TABLE", "CLOUD", "HEART", "WORLD",
)  # fmt: skip
_INKS = {"red": (215, 15, 15), "blue": (15, 30, 215)}
_PAGE = 224  # pixels of a picture's side
Box = tuple[float, float, float, float]


def _page(rng: np.random.Generator) -> tuple[Any, list[str], list[Box]]:
    """A white picture with a word in red and one in blue, one above the other, and their boxes."""
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("RGB", (_PAGE, _PAGE), (255, 255, 255))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=34)
    words = [str(one) for one in rng.choice(_WRITTEN, 2, replace=False)]
    boxes: list[Box] = []
    for word, ink, half in zip(words, _INKS.values(), rng.permutation(2), strict=True):
        at = (int(rng.integers(8, 60)), int(rng.integers(12, 60)) + 104 * int(half))
        pen.text(at, word, fill=ink, font=font)
        left, top, right, bottom = pen.textbbox(at, word, font=font)
        boxes.append((float(left), float(top), float(right), float(bottom)))
    return page, words, boxes


def _read_words(model: HeadModel, setting: StudySetting, number: int) -> tuple[OcrHeads, OcrHeads]:
    """Heads that look at the word that is asked for while it is said, and at the other one."""
    if getattr(model, "image_token", None) is None:
        raise UnsupportedModelError("it reads no texts with images.")
    processor = setting.need("processor", "the processor that comes with the model")
    rng = np.random.default_rng([20, setting.seed + number])
    pages = [_page(rng) for _ in range(setting.size(32, 16))]
    asked = rng.integers(0, 2, len(pages)).tolist()
    texts = [
        f"{processor.image_token}\nTwo words are written here. The word in {list(_INKS)[which]}:"
        for which in asked
    ]
    read = processor(
        text=texts, images=[[page] for page, _, _ in pages], return_tensors="pt", padding=True
    )
    probe = from_batch(dict(read))
    keys = image_keys(model, probe, (_PAGE, _PAGE), processor=processor.image_processor)
    said = [words[which] for (_, words, _), which in zip(pages, asked, strict=True)]
    answers = [processor.tokenizer(one, add_special_tokens=False)["input_ids"] for one in said]
    boxes = [
        [one[which] for (_, _, one), which in zip(pages, turn, strict=True)]
        for turn in (asked, [1 - one for one in asked])
    ]
    own, other = (ocr_heads(model, probe, keys.evidence(one), answers, keys) for one in boxes)
    return own, other


def _reads(model: HeadModel, setting: StudySetting) -> Evidence:
    (first, beside), (own, other) = (_read_words(model, setting, k) for k in range(2))
    lead = np.nanmean(first.score.per_example - beside.score.per_example, -1)
    layer, head = np.unravel_index(int(np.nanargmax(lead)), lead.shape)
    return paired(
        own.score.per_example[layer, head],
        other.score.per_example[layer, head],
        note=str(HeadIndex(int(layer), int(head))),
        results={"ocr": own.score},
    )


OCR = Study(
    "ocr-heads",
    "Heads that look at a written word while it is said",
    "Baek et al. 2025, How Do Large Vision-Language Models See Text in Image? Unveiling the "
    "Distinctive Role of OCR Heads, arXiv 2505.15865",
    (
        Claim(
            "reads",
            "A head attends most to where the word is written that is asked for, while the word is "
            "said.",
            "OCR score of the head that was chosen on other pictures",
            "the same head on the place of the other word in the picture",
            _reads,
            MATTERS,
            "share of answer tokens",
        ),
    ),
    "Pictures with two words, in red and in blue, one of which is asked for; the other one is the "
    "control, so that a head that looks at whatever is written scores nothing. Teacher-forced; the "
    "paper decodes. Give given={'processor': ...}, the model's own processor.",
)
ALL = (
    EMERGENCE, GROUPS, RECALL, ALIGNMENT, IMAGES, DETACHED, VIT, CLASS_SPACE, TEXT_SPAN, RELEVANCE,
    OCR,
)  # fmt: skip
