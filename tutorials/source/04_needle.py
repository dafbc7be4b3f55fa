# %% [markdown]
# # The needle: what is found, what is kept, and which way it goes
#
# **Question.** Under pruning, does a model still find a fact hidden in a long text? And where the sparse run finds it:
# through which heads does the fact travel to the answer? This is the second case study of Stream (arXiv 2510.19875), on
# a model small enough for a CPU.

# %%
import os
import tempfile
from functools import partial

import pandas as pd
import plotly.graph_objects as go
import torch

import stream_lens as sl
from stream_lens.circuits.head_controls import heads_against_random
from stream_lens.circuits.mask_diff import mask_diff
from stream_lens.circuits.metrics import answer_log_probability, with_answer
from stream_lens.circuits.routes import routes
from stream_lens.plots import mask_figure
from stream_lens.sweep import sweep
from stream_lens.tasks.needle import needle_case
from stream_lens.tasks.needle_study import needle_cells, needle_study, needle_table

MODEL = "smollm2-135m"
SHORT = os.environ.get("STREAM_LENS_SHORT") == "1"  # set in CI: the same steps on less text
LENGTHS = (384,) if SHORT else (512, 1024)
DEPTHS = (0.2,) if SHORT else (0.1, 0.5, 0.9)
SEEDS = range(1)
K = 6
torch.set_grad_enabled(False)
load = sl.load_demo_model if MODEL in ("smollm2-135m", "gemma-3-270m") else sl.load_model
model = load(MODEL)

# %% [markdown]
# ## A small grid, with its controls
#
# Every cell of the grid is one case (length, depth, seed), answered dense and with each selector at the same `k`:
# `exhaustive` scores every block, `window_sinks` keeps the nearest blocks and the first, `random` draws. Cases that the
# dense model misses say nothing about pruning: they are left out and counted.

# %%
cells = needle_cells(LENGTHS, DEPTHS, SEEDS, ks=(K,))
with tempfile.TemporaryDirectory() as folder:
    frame = sweep(lambda: model, cells, needle_study, out=folder, progress=False)
table = needle_table(frame)
table.overall().round(3)

# %%
table.plot().show()
overall = table.overall().set_index("selector")
print(f"n = {overall.n['stream']} cases that dense answers, {overall.dense_failed['stream']} left out")
if overall.n["stream"]:
    print({name: f"{rate:.0%}" for name, rate in overall.success.items()})

# %% [markdown]
# **Reading.** Look at `n` first: with so few cases a cell is right or wrong by one coin. A window misses what lies
# before it, but a needle near the end is inside it. Where `random` finds the needle too, the budget is so generous that
# selection hardly mattered there.
#
# ## One case closely: who keeps the needle?
#
# The same prompt, the same budget, two selectors.

# %%
case = needle_case("single_1", model.tokenizer, tokens=LENGTHS[-1], depth=0.3, seed=1)
tokens = model.to_tokens(case.prompt, prepend_bos=case.prepend_bos)
segments = case.segments(model.tokenizer)
spans = dict(zip(segments.labels, segments.token_spans))
answer = model.tokenizer.encode(" " + case.answers[0], add_special_tokens=False)
metric = answer_log_probability(answer)
run = partial(sl.run_with_masks, model, k=K)
caches = {name: run(tokens, selector=name)[1] for name in ("stream", "window_sinks")}


def log_probability(**choices):
    """Of the whole answer, with the model streamed so."""
    logits, _ = sl.run_with_masks(model, with_answer(tokens, answer), last_logits=len(answer), **choices)
    return metric(logits).item()


found = {"dense": metric(model(with_answer(tokens, answer))).item()}
found |= {name: log_probability(k=K, selector=name) for name in caches}
print("log-probability of the answer:", {name: round(value, 2) for name, value in found.items()})
assert found["stream"] > found["window_sinks"]

