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
# Ablation and pruning: which heads can be removed?
#
# Ablating one head shows what the model loses without it, while all other heads can compensate. Ablating
# many, in a good order, shows how much of the model a task needs. We ask both questions of the bundled
# model on repeated random tokens, and at the end we prune the heads for real.

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
# The loss is a mean over both copies. The tokens of the first copy are unpredictable, and a model that has
# learned to repeat makes confident, wrong guesses there.

# %%
loss = hs.ablate_heads(model, probe, hs.metrics.loss)
accuracy = hs.ablate_heads(model, probe, hs.metrics.accuracy)
best_head = hs.score(model, probe, ["induction"]).top("induction", 1)[0][0]
print(f"without {best_head}: loss {loss[best_head]:+.2f} nats, accuracy {accuracy[best_head]:+.3f}")
hs.plots.heatmap(loss)

# %% [markdown]
# A blue cell for the strongest induction head means that, by the loss, the head is *harmful*: without it,
# the wrong guesses in the first copy are less confident. That is true but not what we want to know. We
# care about the second copy, so from here on the metric is accuracy, where a confident mistake costs no
# more than an uncertain one.

# %%
hs.plots.heatmap(accuracy)

# %% [markdown]
# One at a time, hardly any head matters, because others compensate. Pairs are more informative: a value
# below 0 means that two heads together cost more than the sum of each alone, the signature of backup
# heads.

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
# *Gradient*: a first-order estimate from one backward pass. *Ablation*: the effect of each head alone.
# *Greedy*: repeatedly remove the head whose removal costs least, the only order that looks at sets of
# heads and so accounts for backups. All orders are found on one probe and measured on another, against
# random orders.

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
# All informed orders do better than chance. The heads that the greedy order keeps to the end form the
# smallest model that still repeats; their scores show what they are.

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
# `hs.prune` removes rows and columns from Q, K, V and O. The smaller model computes exactly what zero
# ablation computes, has fewer parameters, and can be saved and loaded with the original head numbers.

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
# To repeat a study, write it as a config: models x probes x edits x sets of heads x metrics. A sweep can be
# stopped, resumed, split over machines, and read while it runs. This one measures which heads matter at
# every training checkpoint.

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
# At the start of training no head matters, since the model cannot do the task yet. `headscope sweep` runs
# such configs from YAML files, `headscope report RUN -o report.html` draws them, and `headscope emergence`
# shows head scores next to losses.
