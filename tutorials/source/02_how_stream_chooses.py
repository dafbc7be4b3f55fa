# %% [markdown]
# # How Stream chooses: the search by hand, on a real head, and beside its controls
#
# **Question.** For every query block, Stream (arXiv 2510.19875) finds `k` key blocks without computing all T² scores.
# How? When does it miss? And is it any better than choosing without looking?
#
# Three steps: ten numbers that can be followed with a pencil, then a real head on real text, then all heads against the
# best possible choice and against two selectors that do not look at the text at all.

# %%
import os
import pydoc_data.topics

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

import stream_lens as sl

MODEL = "smollm2-135m"
SHORT = os.environ.get("STREAM_LENS_SHORT") == "1"  # set in CI: the same steps on less text
TOKENS = 512 if SHORT else 1536
KS = (4, 8) if SHORT else (4, 8, 16)
torch.set_grad_enabled(False)
COLOURS = {"exhaustive": "#000000", "stream": "#0072B2", "window_sinks": "#E69F00", "random": "#8A8A8A"}

# %% [markdown]
# ## By hand
#
# The rule for one query block that may keep m blocks besides those that are always kept:
#
# 1. cut the keys before it into m equal branches;
# 2. halve every branch; let a **representative** of each half compete; keep the best m halves;
# 3. repeat until every branch is one block.
#
# To follow it with a pencil, take blocks of a single token and numbers of one dimension: a query of 1, so that a key's
# score is the key itself. Seventeen tokens: sixteen keys before the last query. The representative is the branch's
# first key.

# %%
keys = [0.1, 0.2, 0.0, 0.3, 2.0, 0.1, 0.4, 0.2, 0.5, 0.1, 0.9, 3.0, 0.2, 0.1, 0.0, 0.6, 0.0]
k = torch.tensor(keys).view(1, 1, -1, 1)
q = torch.ones_like(k)