# %%
rows = []
for layer, pattern in caches["stream"].patterns().items():
    blocks, mass = pattern.mask.indices[0, :, -1], pattern.block_mass[0, :, -1]
    inside = (blocks >= spans["needle"][0] // 32) & (blocks <= (spans["needle"][1] - 1) // 32)
    rows += [((mass * inside).sum(-1)[head].item() / mass[head].sum().item(), layer, head) for head in range(len(mass))]
top = sorted(rows, reverse=True)[:2]
panels = []
for name, cache in caches.items():
    for _, layer, head in top:
        pattern = cache["pattern", layer]
        panels.append((f"{name}: layer {layer}, head {head}", pattern.mask, pattern.block_mass, head))
marked = {"needle": spans["needle"], "question": spans["question"]}
mask_figure(panels, f"{MODEL}, T = {tokens.shape[1]}, k = {K}", spans=marked).show()

# %% [markdown]
# ## Success − failure
#
# `mask_diff` compares runs cell by cell, here by segment: how much more of a row's attention the successful run gives.
# For what the last words (the answer prefix) look at:

# %%
diff = mask_diff(caches["stream"], caches["window_sinks"], segments).to_frame()
last = diff[(diff.query_label == "answer prefix") & (diff.key_label == "needle")]
grid = last.pivot(index="layer", columns="head", values="difference").reindex(
    index=range(model.cfg.n_layers), columns=range(model.cfg.n_heads)
)
largest = float(grid.abs().max().max())
figure = go.Figure(
    go.Heatmap(
        z=grid, x=grid.columns, y=grid.index, colorscale="RdBu", zmin=-largest, zmax=largest, colorbar_title="difference"
    )
)
figure.update_xaxes(title="head", dtick=1)
figure.update_yaxes(title="layer", autorange="reversed")
figure.update_layout(
    template="plotly_white", height=560, width=720, title=f"{MODEL}: attention from the answer prefix to the needle,<br>stream − window"
)
figure.show()
diff[["layer", "head", "query_label", "key_label", "success", "failure", "difference"]].head(6).round(3)

# %% [markdown]
# **Reading.** Blue heads look at the needle in the run that finds it and cannot in the other. Heads without a colour
# keep it in neither. The two runs differ in the selector, so *everything* that sets selectors apart is in this
# difference, not only what the answer needs. One pair carries no p value; give lists of pairs for that, and read the
# control columns of `by_layer()`, which say how much two runs differ for no reason.
#
# ## A route from the needle to the answer
#
# Layer by layer, attention mixes positions and the residual stream carries them on. `routes` multiplies both through
# (attention rollout): how much of the last position comes from the needle, and by which heads?

# %%
way = {name: routes(cache, "needle", -1, segments) for name, cache in caches.items()}
print("flow from the needle to the last token:", {name: f"{each.flow:.2g}" for name, each in way.items()})
print("reachable:", {name: each.reachable for name, each in way.items()})
best = way["stream"].paths[0]
labels = way["stream"].nodes.labels
print("the strongest path:")
for hop in best.hops:
    print(f"  layer {hop.layer}, head {hop.head}: {labels[hop.source]} → {labels[hop.target]} ({hop.share:.1%})")
way["stream"].by_head().head(8).round(4)

# %% [markdown]
# **What a route is not.** Reachable is weak: through neighbours and the residual stream nearly everything reaches
# nearly everything, even where no block of the needle is kept. Rollout knows nothing of what values carry. So the
# heads it names are held against the model: take them out, and as many random heads from the same layers.

# %%
heads = [(hop.layer, hop.head) for hop in best.hops]
for layer, head in way["stream"].by_head()[["layer", "head"]].itertuples(index=False):
    if len(set(heads)) < 6:
        heads.append((int(layer), int(head)))
heads = sorted(set(heads))
control = heads_against_random(
    model, [(with_answer(tokens, answer), metric)], heads, sl.StreamConfig(k=K), seeds=3, same_layers=True
)
print(f"without {heads}: the answer's log-probability falls by {control.effect:.2f}")
print(f"without as many random heads of the same layers: {[round(effect, 2) for effect in control.random_effects]} "
      f"(n = {control.inputs} prompt, {len(control.random_effects)} draws)")  # fmt: skip
figure = go.Figure(go.Bar(x=["heads of the route", *(f"random {n}" for n in range(3))], y=[control.effect, *control.random_effects]))
figure.update_yaxes(title="loss of log-probability, nats")
figure.update_layout(template="plotly_white", height=360, width=720, title=f"{MODEL}: the route's heads against random ones")
figure.show()

# %% [markdown]
# **Reading.** If the first bar does not stand out, the route is a picture and not an explanation, and that is a result
# too. Taking whole heads out also takes all else that they do. For blocks instead of heads, see notebook 05.
