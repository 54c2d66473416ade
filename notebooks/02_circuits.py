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
# # Circuits: the induction circuit, from weights alone
#
# A model that continues repeated text needs two kinds of heads. A *previous-token head* writes, at
# every position, what stood one before. An *induction head* above it reads that with its **keys**:
# it looks for the position whose previous token is the current one. So the later head's keys must
# read what the earlier head writes, and that is a property of their weights.
#
# Here the model is not run until the circuit has been named. Then we run it, and take heads out.

# %%
import headscope as hs

model = hs.load()
model.shape

# %% [markdown]
# ## What was learned at all?
#
# Singular values of every head's OV circuit (what it writes, given what it reads), each head in units
# of what random factors of its own shape and variance would give. The grey band is chance.

# %%
hs.plots.spectra(hs.circuits.spectra(model, "OV"))

# %% [markdown]
# Large directions stand far above the band and small ones below it: heads use part of their room.

# %%
table = hs.circuits.score(model)
for name in ("ov_outliers", "ov_effective_rank", "copying_eigenvalues_mlp"):
    print(name, table.top(name, 3))

# %% [markdown]
# ## Whose keys read what?
#
# K-composition of every pair: how much of what the earlier head writes the later head's keys read.
# Heads that know nothing of each other get `chance`.

# %%
keys = hs.circuits.composition(model, "K")
chance = hs.circuits.random_composition(model)
print(f"chance {chance:.3f}, largest {keys.top(1)[0][2]:.3f}")
hs.plots.composition_matrix(keys)

# %%
hs.plots.composition_graph(keys, most=12, nodes=table["copying_eigenvalues_mlp"])

# %% [markdown]
# ## The circuit, named
#
# An induction head must raise the token that it attends to: the eigenvalues of its token-to-logit
# matrix lie to the right, and its copying score is near 1. The raw embedding is not what a later layer
# sees, so the first MLP is applied to it, as it is in the model.

# %%
copying = hs.circuits.eigenvalues(model, "OV", "mlp")
induction = [head for head in model.shape.heads if head.layer > 0 and copying.ratio[head] > 0.9]
print({str(head): round(float(copying.ratio[head]), 2) for head in induction})
hs.plots.eigenvalues(copying, induction)

# %% [markdown]
# And its keys must read what previous-token heads write. Which three heads feed the keys of these most?

# %%
fed = {}
for first, second, value in keys.top(keys.values.size):
    if second in induction:
        fed[first] = max(fed.get(first, 0.0), value / chance)
previous = sorted(fed, key=fed.get, reverse=True)[:3]
print("times chance:", {str(head): round(fed[head], 1) for head in fed})
print(f"by weights alone: {previous} look one back, {induction} continue")

# %% [markdown]
# Chains of heads, strongest first. Not every strong link ends in a copying head: high composition alone
# names no role, which is why both conditions were asked for.

# %%
for path in hs.circuits.strongest_paths(model, k=6, modes=["K"]):
    print(path)

# %% [markdown]
# ## Does the model agree? What they attend to
#
# Only now is it run, on random tokens said twice.

# %%
probe = hs.probes.repeated_tokens(model, length=50, batch=8)
seen = hs.score(model, probe, ["previous_token", "induction"])
print("previous token:", {str(head): round(seen["previous_token"][head], 2) for head in previous})
print("induction:     ", {str(head): round(seen["induction"][head], 2) for head in induction})

assert min(seen["previous_token"][head] for head in previous) > 0.5
assert min(seen["induction"][head] for head in induction) > 0.5

# %% [markdown]
# The heads that weights named do what they were named for.
#
# ## Does it matter? Take them out
#
# Each set of heads is replaced by its mean, beside the other heads of the same layers. Accuracy counts
# both copies; in the first one there is nothing to predict.

# %%


def others(heads):
    """The other heads of the same layers."""
    layers = {head.layer for head in heads}
    return [head for head in model.shape.heads if head.layer in layers and head not in heads]


sets = {"induction": induction, "others of their layers": others(induction)}
accuracy = hs.ablate_groups(model, probe, hs.metrics.accuracy, sets)
effect = dict(zip(sets, accuracy.mean.tolist(), strict=True))
for name, change in effect.items():
    print(f"{name:>24}: accuracy {change:+.2f}")

assert effect["induction"] < -0.3
assert effect["others of their layers"] > -0.1

# %% [markdown]
# Without the heads that were found the model can no longer continue; without the others next to them
# it hardly notices. One at a time they may matter little: they stand in for each other.
#
# ## And the link between them
#
# If the induction heads' keys read what the previous-token heads write, then taking out the latter must
# disturb the former's *attention*, more than taking out their neighbours does.

# %%
means = hs.ablation.head_means(model, probe)


def induction_without(heads):
    """Mean induction score of the induction heads while some earlier heads are at their mean."""
    with model.edited([hs.edits.mean(heads, means)]):
        scores = hs.score(model, probe, ["induction"])["induction"]
    return sum(scores[head] for head in induction) / len(induction)


whole = sum(seen["induction"][head] for head in induction) / len(induction)
without, control = induction_without(previous), induction_without(others(previous))
print(
    f"induction {whole:.2f}; without {previous} {without:.2f}; without their neighbours {control:.2f}"
)

assert without < control - 0.1

# %% [markdown]
# So the circuit that was read off the weights is the one that the model uses: with the heads that feed
# them at their mean the induction heads no longer find their place, and with the neighbours at theirs
# they do. What weights did not tell is that it matters, and how much; for that, heads were taken out.
# `headscope head` shows the same evidence for one head on one page.
