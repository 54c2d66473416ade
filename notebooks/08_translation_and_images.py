# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Heads that align, heads that see shapes, heads that find a partner
#
# Three small models come with headscope besides its decoders: an encoder-decoder that copies or reverses
# words, an image model that names shapes, and an encoder of nested brackets. Each was trained on a task
# that can only be solved by looking at the right positions, so we know what their heads should do.

# %%
import numpy as np

import headscope as hs
from headscope.models.bundled import tasks

translator = hs.load("tiny-marian")
drawn = tasks.orders(40, seed=1, order="reverse")
print(drawn.sources[0], "->", drawn.targets[0])

# %% [markdown]
# ## 1. Which heads align source and target?
#
# `hs.alignment.find` compares where each cross-attention head looks with given links between target and
# source tokens. The same rows in random order are the null.

# %%
probe = hs.probes.translation(translator, drawn.sources, drawn.targets)
aligned = hs.alignment.find(translator, probe, drawn.links)
for name in ("alignment_accuracy", "monotonicity", "source_end"):
    print(f"{name:>18}", aligned[name].mean.round(2).tolist())

heads = hs.alignment.heads(aligned)
print("alignment heads:", heads)
assert sorted(heads) == [[1, 0], [1, 1], [1, 2], [1, 3]]

# %%
hs.plots.heatmap(aligned["alignment_accuracy"])

# %% [markdown]
# All four heads of the last layer align, and no head of the first does. Their monotonicity is near -1
# because the order is reversed. A speech model would take the list as
# `generation_config.alignment_heads`; here it gives word alignments:

# %%
rows = hs.alignment.matrix(translator, probe, heads)[0]
source, target = drawn.sources[0].split(), drawn.targets[0].split()
for at, word in enumerate(target):
    print(f"{word:>8} <- {source[int(rows[at].argmax())]}")

# %% [markdown]
# The decoder reads the encoder's last layer. What would it say if it read an earlier one?

# %%
lens = hs.lens.decoder_lens(translator, probe, length=10)
for layer, texts in zip(lens.layers, lens.texts, strict=True):
    print(f"layer {layer}: {lens.right[layer].mean():.0%} right, {texts[0]}")

# %% [markdown]
# ## 2. What do the heads of an image model look at?
#
# The class token reads the image. We measure how much of its attention lies on the patches of the shape,
# and how far each head looks from patch to patch.

# %%
vit = hs.load("tiny-vit")
pictures = tasks.shapes(64, seed=1)
images = hs.probes.images(vit, list(pictures.pictures), pictures.labels)
covered = tasks.on_patches(pictures.covered).reshape(len(pictures.labels), -1)

acts = hs.capture.collect(vit, images)
on_shape = np.stack(
    [(acts[n].pattern[:, :, 0, 1:].numpy() * covered[:, None]).sum(-1).mean(0) for n in (0, 1)]
)
print("on the shape, which covers", f"{covered.mean():.0%}", "of the patches:")
print(on_shape.round(2))

near = hs.score(vit, images, ["patch_neighbours", "attention_distance"], progress=False)
hs.plots.heatmap(near["patch_neighbours"])

# %% [markdown]
# Three heads of the first layer look at the shape. The fourth is local: it looks around each patch. Now
# remove heads and see which ones the answer depends on.

# %%
shape_heads = [f"L{layer}H{head}" for layer, head in np.argwhere(on_shape > 0.85)]
sets = {"shape heads": shape_heads} | {f"L1H{head}": [f"L1H{head}"] for head in range(4)}
loss = hs.ablate_groups(vit, images, hs.metrics.accuracy, sets, "mean", progress=False)
for name, effect in zip(sets, loss.mean, strict=True):
    print(f"without {name}: accuracy {effect:+.2f}")

assert loss.mean[0] < -0.4
assert (loss.mean[1:] > -0.15).all()

# %% [markdown]
# ## 3. Which heads find a word's partner?
#
# Treebanks give every word a head and a relation. `hs.syntax.heads` finds the attention heads that follow
# a relation; it chooses on one half of the sentences and reports on the other, beside the best fixed
# offset. Our treebank is made of brackets, and each bracket's head is its partner. For real text, give a
# CoNLL-U file.

# %%
bert = hs.load("tiny-bert")
brackets = tasks.brackets(120, seed=1)
print(brackets.texts[0])

sentences = []
for text, partners in zip(brackets.texts, brackets.partners, strict=True):
    names = ["word" if p < 0 else "close" if p < at else "open" for at, p in enumerate(partners)]
    sentences.append(hs.syntax.Sentence.of_words(text.split(), partners, names))
bank = hs.syntax.treebank(bert, sentences)
found = hs.syntax.heads(bert, bank)
print(found)
assert found["open"].accuracy > 0.9 > found["open"].baseline

# %% [markdown]
# Heads of the last layer find the partner at any distance, while a fixed offset finds fewer than half.
# Which heads behave alike?

# %%
likeness = hs.similarity.heads(bert, bank.probe, "pattern", draws=19)
print(likeness)
hs.plots.head_similarity(likeness)
