# %% [markdown]
# # Long contexts: 32k tokens on a CPU, and what a million would take
#
# **Question.** What does it take to have every head's pattern of a long text: memory, time, disk? And what changes on a
# GPU?

# %%
import os
import pydoc_data.topics
import resource
import tempfile
import time
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import torch

import stream_lens as sl
from stream_lens.circuits.metrics import with_answer
from stream_lens.plots import mask_figure
from stream_lens.tasks.needle import needle_case

MODEL = "gemma-3-270m"
SHORT = os.environ.get("STREAM_LENS_SHORT") == "1"  # set in CI: the same steps on less text
TOKENS = 8_192 if SHORT else 32_768
CONFIG = sl.StreamConfig(q_block=64, k_block=64, k=16)
torch.set_grad_enabled(False)
load = sl.load_demo_model if MODEL in ("smollm2-135m", "gemma-3-270m") else sl.load_model
model = load(MODEL, n_ctx=TOKENS)  # TransformerLens' own table stops this model at 8192; the model itself goes on
print(f"{MODEL}: {model.cfg.n_layers} layers × {model.cfg.n_heads} heads, context {model.cfg.n_ctx:,} tokens")

# %% [markdown]
# ## Before running: an estimate
#
# `memory_estimate` is arithmetic on the model's shape. It tells what a run will need *before* it is started, and what
# the dense patterns alone would have needed.


# %%
def gigabytes(n):
    return round(n / 1e9, 3 if n < 1e9 else 1)


lengths = [8_192 * 2**n for n in range(8)]
estimates = [sl.memory_estimate(model, n, CONFIG) for n in lengths]
table = pd.DataFrame(
    {
        "tokens": lengths,
        "weights": [gigabytes(e.weights) for e in estimates],
        "masks": [gigabytes(e.masks) for e in estimates],
        "queries and keys": [gigabytes(e.queries_keys) for e in estimates],
        "activations": [gigabytes(e.activations) for e in estimates],
        "sparse, total": [gigabytes(e.total) for e in estimates],
        "total, keep_scores=False": [gigabytes(e.total - e.queries_keys) for e in estimates],
        "dense patterns": [gigabytes(e.dense_patterns) for e in estimates],
    }
)
print("gigabytes")
table

# %%
figure = go.Figure()
for name, column, dash in (
    ("dense patterns alone", "dense patterns", "solid"),
    ("sparse, everything", "sparse, total", "solid"),
    ("sparse, keep_scores=False", "total, keep_scores=False", "dash"),
    ("of which masks", "masks", "dot"),
):
    figure.add_scatter(x=table.tokens, y=table[column], name=name, mode="lines+markers", line_dash=dash)
figure.add_scatter(x=lengths, y=[80] * len(lengths), name="80 GB, one large GPU", mode="lines", line_color="#8A8A8A")
figure.update_xaxes(type="log", title="tokens", tickvals=lengths, ticktext=[f"{n // 1024}k" for n in lengths])
figure.update_yaxes(type="log", title="GB", range=[-3.2, 6.2], tickvals=[0.01, 0.1, 1, 10, 100, 1e3, 1e4, 1e5, 1e6])
figure.update_yaxes(ticktext=["0.01", "0.1", "1", "10", "100", "1,000", "10,000", "100,000", "1,000,000"])
figure.update_layout(template="plotly_white", height=440, title=f"{MODEL}, blocks of 64, k = 16: estimated memory")
figure.show()
fits = table[table["total, keep_scores=False"] < 80].tokens.max()
print(f"80 GB hold the sparse run of {fits:,} tokens, and the dense patterns of "
      f"{table[table['dense patterns'] < 80].tokens.max():,}.")  # fmt: skip

# %% [markdown]
# **What this does not say.** It is memory only, and only of this model's shape: a model's own context may end long
# before a million (this one's ends at 32,768 tokens). Nor does it count what the allocator wastes. The run below measures.
#
# ## The run
#
# A needle in a real text, the Python language reference, which every Python carries. `run_with_masks` is
# `run_with_cache` for long inputs: patterns only, logits of the last position only (all positions' would be
# T × vocabulary) unless more are asked for, and an error instead of a silent cut when the text is too long. `keep_scores=False` drops queries and
# keys as soon as a layer is done.

# %%
folder = tempfile.TemporaryDirectory()
essay = Path(folder.name) / "essay.txt"
essay.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
case = needle_case("single_2", model.tokenizer, tokens=TOKENS - 16, depth=0.5, seed=0, essay=essay)
prompt = model.to_tokens(case.prompt, prepend_bos=case.prepend_bos, truncate=False)
wanted = model.tokenizer(" " + case.answers[0], add_special_tokens=False, return_tensors="pt")["input_ids"].to(prompt)
tokens = with_answer(prompt, wanted)  # the answer too, but for its last token, to see what is expected at each of them
segments = case.segments(model.tokenizer)
spans = dict(zip(segments.labels, segments.token_spans))
print(f"{tokens.shape[1]:,} tokens, the needle at {spans['needle']}: {segments.text_of(0).strip()}")