def search_by_hand(scores, m):
    """The blocks of `scores` that the search ends with, and every round's (start, stop, survives)."""
    n = len(scores)
    branches = [(n * j // m, n * (j + 1) // m) for j in range(m)]
    rounds = []
    while max(stop - start for start, stop in branches) > 1:
        halves = []
        for start, stop in branches:
            middle = (start + stop) // 2
            halves += [(start, middle), (middle, stop)] if stop - start > 1 else [(start, stop)]
        best = sorted(halves, key=lambda half: -scores[half[0]])[:m]  # the first key speaks for the half
        rounds.append([(start, stop, (start, stop) in best) for start, stop in halves])
        branches = sorted(best)
    return [start for start, _ in branches], rounds


by_hand, rounds_by_hand = search_by_hand(keys[:16], m=2)
for number, halves in enumerate(rounds_by_hand, start=1):
    shown = [f"{'✓' if survives else '✗'} [{start},{stop}) {keys[start]}" for start, stop, survives in halves]
    print(f"round {number}:  " + "   ".join(shown))
print("kept:", by_hand, "of scores", [keys[b] for b in by_hand])

# %% [markdown]
# The library's own rounds, with the same choices. `k=3` counts the query's own block, which is always kept, so two are
# free.

# %%
paper_like = sl.StreamConfig(
    q_block=1, k_block=1, k=3, sink_blocks=0, representative="first", reduce="max", oversample=1, query_stride=1
)
mask, rounds = sl.select_blocks(q, k, paper_like, return_rounds=True)
kept = mask.indices[0, 0, -1].tolist()
print("stream_lens keeps", kept, "(16 is the query's own)")
assert kept == [*by_hand, 16]

# %% [markdown]
# **The largest key is not necessarily found.** A representative speaks for keys that nobody looked at. Here is what
# each kind finds of the two largest, and what following more branches than will be kept (`oversample`) changes.

# %%
two_best = set(torch.tensor(keys[:16]).topk(2).indices.tolist())
rows = []
for representative in ("first", "centre", "last", "mean", "mean_var"):
    for oversample in (1, 2, 4):
        config = sl.StreamConfig(
            q_block=1, k_block=1, k=3, sink_blocks=0, representative=representative, oversample=oversample, query_stride=1
        )
        found = set(sl.select_blocks(q, k, config).indices[0, 0, -1].tolist()) - {16}
        rows.append({"representative": representative, "oversample": oversample, "of the two largest": len(found & two_best)})
pd.DataFrame(rows).pivot(index="representative", columns="oversample", values="of the two largest")

# %% [markdown]
# One list of numbers decides nothing about which representative is best; it only shows that they differ, and why the
# default follows several branches for each block that it keeps (an extension; the paper's search has one):

# %%
print("defaults:", {name: getattr(sl.StreamConfig(), name) for name in ("representative", "oversample", "rank")})

# %% [markdown]
# ## On a real head
#
# Text that every Python carries: its language reference. One head, the last query block, the rounds of the paper's
# search (`oversample=1`). Below them what the search tries to find: the dense attention of that query block.

# %%
load = sl.load_demo_model if MODEL in ("smollm2-135m", "gemma-3-270m") else sl.load_model
model = load(MODEL)
text = pydoc_data.topics.topics["compound"]
tokens = model.to_tokens(text, truncate=False)[:, :TOKENS]
LAYERS = tuple(range(0, model.cfg.n_layers, 6))
n_blocks = -(-TOKENS // 32)


def observed(**choices):
    """Masks that a selector chooses, and the share of *dense* attention that they hold: the dense output flows on."""
    with sl.stream(model, observe=True, layers=LAYERS, **choices):
        _, cache = sl.run_with_masks(model, tokens)
    return cache


everything = observed(k=n_blocks, selector="window_sinks")  # every block is kept, so block_mass is the dense mass

# %% [markdown]
# The dense mass of every block is the truth to compare with. For the picture we take the head whose last query block
# gives most to a single block in the middle of the text, where neither the sink nor the neighbourhood helps.


# %%
def dense_mass(layer):
    """[head, query block, key block], share of a row: from the run that keeps everything."""
    pattern = everything["pattern", layer]
    mask = pattern.mask
    full = torch.zeros(mask.shape[1], mask.q_blocks, mask.k_blocks + 1)
    place = mask.indices[0].long()
    full.scatter_(-1, torch.where(place < 0, mask.k_blocks, place), pattern.block_mass[0])
    return full[..., :-1] / 32


middle = slice(1, n_blocks - 3)
layer, head = max(
    ((layer, head) for layer in LAYERS for head in range(model.cfg.n_heads)),
    key=lambda where: dense_mass(where[0])[where[1], -1, middle].max().item(),
)
truth = dense_mass(layer)[head, -1]
print(f"layer {layer}, head {head}: one middle block gets {truth[middle].max():.1%} of the last query block's attention")

# %%
pattern = everything["pattern", layer]
scores = pattern.data_.sources[0]  # the layer's queries and keys, after rotary embedding
mask, rounds = sl.select_blocks(
    scores.q, scores.k, sl.StreamConfig(k=8, oversample=1), scores.rule, layer=layer, return_rounds=True
)
kept = [b for b in mask.indices[0, head, -1].tolist() if b >= 0]

figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)
for survives, name, colour in ((True, "kept for the next round", "#0072B2"), (False, "dropped", "#D9D9D9")):
    y, base, width = [], [], []
    for number, state in enumerate(rounds, start=1):
        for start, stop, alive in zip(
            state.start[0, head, -1].tolist(), state.stop[0, head, -1].tolist(), state.survives[0, head, -1].tolist()
        ):
            if stop > start and bool(alive) == survives:
                y.append(f"round {number}")
                base.append(start)
                width.append(stop - start)
    figure.add_bar(
        y=y, x=width, base=base, orientation="h", name=name, marker={"color": colour, "line": {"color": "white", "width": 1.5}},
        row=1, col=1,
    )  # fmt: skip
colour = ["#0072B2" if b in kept else "#D9D9D9" for b in range(n_blocks)]
figure.add_bar(
    x=[b + 0.5 for b in range(n_blocks)], y=truth.tolist(), marker_color=colour, showlegend=False, row=2, col=1, width=0.9
)
figure.update_yaxes(autorange="reversed", row=1, col=1)
figure.update_yaxes(
    title="share of attention", type="log", range=[-4, 0], tickvals=[1e-4, 1e-3, 1e-2, 0.1, 1],
    ticktext=["0.0001", "0.001", "0.01", "0.1", "1"], row=2, col=1,
)  # fmt: skip
figure.update_xaxes(title="key block (32 tokens each)", row=2, col=1)
figure.update_layout(
    template="plotly_white", barmode="overlay", height=560, legend={"orientation": "h", "y": 1.08, "x": 0},
    title=f"{MODEL}, layer {layer}, head {head}: the search of the last query block, k = 8", margin_t=110,
)  # fmt: skip
figure.show()
best = truth.topk(8).indices.tolist()
print(f"kept {kept}: {truth[kept].sum():.1%} of the dense attention")
print(f"best {sorted(best)}: {truth[best].sum():.1%}, {len(set(best) & set(kept))} of 8 in common")

# %% [markdown]
# **What to look at.** Where a tall bar is grey, the search dropped it, and the row above shows in which round its
# branch lost. The first and the last block are blue without having competed: sink and diagonal are always kept.
#
# ## All heads, beside the controls
#
# *Mass recall* is the share of the dense attention that lies in the kept blocks. At the same `k`:
#
# - `exhaustive` scores every block (T² work): what any selector could reach, ranked by mass;
# - `window_sinks` keeps the first block and the nearest ones, whatever the text says;
# - `random` draws.
#
# Most attention is on the sink and close by, where any window gets it for free. So there are two columns: all
# attention, and attention on the **far** part (neither the first block nor the four nearest).

# %%
choices = {
    "exhaustive": {"selector": "exhaustive", "rank": "mass"},
    "stream": {"selector": "stream"},
    "window_sinks": {"selector": "window_sinks"},
    "random": {"selector": "random"},
}
row, column = torch.arange(n_blocks)[:, None], torch.arange(n_blocks)[None]
far = (column > 0) & (column < row - 3)


def recalls(cache):
    """One row a head and query block: share of all its dense attention kept, and of the far part."""
    frames = []
    for layer in LAYERS:
        mass = dense_mass(layer)
        kept = torch.zeros(mass.shape[0], n_blocks, n_blocks + 1, dtype=torch.bool)
        place = cache["pattern", layer].mask.indices[0].long()
        kept = kept.scatter(-1, torch.where(place < 0, n_blocks, place), True)[..., :-1]
        total, total_far = mass.sum(-1), (mass * far).sum(-1)
        frames.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "q_block": row[:, 0].repeat(mass.shape[0]),
                    "all": ((mass * kept).sum(-1) / total).flatten(),
                    "far": ((mass * kept * far).sum(-1) / total_far.clamp(min=1e-9)).flatten(),
                    "has_far": (total_far / total > 0.01).flatten(),
                }
            )
        )
    return pd.concat(frames)


