"""The needle study: does a model find a needle, dense and with each selector at the same budget, and what was kept?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from stream_lens.backend import SparsePattern, install
from stream_lens.blocks import SELECTORS, FractionOfPrefix, StreamConfig
from stream_lens.circuits.reruns import CONTROLS, DENSE
from stream_lens.tasks.answering import answer
from stream_lens.tasks.needle import needle_case, score


def needle_cells(
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: Sequence[int],
    *,
    ks: Sequence[int] = (),
    fractions: Sequence[float] = (),
    selectors: Sequence[str] = ("stream", *CONTROLS),
    task: str = "single_1",
    q_block: int = 32,
    k_block: int = 32,
) -> list[dict[str, Any]]:
    """Cells for `sweep`: the dense run of every case, and every selector at every budget.

    `ks` are blocks kept for each query block, `fractions` shares of its prefix. `ValueError` without either, for a
    selector that is not known, or a depth outside 0 to 1.
    """
    unknown = [name for name in selectors if name not in SELECTORS]
    if unknown:
        raise ValueError(f"selectors {unknown} are not known: choose from {', '.join(SELECTORS)}; dense always runs.")
    outside = [depth for depth in depths if not 0 <= depth <= 1]
    if outside:
        raise ValueError(f"depths {outside} are not allowed: 0 is the beginning of the text, 1 its end.")
    budgets: list[dict[str, Any]] = [{"k": k, "fraction": None} for k in ks]
    budgets += [{"k": None, "fraction": fraction} for fraction in fractions]
    if not budgets:
        raise ValueError("give at least one budget: ks or fractions.")
    cells = []
    for length in lengths:
        for depth in depths:
            for seed in seeds:
                case = {"task": task, "length": length, "depth": depth, "seed": seed}
                cells.append({**case, "selector": DENSE, "k": None, "fraction": None, "q_block": None, "k_block": None})
                cells += [
                    {**case, "selector": selector, **budget, "q_block": q_block, "k_block": k_block}
                    for budget in budgets
                    for selector in selectors
                ]
    return cells


def needle_study(model: Any, cell: Mapping[str, Any]) -> dict[str, Any]:
    """One case at one setting. A study for `sweep`.

    Gives `found`, RULER's `string_match_all` (percent), the answer, `seconds`, and for sparse runs the mean pruned
    shares over all layers (`pruned_causal`, `pruned_visible`), over layers without a window (`pruned_global`), and
    `needle_kept`: the share of those layers' heads that keep the needle for the last query block of the prompt.
    """
    case = needle_case(cell["task"], model.tokenizer, tokens=cell["length"], depth=cell["depth"], seed=cell["seed"])
    start = time.perf_counter()
    if cell["selector"] == DENSE:
        text, kept = answer(model, case), {}
    else:
        k = cell["k"] if cell["fraction"] is None else FractionOfPrefix(cell["fraction"])
        config = StreamConfig(
            k=k, selector=cell["selector"], q_block=cell["q_block"], k_block=cell["k_block"], seed=cell["seed"]
        )
        streamed = install(model, config)
        try:
            watch = _Prompt()
            names = [f"blocks.{layer}.attn.hook_pattern" for layer in streamed.layers]
            with model.hooks(fwd_hooks=[(name, watch.see) for name in names]):
                text = answer(model, case)
        finally:
            streamed.uninstall()
        segments = case.segments(model.tokenizer)
        kept = watch.kept(segments.token_spans[segments.labels.index("needle")])
    result = score(case, text)
    return {
        "found": result.found,
        "string_match_all": result.string_match_all,
        "answer": text,
        "seconds": time.perf_counter() - start,
        "n_tokens": case.n_tokens,
        **kept,
    }


class _Prompt:
    """Masks of the prompt's forward; the decode steps after it are left out."""

    def __init__(self) -> None:
        self.masks: dict[str, Any] = {}

    def see(self, pattern: Any, hook: Any) -> None:
        if isinstance(pattern, SparsePattern):
            self.masks.setdefault(hook.name, pattern.mask)

    def kept(self, needle: tuple[int, int]) -> dict[str, float]:
        rows = []
        for mask in self.masks.values():
            last = mask.indices[:, :, -1]
            holds = (last >= needle[0] // mask.k_block) & (last <= (needle[1] - 1) // mask.k_block)
            rows.append(
                {
                    "window": mask.window or 0,
                    "causal": mask.sparsity("causal"),
                    "visible": mask.sparsity("visible"),
                    "needle": float(holds.any(-1).float().mean()),
                }
            )
        frame = pd.DataFrame(rows)
        whole = frame[frame.window == 0]
        whole = frame if whole.empty else whole
        return {
            "pruned_causal": float(frame.causal.mean()),
            "pruned_visible": float(frame.visible.mean()),
            "pruned_global": float(whole.causal.mean()),
            "needle_kept": float(whole.needle.mean()),
        }


@dataclass(frozen=True, eq=False)
class NeedleTable:
    """Success rates of a sweep over `needle_cells`.

    Attributes:
        rows: one a length, depth, selector and budget: `success` (share of `n` cases), `n` (cases that dense answers),
            `dense_failed` (cases left out since dense fails them too), `successes_all` and `n_all` (with those),
            and the mean pruned shares.
    """

    rows: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        return self.rows

    def to_json(self) -> str:
        """Records, as JSON."""
        return self.rows.to_json(orient="records")

    def overall(self) -> pd.DataFrame:
        """The same over all lengths and depths."""
        keys = ["selector", "k", "fraction"]
        summed = self.rows.assign(hits=self.rows.success.fillna(0) * self.rows.n).groupby(
            keys, dropna=False, sort=False
        )
        frame = summed[["hits", "n", "dense_failed", "successes_all", "n_all"]].sum().reset_index()
        frame["success"] = frame.hits / frame.n.where(frame.n > 0)
        means = summed[["pruned_causal", "pruned_global", "needle_kept"]].mean().reset_index()
        return frame.drop(columns="hits").merge(means, on=keys)

    def plot(self, **options: Any) -> Any:
        """Success by length and depth, one panel a selector and budget, n in every cell."""
        from stream_lens.plots import needle_heatmap

        return needle_heatmap(self, **options)


def needle_table(frame: pd.DataFrame) -> NeedleTable:
    """Summarise a sweep's frame. Cases that dense fails are left out of `success` and counted.

    Raises ValueError if the frame has no dense runs: then nothing tells a pruned failure from the model's own.
    """
    case = ["task", "length", "depth", "seed"]
    dense = frame[frame.selector == DENSE][[*case, "found"]].rename(columns={"found": "dense_found"})
    if dense.empty:
        raise ValueError("the frame has no dense runs: make its cells with needle_cells.")
    sparse = frame[frame.selector != DENSE].merge(dense, on=case)
    keys = ["length", "depth", "selector", "k", "fraction"]
    rows = []
    for values, part in sparse.groupby(keys, dropna=False, sort=False):
        answered = part[part.dense_found.astype(bool)]
        rows.append(
            {
                **dict(zip(keys, values, strict=True)),
                "success": answered.found.astype(float).mean() if len(answered) else float("nan"),
                "n": len(answered),
                "dense_failed": len(part) - len(answered),
                "successes_all": int(part.found.sum()),
                "n_all": len(part),
                **{
                    name: part[name].mean()
                    for name in ("pruned_causal", "pruned_visible", "pruned_global", "needle_kept")
                },
            }
        )
    return NeedleTable(pd.DataFrame(rows))