# %%
def timed(text_tokens):
    """The run, and the processor seconds that it took (not the clock's: others may share the machine)."""
    start = time.process_time()
    logits, cache = sl.run_with_masks(model, text_tokens, CONFIG, keep_scores=False, last_logits=wanted.shape[1])
    return logits, cache, time.process_time() - start


_, _, seconds_quarter = timed(tokens[:, : TOKENS // 4])
logits, cache, seconds = timed(tokens)
growth = seconds / seconds_quarter
print(f"4 times the text took {growth:.1f} times the processor time (4 is linear, 16 is quadratic)")

peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
estimate = sl.memory_estimate(model, TOKENS, CONFIG)
print(f"peak of this process: {gigabytes(peak)} GB; estimate: {gigabytes(estimate.total - estimate.queries_keys)} GB "
      "(without Python and its libraries, and without the loader's second copy of the weights)")  # fmt: skip
print(f"patterns cached: {cache.nbytes / 1e6:.1f} MB; dense they would be {cache.compression().dense_bytes / 1e9:.1f} GB")
assert growth < 8  # far from quadratic

# %% [markdown]
# Does the model see the needle at this length, at this budget?

# %%
most_expected = logits[0].argmax(-1)
right = (most_expected == wanted[0]).sum().item()
print("the answer:", repr(model.tokenizer.decode(wanted[0])))
print("most expected at each of its tokens:", [model.tokenizer.decode([t]) for t in most_expected.tolist()])
print(f"{right} of {wanted.shape[1]} right")

# %% [markdown]
# One case is an anecdote; notebook 04 counts. A digit may also be right by luck, or because the ones before it were given. Without the dense run beside it, a miss says nothing about pruning either:
# a model this small loses needles on its own.
#
# ## What each layer kept
#
# Most layers of this model see a window of 512 tokens only. There nearly all of the causal half is out of sight
# *before* any pruning, so the only honest share is that of the blocks a query can see (`visible`).

# %%
rows = []
for layer, mask in cache.masks().items():
    last = mask.indices[0, :, -1]
    holds = (last >= spans["needle"][0] // mask.k_block) & (last <= (spans["needle"][1] - 1) // mask.k_block)
    rows.append(
        {
            "layer": layer,
            "window": mask.window or "all",
            "pruned of the causal half": mask.sparsity("causal"),
            "pruned of the visible": mask.sparsity("visible"),
            "heads that keep the needle": f"{int(holds.any(-1).sum())} of {mask.shape[1]}",
        }
    )
layers = pd.DataFrame(rows).set_index("layer")
layers.round(3)

# %%
global_layers = [layer for layer, mask in cache.masks().items() if mask.window is None]
shown = [(layer, 0) for layer in global_layers] + [(global_layers[-1] - 1, 0)]
panels = []
for layer, head in shown[:4]:
    pattern = cache["pattern", layer]
    kind = "global" if pattern.mask.window is None else f"window {pattern.mask.window}"
    panels.append((f"layer {layer}, head {head} ({kind})", pattern.mask, pattern.block_mass, head))
mask_figure(panels, f"{MODEL}, T = {tokens.shape[1]:,}, k = 16 of 64 × 64", spans=spans).show()

# %% [markdown]
# **What to look at.** With a constant `k`, late rows are sparse and early rows dense: the triangle at the top left is
# kept whole. The windowed layer is only a diagonal, and every route from the needle to the last token has to pass
# through the global layers (or hop along the window). Texts of more than 512 blocks are drawn by adding up neighbours.
#
# ## Keeping it
#
# One safetensors file holds masks, masses, tokens and the configuration. Circuits and plots work on the loaded file
# without the model.

# %%
path = Path(folder.name) / "run.safetensors"
cache.save(path)
loaded = sl.SparseActivationCache.load(path)
assert all(torch.equal(loaded["pattern", layer].mask.indices, mask.indices) for layer, mask in cache.masks().items())
assert torch.equal(loaded.info.tokens, tokens.cpu())
print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {loaded}")
try:
    loaded["pattern", 5].to_dense(rows=slice(0, 64))
except RuntimeError as error:
    print(type(error).__name__ + ":", error)

# %% [markdown]
# The error is the price of `keep_scores=False`: probabilities inside a block need queries and keys. Where they are
# wanted, run with them and `cache.save(path, scores=True)`; the second column of the first table says what that costs.
#
# ## On a GPU
#
# Nothing changes in the code. `load_model` takes the GPU where there is one, the search and the attention run as Triton
# kernels, and `stream-lens doctor` on the command line tells which path is live and why. Give bfloat16 to halve weights
# and activations. The same cell as above, for a machine that has one:

# %%
if torch.cuda.is_available():
    gpu_model = load(MODEL, n_ctx=TOKENS, **({} if load is sl.load_demo_model else {"dtype": torch.bfloat16}))
    torch.cuda.reset_peak_memory_stats()
    _, gpu_cache = sl.run_with_masks(gpu_model, tokens, CONFIG, keep_scores=False)
    print(f"peak on {torch.cuda.get_device_name()}: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
else:
    print("no GPU here, so nothing about GPUs was measured for this page.")

# %%
folder.cleanup()
