# %% [markdown]
# # Scaling out: the same study on more machines
#
# **Question.** A study has many cells (length × depth × k × seed), and every cell is a run of its own. How do they
# spread over processes and machines, and what happens when a run is killed?
#
# `sweep` is joblib with a folder of results: processes on this machine by default, Ray or Dask when joblib is told so.
# Nothing in the study changes.

# %%
import os
import tempfile
from functools import partial
from pathlib import Path

import joblib

import stream_lens as sl
from stream_lens.sweep import sweep
from stream_lens.tasks.needle_study import needle_cells, needle_study, needle_table

try:
    import ray
    from ray.util.joblib import register_ray
except ImportError:
    ray = None

MODEL = "smollm2-135m"
SHORT = os.environ.get("STREAM_LENS_SHORT") == "1"  # set in CI: the same steps on less text
LENGTHS = (256,) if SHORT else (256, 512)
DEPTHS = (0.2,) if SHORT else (0.2, 0.8)
WORKERS = 2

# %% [markdown]
# ## The cells
#
# Plain dictionaries: anything that JSON can write. Each case once dense, and with two selectors at the same budget.

# %%
cells = needle_cells(LENGTHS, DEPTHS, seeds=[0], ks=[4], selectors=("stream", "window_sinks"))
print(len(cells), "cells; the first:", cells[0])

# %% [markdown]
# ## Two Ray workers
#
# Each worker loads the model once. On a cluster, `ray.init(address="auto")` is the only line that differs; finished
# cells travel back and the caller writes them, so workers need no common disk.

# %%
folder = tempfile.TemporaryDirectory()
out = Path(folder.name) / "needles"
loader = partial(sl.load_demo_model, MODEL)
study = partial(sweep, loader, study=needle_study, out=out, progress=False)
if ray is None:
    print("Ray is not installed (pip install 'stream-lens[ray]'): the same cells run in this process.")
    frame = study(cells)
else:
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    register_ray()
    with joblib.parallel_config(backend="ray", n_jobs=WORKERS):
        frame = study(cells, n_jobs=WORKERS)
    ray.shutdown()
frame[["length", "depth", "selector", "found", "answer", "needle_kept"]].round(2)

# %% [markdown]
# ## Killed? Run it again
#
# Every finished cell is a small file, named by its values. The same call again finds all of them and runs nothing; with
# more cells it runs the new ones only. Let one be missing:

# %%
files = sorted(out.glob("*.parquet"))
lost = files[0]
written = {path: path.stat().st_mtime_ns for path in files}
lost.unlink()
again = study(cells)  # without Ray this time: the results do not care who made them
assert len(again) == len(frame) == len(cells)
assert again.drop(columns="seconds").equals(frame.drop(columns="seconds"))
rerun = [path for path in files if path.stat().st_mtime_ns != written[path]]
print(f"{len(files)} files, {len(rerun)} run again")
assert rerun == [lost]

# %% [markdown]
# The cell that ran in this process gave the same answer and the same masks as the worker's.
#
# ## The result

# %%
table = needle_table(frame)
table.plot().show()
table.to_frame()[["length", "depth", "selector", "success", "n", "dense_failed", "pruned_causal"]].round(3)

# %% [markdown]
# **Reading.** One seed a cell: this page is about where cells run, not about needles. `n` is 1 at most, so every cell
# is all or nothing. For rates, raise `seeds`; the folder keeps what is there.
#
# **What this does not do.** It spreads *runs*. A single prompt that is too large for one device is another matter:
# there the model is sharded over devices, which accelerate does.

# %%
folder.cleanup()
