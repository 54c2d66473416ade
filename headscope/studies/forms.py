"""Studies that need a certain kind of model: checkpoints, groups, images, seq2seq, mixers."""

from itertools import combinations
from typing import Any

import numpy as np
import torch

from headscope.ablation import restore
from headscope.alignment import find
from headscope.base.statistics import mean_interval
from headscope.capture import collect
from headscope.comparing import emergence
from headscope.errors import UnsupportedModelError
from headscope.flow import source_contribution
from headscope.metrics import answer_probability, loss
from headscope.models import bundled
from headscope.models.bundled.tasks import on_patches, orders, shapes
from headscope.models.hf.sublayers import need_encoder_decoder
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, copied_tokens, images, random_images, recall, translation
from headscope.probes.encoding import ordinary_tokens, uses_bos
from headscope.scoring.score import score
from headscope.studies.study import (
    LEVEL,
    MATTERS,
    Claim,
    Evidence,
    Study,
    StudySetting,
    best_head,
    control_mean,
    control_of,
    metric_of,
    paired,
    skilled,
)
from headscope.table import HeadScores
from headscope.vision import class_space, importance


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
    values = scores.per_example.reshape(
        scores.per_example.shape[0], -1, scores.per_example.shape[-1]
    )
    if not half:
        raise UnsupportedModelError("it has a single layer.")
    return paired(
        np.nanmean(values[-half:], (0, 1)),
        np.nanmean(values[:half], (0, 1)),
        note="upper half against lower half",
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
ALL = (EMERGENCE, GROUPS, RECALL, ALIGNMENT, IMAGES, DETACHED, VIT, CLASS_SPACE)
