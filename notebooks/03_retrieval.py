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
# # Retrieval: which heads fetch a fact from far back?
#
# We hide a sentence in a long text and ask the model about it. A *retrieval head* (Wu et al. 2024) is a
# head whose top-attended token during decoding lies in that sentence and equals the generated token. In
# this notebook we find such heads and then mask them.

# %%
import headscope as hs

model = hs.load("tiny-llama")
probe = hs.probes.needle(model, lengths=[64, 128, 250], depths=5, per_cell=2)
print(model.tokenizer.decode(probe.tokens[0][probe.real[0]]))

# %% [markdown]
# Keys, values and places are random, so the answer can only come from the text. Keys like these never
# occurred in training.
#
# ## Who copies?
#
# The model answers every question with a KV cache. At each step, only the newest query's attention row is
# computed. No full pattern is ever stored.

# %%
found = hs.retrieval.decoded(model, probe)
heads = found.heads()
print(found)
hs.plots.heatmap(found.by_set)

# %%
activity = hs.retrieval.activity(found.activation)
print(
    {
        word: sum(one == word for one in activity.values())
        for word in ("always", "sometimes", "never")
    }
)
hs.plots.recall_grid(found.recall_grid())

# %% [markdown]
# Few heads copy, and those that do copy nearly everywhere. The null uses a text with a different needle,
# so the question has no answer there. The same heads hit that needle's answer in at most a quarter of the
# examples, so each of them copies beyond chance. Teacher-forcing (one pass with the answer appended)
# finds the same heads:

# %%
print(hs.retrieval.agreement(found.by_set, hs.retrieval.forced(model, probe), k=len(heads)))
assert 1 <= len(heads) <= len(model.shape.heads) // 3
assert all(found.by_set.significant()[head] for head in heads)
assert all(found.by_set.null[head] < 0.25 < 0.9 < found.by_set.mean[head] for head in heads)

# %% [markdown]
# ## Does the answer depend on them?
#
# *Masking* makes a head attend uniformly from the last prompt token on. We use new needles and mask the
# strongest copying heads first, with random non-copying heads as the control.

# %%
held_out = hs.probes.needle(model, lengths=[100, 200], depths=4, per_cell=2, seed=1)
curve = hs.retrieval.masking_curve(
    model, held_out, found.by_set, counts=[0, 2, 4, len(heads), len(heads) + 3], random=6
)
hs.plots.curves(curve.effects, controls=curve.controls)

# %%
arms = dict(
    zip(curve.effects.labels[0], curve.mean[:, curve.counts.index(len(heads))], strict=True)
)
random = sum(arms[name] for name in curve.controls) / len(curve.controls)
print(f"{len(heads)} heads masked: retrieval heads {arms['top']:.2f}, as many others {random:.2f}")
assert arms["top"] < 0.1
assert random > 0.5

# %% [markdown]
# Without the retrieval heads, hardly any answer is right; without the same number of other heads, most
# are. If only some of them are masked, the rest compensate: no single head is indispensable.
#
# ## What does the model say instead?
#
# The same mask as a context manager: inside it, the model runs without these heads.

# %%
prompt = "The code of the red door is seven. The code of the blue bag is nine. The code of the red door is"
print("whole: ", hs.retrieval.generate(model, prompt, new_tokens=6).texts[0])
with hs.mask_heads(model, heads):
    print("masked:", hs.retrieval.generate(model, prompt, new_tokens=6).texts[0])

# %% [markdown]
# ## Passage against memory
#
# Each passage now states the value that the model considers least likely when asked without a passage.
# DeCoRe (Gema et al. 2024) contrasts the model with itself without retrieval heads. The fully trained
# model follows the passage anyway, so we use an earlier checkpoint.

# %%
young = hs.load("tiny-gpt2", revision="step-005000")
easy = hs.probes.needle(young, lengths=96, depths=4, per_cell=4)
copying = hs.retrieval.decoded(young, easy).heads()
against = hs.retrieval.contradictions(young, examples=32, length=150, distractors=5, seed=1)
said = hs.retrieval.faithfulness(young, against, copying)
print(copying)
print(said)

# %%
margin = dict(zip(said.arms, said.margin.mean(1), strict=True))
assert margin["masked"] < margin["base"] < margin["DeCoRe entropy"]

# %% [markdown]
# The margin is how much more likely the passage's answer is than the model's own, in nats. Masking lowers
# it and the contrast raises it, most where the model is unsure. Whether the answers themselves improve is
# a separate question; see the shares above.
#
# ## In-context learning, token by token
#
# A repeated sequence of random tokens: in the second half, a model that looks back can predict what comes
# next.

# %%
twice = hs.probes.repeated_tokens(model, length=48, batch=16)
losses = hs.retrieval.token_losses(model, twice, {"retrieval heads masked": heads})
hs.plots.token_losses(losses, window=4)

# %%
score = hs.retrieval.in_context_score(model, twice, early=(8, 40), late=(56, 88))
whole, masked = (losses.losses[..., 56:89].mean(2) - losses.losses[..., 8:41].mean(2)).mean(1)
print(f"late less early loss: {whole:.2f} nats, {masked:.2f} with retrieval heads masked")
print("single heads that matter most:", score.top(3))
assert masked > whole + 1

# %% [markdown]
# The heads that retrieve facts also continue repeated text: in this model, retrieval is induction. To run
# the same analysis on longer texts, with a report: `headscope retrieval MODEL --lengths 1k..32k --out
# runs/retrieval`.
