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
# Your own scorer, and a circuit from start to finish
#
# "When Mary and John went to the store, John gave a drink to": the model should say *Mary*. How does the
# bundled model do it? In GPT-2 small, Wang et al. (2022) found heads that attend to the right name and
# move it to the end. This model may do it differently. We patch to find the head, write a scorer for what
# it might be doing, follow its paths, and check the hypothesis by ablation.

# %%
import numpy as np

import headscope as hs

model = hs.load()
probe = hs.probes.pairs(model, "ioi", batch=32)
difference = hs.metrics.logit_difference  # right name less wrong name
clean = float(difference(model.forward(probe.tokens), probe).mean().detach())
right = float(hs.metrics.accuracy(model.forward(probe.tokens), probe).mean().detach())
print(f"logit difference {clean:.1f}, right in {right:.0%}")

assert right > 0.9

# %% [markdown]
# ## 1. Which head? Patching
#
# The corrupt prompts repeat the *other* name. `noise` gives one head its output from the corrupt run: 1
# means no harm, 0 means as wrong as the corrupt run. `denoise` asks the reverse: is one head's clean
# output enough to fix a corrupt run?

# %%
needed = hs.patch_activations(model, probe, difference)
enough = hs.patch_activations(model, probe, difference, direction="denoise")
broken, restored = needed.normalised(), enough.normalised()
central = hs.HeadIndex(*map(int, np.unravel_index(np.argmin(broken), broken.shape)))
print(
    f"{central}: {broken[central]:.2f} left without it; alone it restores {restored[central]:.2f}"
)

assert broken[central] < 0.5 < restored[central]

# %% [markdown]
# One head decides between the two names. Which of its inputs carries the decision?

# %%
by_input = {}
for site in ("query", "key", "value"):
    patched = hs.patch_activations(model, probe, difference, site=site).normalised()
    by_input[site] = float(patched[central.layer, model.shape.kv_head(central.head)]
                           if site != "query" else patched[central])  # fmt: skip
    print(f"{central} with its {site} from the corrupt run: {by_input[site]:.2f}")
carrier = min(by_input, key=by_input.get)
print(f"its {carrier} carries it")

# %% [markdown]
# If it were the query, the head would choose *where to attend*. If it is the value, the head attends to
# the same position in both runs, and the content of that position differs.
#
# ## 2. Where does it look? A scorer in three lines
#
# No built-in scorer fits these sentences. A scorer is a function of attention rows and of the probe's
# marks; `queries` selects the query positions, so only those rows are computed.


# %%
def looks_at(mark):
    """Attention from the last token to the tokens under a mark."""

    @hs.row_scorer(unit="attention", bounds=(0.0, 1.0), queries=lambda probe: probe.mark("end"))
    def score(rows, probe):
        return rows.column_mass(probe.mark(mark))

    return hs.score(model, probe, [score])["score"]


marks = {"io": "the right name", "s1": "the wrong name, first", "s2": "the wrong name, second"}
seen = {mark: looks_at(mark) for mark in marks}
for mark, scores in seen.items():
    heads = ", ".join(f"{head} {value:.2f}" for head, value in scores.top(3))
    print(f"{marks[mark]:>23}: {heads}")
place = max(seen, key=lambda mark: seen[mark][central])
print(f"\n{central} looks at {marks[place]} ({seen[place][central]:.2f})")

assert seen[place][central] > 0.5

# %% [markdown]
# ## 3. What does it write? Its direct path to the logits
#
# A custom metric is a function, too. Path patching without receivers measures each head's direct effect:
# how much the logits of the two names drop when only the head's direct path to them is corrupted.


# %%
def logit_of(which):
    """Logit of one name at the end, less the mean logit."""

    def metric(logits, probe):
        at = probe.mark("end")
        ids = (probe.targets if which == "right" else probe.foils)[at]
        rows = logits[at]
        return rows.gather(-1, ids[:, None])[:, 0] - rows.mean(-1)

    return metric


direct = {which: hs.path_patch(model, probe, logit_of(which)) for which in ("right", "wrong")}
for which, scores in direct.items():
    print(f"{which} name, {central} corrupted: {scores[central]:+.1f} logits")

# %% [markdown]
# In the corrupt run, the names swap roles. So a head that *raises* what it attends to looks different here
# from one that *lowers* it. Which of the two is the central head?

# %%
copying = hs.circuits.eigenvalues(model, "OV", "mlp")
ratio = float(copying.ratio[central])
lowers = ratio < 0
print(f"copying of {central} by its weights: {ratio:+.2f} (1 raises, -1 lowers what it looks at)")
print(f"it {'lowers' if lowers else 'raises'} {marks[place]}")

# %%
hs.plots.eigenvalues(copying, [central])

# %% [markdown]
# ## 4. Which heads raise the names?
#
# Lowering the wrong name is only half of the answer: the right one must come from somewhere. Heads that
# attend to both names and raise them would do it.

# %%
both = seen["io"].mean + seen["s1"].mean
movers = [
    head
    for head in model.shape.heads
    if head != central and both[head] > 0.5 and copying.ratio[head] > 0.5
]
for head in movers:
    print(f"{head}: right name {seen['io'][head]:.2f}, wrong name {seen['s1'][head]:.2f}, "
          f"copying {copying.ratio[head]:+.2f}")  # fmt: skip

# %% [markdown]
# ## 5. Does the story hold? Ablation
#
# Without the central head, the model should no longer know *which* name to say; without the movers, it
# should no longer say a name from the sentence. Each set is replaced by its mean over the probe.


# %%
def says(logits, probe):
    """Share of prompts that are answered with one of the two names."""
    at = probe.mark("end")
    best = logits[at].argmax(-1)
    return ((best == probe.targets[at]) | (best == probe.foils[at])).float()


others = [head for head in model.shape.heads if head.layer == central.layer]
others = [head for head in others if head != central and head not in movers]
sets = {f"without {central}": [central]}
sets |= {f"without {', '.join(map(str, movers))}": movers} if movers else {}
sets |= {"without their neighbours": others} if others else {}
chosen = hs.ablate_groups(model, probe, difference, sets)
named = hs.ablate_groups(model, probe, says, sets)
for i, name in enumerate(sets):
    left = clean + float(chosen.mean.ravel()[i])
    share = float(named.unedited.mean() + named.mean.ravel()[i])
    print(f"{name:>28}: logit difference {left:+.1f}, answers with a name in {share:.0%}")

assert clean + float(chosen.mean.ravel()[0]) < 0.5 * clean

# %% [markdown]
# ## 6. Is it enough?
#
# Keep the heads in our hypothesis and the lower layers that feed them, and mean-ablate every other head of
# the central layer. If the difference remains, nothing important in that layer was left out.

# %%
left = clean + float(chosen.mean.ravel()[-1]) if others else clean
print(f"whole model {clean:.1f}; without the rest of the layer {left:.1f} ({left / clean:.0%})")

assert left > 0.7 * clean

# %% [markdown]
# ## The finding
#
# Assembled from the numbers above, so that it is true for any model this notebook runs on:

# %%
verb = "lowers" if lowers else "raises"
print(f"At the end, {central} looks at {marks[place]} and {verb} it.")
if movers:
    print(f"{', '.join(map(str, movers))} look at both names and raise them.")
if lowers and movers:
    print("The answer is what is left: two names up, the one that was said twice down.")

# %% [markdown]
# In GPT-2 small, the decision is made by *where* the name movers attend, with S-inhibition heads steering
# their queries. A small model trained on a few sentences may solve the same task differently: a circuit
# found in one model is only a hypothesis about the next.
