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
# # Ablation and pruning: which heads can go?
#
# Taking one head out tells what the model loses without it, while all others may stand in for it.
# Taking out many, in a good order, tells how much of the model a task needs. Both questions are asked
# of the bundled model on random tokens said twice, and at the end the heads really go.

# %%
import tempfile
from pathlib import Path

import headscope as hs

model = hs.load()
probe = hs.probes.repeated_tokens(model, length=50, batch=8, seed=1)  # to find the order on
held_out = hs.probes.repeated_tokens(model, length=50, batch=16, seed=2)  # to measure it on

# %% [markdown]
# ## Be careful what you measure
#
# The loss is a mean over both copies. Nothing foretells the tokens of the first copy, and a model that
# has learned to repeat is sure of its guesses there, and wrong.

# %%
loss = hs.ablate_heads(model, probe, hs.metrics.loss)
accuracy = hs.ablate_heads(model, probe, hs.metrics.accuracy)
best_head = hs.score(model, probe, ["induction"]).top("induction", 1)[0][0]
print(f"without {best_head}: loss {loss[best_head]:+.2f} nats, accuracy {accuracy[best_head]:+.3f}")
hs.plots.heatmap(loss)

# %% [markdown]
# Where the cell of the strongest induction head is blue, the loss calls it *harmful*: without it the
# wrong guesses in the first copy are less sure. That is true, and it is not the question. What we want to
# keep is the second copy, so from here on the metric is accuracy, where a sure mistake costs no more
# than an unsure one.

# %%
hs.plots.heatmap(accuracy)

# %% [markdown]
# One at a time, hardly any head matters: others stand in. Pairs tell more: below 0 where two heads
# together cost more than the sum of both alone, which is what backups do.

# %%
top = [head for head, _ in hs.score(model, probe, ["induction"]).top("induction", 2)]
together = hs.interactions(model, probe, hs.metrics.accuracy, top)
extra = float(together.values[(*top[0], *top[1])])
alone = [accuracy[head] for head in top]
print(f"{top[0]} {alone[0]:+.2f}, {top[1]} {alone[1]:+.2f}, together {sum(alone) + extra:+.2f}")

assert extra < -0.1  # they are each other's backup

# %% [markdown]
# ## Three orders, and chance
#
# *Gradient*: a first-order guess from one backward pass. *Ablation*: by the effect of each head alone.
# *Greedy*: the head whose removal costs least, again and again, which alone of them looks at sets of heads
# and so sees backups. All are found on one probe and measured on another, against random orders.

# %%
orders = {
    "gradient": hs.pruning.one_shot(hs.pruning.gradient_importance(model, probe)),
    "ablation": hs.pruning.one_shot(
        hs.pruning.ablation_importance(model, probe, hs.metrics.accuracy)
    ),
    "greedy": hs.pruning.greedy(model, probe, hs.metrics.accuracy),
}
curve = hs.pruning.pruning_curve(model, held_out, hs.metrics.accuracy, orders=orders, random=5)
hs.plots.curves(curve.effects, controls=curve.controls)

# %%
whole = float(curve.mean[0, 0])
can_go = {}
for arm, means in zip(curve.effects.labels[0], curve.mean, strict=True):
    too_many = [n for n, value in zip(curve.counts, means, strict=True) if value <= 0.9 * whole]
    can_go[arm] = min(too_many) - 1
for arm, count in can_go.items():
    print(f"{arm:>10}: {count} of {len(model.shape.heads)} heads at over 90% of the accuracy")

chance = max(can_go[arm] for arm in curve.controls)
assert can_go["greedy"] > chance

# %% [markdown]
# An order that looks at the model goes further than chance. What the greedy one keeps to the end is the smallest model that still
# repeats; the scores say what those heads are.

# %%
kept = orders["greedy"][can_go["greedy"] :]
table = hs.score(model)
roles = table.roles()
for head in sorted(kept):
    print(head, ", ".join(role for role, _ in roles.get(head, [])) or "no role")

assert any("induction" in dict(roles.get(head, [])) for head in kept)

# %% [markdown]
# ## Prune for real
#
# `hs.prune` takes rows and columns out of Q, K, V and O. The smaller model computes what ablation at
# zero computes, has fewer parameters, can be saved, and is read again with its heads under their old
# numbers.

# %%
gone = orders["greedy"][: can_go["greedy"]]
smaller = hs.prune(model, gone)
before = hs.pruning.measure_size(model.module, held_out.tokens)
after = hs.pruning.measure_size(smaller, held_out.tokens)
print(f"parameters {before.parameters:,} -> {after.parameters:,}")
print(f"operations {before.flops:,} -> {after.flops:,}")

with tempfile.TemporaryDirectory() as folder:
    smaller.save_pretrained(folder)
    again = hs.load(folder)
    right = hs.metrics.accuracy(again.forward(held_out.tokens), held_out).mean()
print(
    f"accuracy {whole:.3f} -> {float(right):.3f}; heads left: {', '.join(map(str, again.shape.heads))}"
)

assert abs(float(right) - curve.mean[list(orders).index("greedy"), can_go["greedy"]]) < 1e-3

# %% [markdown]
# ## The same as a sweep
#
# A study worth repeating is a config: models x probes x edits x sets of heads x metrics. It can be
# stopped, resumed, split over machines, and read while it runs. This one asks of every training
# checkpoint which heads matter to it.

# %%
config = hs.sweeps.SweepConfig(
    name="when-do-heads-matter",
    models=[{"model": "tiny-gpt2", "checkpoints": "all"}],
    probes=[{"kind": "repeated_tokens", "length": 25, "batch": 8}],
    edits=["mean"],
    metrics=["accuracy"],
)
with tempfile.TemporaryDirectory() as folder:
    hs.sweeps.run_sweep(config, Path(folder) / "run", progress=False)
    results = hs.sweeps.read(Path(folder) / "run")
    frame = results.to_pandas()

names = list(dict.fromkeys(frame["model"]))
largest = frame.groupby("model", sort=False)["effect"].min()
for name in names:
    worst = frame[frame["model"] == name].sort_values("effect").iloc[0]
    print(f"{name:>24}: worst to lose L{worst['layer']}H{worst['head']}, {worst['effect']:+.3f}")

assert abs(largest[names[0]]) < 0.02 < abs(largest[names[-1]])

# %% [markdown]
# At the start no head matters, since there is nothing to lose. `headscope sweep` runs such configs from
# YAML files, `headscope report RUN -o report.html` draws them, and `headscope emergence` puts the scores
# of the heads beside the losses.