rows = []
for budget in KS:
    for name, choice in choices.items():
        found = recalls(observed(k=budget, **choice))
        later = found[found.q_block >= n_blocks // 2]  # where there is more to choose from than k
        with_far = later[later.has_far]
        rows.append((budget, name, later["all"].mean(), with_far["far"].mean(), len(later), len(with_far)))
table = pd.DataFrame(rows, columns=["k", "selector", "recall, all", "recall, far", "n", "n far"])
table.round(3)

# %%
figure = make_subplots(rows=1, cols=2, subplot_titles=("all attention", "far attention"), shared_yaxes=True)
for side, column_name in enumerate(("recall, all", "recall, far"), start=1):
    for name, part in table.groupby("selector", sort=False):
        figure.add_scatter(
            x=part.k, y=part[column_name], name=name, line_color=COLOURS[name], mode="lines+markers",
            showlegend=side == 1, line_dash="dot" if name == "exhaustive" else "solid", row=1, col=side,
        )  # fmt: skip
figure.update_xaxes(type="log", tickvals=KS, title="k, key blocks kept for each query block")
figure.update_yaxes(range=[0, 1.02], title="share of dense attention kept", col=1)
heads = len(LAYERS) * model.cfg.n_heads
figure.update_layout(
    template="plotly_white",
    height=420,
    title=f"{MODEL}, {TOKENS} tokens, {heads} heads of {len(LAYERS)} layers, second half of the query blocks",
)
figure.show()
by = table.set_index(["k", "selector"])
for budget in KS:
    assert by.loc[(budget, "exhaustive"), "recall, all"] >= by.loc[(budget, "stream"), "recall, all"] - 1e-3
    assert by.loc[(budget, "stream"), "recall, far"] > by.loc[(budget, "window_sinks"), "recall, far"]

# %% [markdown]
# **Reading.** On *all* attention the exhaustive choice is a ceiling, and the window comes close to it: a single number
# would hide that it sees nothing far away. On the *far* part nothing is a ceiling: the exhaustive choice by mass spends
# its blocks wherever the attention is, which is mostly near, and a selector that draws blocks spends little on what is
# near, so at a small k it may even hold more of the far part. Compare both columns. `n` counts heads × query blocks; `n far` those with more than 1 % of their attention far away, the only
# ones for which a far recall means something.
#
# **What this does not show.** Recall of attention is not recall of what matters: a block with little attention may carry
# the answer. And it is one text and one model. Run it on yours.
#
# ## Where it is lost: late rows
#
# A constant `k` keeps a smaller share of every later row. `FractionOfPrefix` spends the same number of blocks otherwise:
# fewer for early rows, more for late ones (the paper leaves variable k to future work).

# %%
constant = observed(k=8)
blocks_spent = sum(int(mask.kept.sum()) for mask in constant.masks().values())
low, high = 0.0, 1.0
for _ in range(12):  # the fraction that spends as many blocks: found from the mask's own rule, without a run
    fraction = (low + high) / 2
    per_row = [min(i + 1, max(4, -(-fraction * (i + 1) // 1))) for i in range(n_blocks)]
    low, high = (fraction, high) if sum(per_row) * heads < blocks_spent else (low, fraction)
varying = observed(k=sl.FractionOfPrefix(low))
spent = sum(int(mask.kept.sum()) for mask in varying.masks().values())
print(f"k = 8 keeps {blocks_spent:,} blocks, a fraction of {low:.3f} keeps {spent:,}")
assert abs(spent / blocks_spent - 1) < 0.1

figure = go.Figure()
for name, cache, colour in (("k = 8", constant, "#0072B2"), (f"{low:.0%} of the prefix", varying, "#009E73")):
    found = recalls(cache).groupby("q_block")["all"].mean()
    figure.add_scatter(x=[32 * b for b in found.index], y=found, name=name, line_color=colour)
figure.update_xaxes(title="first token of the query block")
figure.update_yaxes(title="share of dense attention kept")
figure.update_layout(
    template="plotly_white", height=380, title=f"Mass recall by position, about equal budgets ({heads} heads)"
)
figure.show()

# %% [markdown]
# **Reading.** The two lines spend about the same number of blocks. Where they cross is where the fraction begins to
# give a row more than eight. Whether that is worth it depends on where your question stands in the text: at the end, as
# in most prompts, late rows are the ones that count.
