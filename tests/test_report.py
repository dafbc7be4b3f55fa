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
from tests.browser import opened


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


def lit(page: Any, name: str) -> list[int]:
    return page.evaluate(f"words.flatMap((w, t) => w.classList.contains('{name}') ? [t] : [])")


def point_at(page: Any, row: int, column: int, *, click: bool = False) -> None:
    """With 8 query blocks and 8 key blocks."""
    box = page.locator("#mask").bounding_box()
    at = box["x"] + 641 * (column + 0.5) / 8, box["y"] + 641 * (row + 0.5) / 8
    if click:
        page.mouse.click(*at)
    else:
        page.mouse.move(*at)


def test_a_browser_picks_heads_and_lights_text(tmp_path: Path) -> None:
    with opened(write_report(trace_of(), tmp_path / "report.html", Words())) as (page, problems):
        page.click("button[data-head='5.1']")
        assert "layer 5, head 1" in page.inner_text("#name")
        assert page.evaluate("shown.cells.filter((cell) => cell > 0).length") == 1 + 2 + 6 * 3
        point_at(page, 6, 3)
        assert lit(page, "query") == list(range(48, 56))
        assert lit(page, "key") == list(range(24, 32))
        assert "dropped" in page.inner_text("#about")
        point_at(page, 6, 5)
        assert lit(page, "key") == list(range(40, 48))
        assert "query block 6 (tokens 48 to 55), key block 5 (tokens 40 to 47)" in page.inner_text("#about")
        share = page.inner_text("#about").partition("share of a query's attention: about ")[2]
        assert float(share) == pytest.approx(1 / 3, rel=0.03)  # stored as one of 254 levels over four decades
        assert page.evaluate("words[5].textContent") == "</script><b>"
        assert page.locator("#text .mark").count() == 4
        assert problems == []


def test_a_held_block_marks_the_heads_that_keep_it(tmp_path: Path) -> None:
    trace = trace_of()
    pattern = trace.cache.patterns()[5]
    kept = pattern.mask.kept.clone()
    kept[0, 1, 6, 1] = False  # layer 5, head 1 without key block 5
    own = pattern.mask.where(kept)
    data = PatternData(own, None, MassCell(own, pattern.block_mass), ([0], [0, 1], 0), (None,), layer=5)
    trace.cache.cache_dict["blocks.5.attn.hook_pattern"] = SparsePattern(data)
    with opened(write_report(trace, tmp_path / "report.html", Words())) as (page, problems):
        point_at(page, 6, 5, click=True)
        green = page.evaluate("[...document.querySelectorAll('#heads .keeps')].map((b) => b.dataset.head)")
        assert sorted(green) == ["2.0", "2.1", "5.0"]
        assert page.inner_text("#about").endswith("kept by 3 of 4 heads")
        point_at(page, 2, 1)  # held: pointing elsewhere changes nothing
        assert lit(page, "key") == list(range(40, 48))
        page.click("#to-query")
        point_at(page, 6, 5, click=True)
        assert page.locator("#heads .keeps").count() == 0
        assert problems == []


def test_a_word_shows_what_its_query_block_keeps(tmp_path: Path) -> None:
    with opened(write_report(trace_of(), tmp_path / "report.html", Words())) as (page, problems):
        page.click("#text span >> nth=50")
        assert lit(page, "query") == list(range(48, 56))
        assert lit(page, "key") == [*range(8), *range(40, 56)]
        assert "query block 6 (tokens 48 to 55) keeps 3 key blocks: 0, 5, 6" in page.inner_text("#about")
        assert page.locator("#row").is_visible()
        assert problems == []


def test_address_grid_and_table_show_one_head(tmp_path: Path) -> None:
    with opened(write_report(trace_of(), tmp_path / "report.html", Words())) as (page, problems):
        page.click("#table tbody tr >> nth=1")
        assert page.url.endswith("#5.0")
        page.click("button[data-head='2.1']")
        assert page.url.endswith("#2.1")
        page.evaluate("location.hash = '5.1'")
        page.wait_for_function("document.getElementById('name').textContent.includes('layer 5, head 1')")
        assert page.locator("#heads .on").get_attribute("data-head") == "5.1"
        assert page.locator("#table .on").inner_text().startswith("5")
        page.wait_for_function(
            "[...document.querySelectorAll('#heads canvas')].every((small) =>"
            " small.getContext('2d').getImageData(0, 0, 40, 40).data.some((value) => value > 0))"
        )
        assert problems == []


def test_long_texts_open(tmp_path: Path) -> None:
    file = write_report(trace_of(32_768, block=32), tmp_path / "report.html", Words())
    assert file.stat().st_size < 5_000_000
    with opened(file) as (page, problems):
        assert page.evaluate("words.length") == 32_768
        assert page.evaluate("shown.cells.some((cell) => cell > 0)")
        assert problems == []
