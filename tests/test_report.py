"""The report: one page that works without a network, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stream_lens.backend.pattern import SparsePattern
from stream_lens.backend.pattern_data import MassCell, PatternData
from stream_lens.backend.sparse_cache import RunInfo, SparseActivationCache
from stream_lens.blocks import BlockMask
from stream_lens.report import write_report
from stream_lens.trace import Trace

CHROMIUM = Path("/usr/bin/chromium")
SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


class Words:
    """A tokenizer whose fifth token would end a script."""

    def decode(self, ids: list[int]) -> str:
        return "".join("</script><b>" if token == 5 else f" w{token}" for token in ids)


def trace_of(tokens: int = 64, heads: int = 2, k: int = 3, block: int = 8) -> Trace:
    blocks = -(-tokens // block)
    row = torch.arange(blocks)[:, None]
    indices = torch.cat([torch.zeros_like(row), row - 1, row], -1)
    indices[0], indices[1] = torch.tensor([0, -1, -1]), torch.tensor([0, 1, -1])
    mask = BlockMask(indices.int().expand(1, heads, -1, -1).contiguous(), block, block, tokens, tokens).check()
    mass = torch.where(mask.kept, block / k, 0.0)
    cached = {}
    for layer in (2, 5):
        data = PatternData(
            mask=mask,
            gate=None,
            cell=MassCell(mask, mass),
            cell_rows=([0], list(range(heads)), 0),
            sources=(None,),
            present=(0, 1, 2, 3),
            dtype=torch.float32,
            edited=False,
            layer=layer,
        )
        cached[f"blocks.{layer}.attn.hook_pattern"] = SparsePattern(data)
    info = RunInfo("<model>", None, tokens=torch.arange(tokens)[None])
    cache = SparseActivationCache(cached, None, info=info)
    return Trace(cache, "yes", None, None, {"needle": (16, 20)})


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    page = write_report(trace_of(), tmp_path / "new" / "report.html", Words()).read_text(encoding="utf-8")
    assert "&lt;model&gt;" in page
    assert "</script><b>" not in page
    assert "http" not in page
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]


def test_no_tokens_no_report(tmp_path: Path) -> None:
    trace = trace_of()
    trace.cache.info = RunInfo("m", None)
    with pytest.raises(ValueError, match="needs token ids"):
        write_report(trace, tmp_path / "report.html", Words())


def test_a_browser_picks_heads_and_lights_text(tmp_path: Path) -> None:
    page, close, problems = _opened(write_report(trace_of(), tmp_path / "report.html", Words()))
    try:
        page.click("button[data-head='5.1']")
        assert "layer 5, head 1" in page.inner_text("#name")
        assert page.evaluate("shown.cells.filter((cell) => cell > 0).length") == 1 + 2 + 6 * 3
        box = page.locator("#mask").bounding_box()
        page.mouse.move(box["x"] + 641 * 3.5 / 8, box["y"] + 641 * 6.5 / 8)
        lit = page.evaluate("words.flatMap((w, t) => w.classList.contains('query') ? [t] : [])")
        assert lit == list(range(48, 56))
        lit = page.evaluate("words.flatMap((w, t) => w.classList.contains('key') ? [t] : [])")
        assert lit == list(range(24, 32))
        assert "dropped" in page.inner_text("#about")
        assert page.evaluate("words[5].textContent") == "</script><b>"
        assert page.locator("#text .mark").count() == 4
        assert problems == []
    finally:
        close()


def test_long_texts_open(tmp_path: Path) -> None:
    file = write_report(trace_of(32_768, block=32), tmp_path / "report.html", Words())
    assert file.stat().st_size < 5_000_000
    page, close, problems = _opened(file)
    try:
        assert page.evaluate("words.length") == 32_768
        assert page.evaluate("shown.cells.some((cell) => cell > 0)")
        assert problems == []
    finally:
        close()


def _opened(file: Path) -> tuple[Any, Any, list[str]]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}")
    running = playwright.sync_playwright().start()
    browser = running.chromium.launch(executable_path=str(CHROMIUM), args=list(SWITCHES))
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(file.as_uri())

    def close() -> None:
        browser.close()
        running.stop()

    return page, close, problems
