"""trace and its command: what is reported equals what the masks say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import stream_lens as sl
from stream_lens.cli import app
from stream_lens.cli.options import decimals, numbers
from stream_lens.trace import trace

sys.path.insert(0, str(Path(__file__).parent / "backend"))
from tiny_models import VOCAB, WINDOW, tiny_bridge

from tests.browser import opened


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_bridge("MistralForCausalLM")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, 120), generator=torch.Generator().manual_seed(0))


def test_frame_says_what_the_masks_say(model: Any, tokens: torch.Tensor) -> None:
    result = trace(model, tokens, q_block=8, k_block=8, k=3, answer_tokens=2, spans={"needle": (16, 24)})
    frame = result.to_frame()
    assert frame.layer.tolist() == [0, 1, 2]
    assert frame.window.tolist() == [WINDOW] * 3
    for layer, pattern in result.cache.patterns().items():
        dense = pattern.mask.to_dense()
        kept = int(pattern.mask.kept.sum())
        row = frame[frame.layer == layer].iloc[0]
        assert row.pruned_full == pytest.approx(1 - kept / (4 * 15 * 15))
        assert row.dense_bytes == dense.numel() * 4
        assert row.heads_keeping_needle == int(dense[0, :, 119, 16:24].any(-1).sum())
    assert set(result.seconds) == {"sparse run with cache", "sparse answer", "dense answer"}
    assert result.n_tokens == 120
    assert not sl.is_streamed(model)


def test_all_blocks_kept_answers_as_dense(model: Any, tokens: torch.Tensor) -> None:
    result = trace(model, tokens, q_block=8, k_block=8, k=20, answer_tokens=4)
    assert result.sparse_answer == result.dense_answer


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"tokens": "a text"}, TypeError, "takes token ids"),
        ({"tokens": torch.full((2, 9), 5)}, ValueError, "one text; got 2"),
        ({"answer_tokens": 0}, ValueError, "answer_tokens=0"),
    ],
)
def test_what_cannot_be_traced(
    model: Any, tokens: torch.Tensor, given: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        trace(model, **{"tokens": tokens, **given})


def test_answers_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from stream_lens.cli.frames import plain_console, print_frame

    print_frame(plain_console(), "[/a] title", pd.DataFrame({"answer": ["see [note] [/INST]"]}))
    printed = capsys.readouterr().out
    assert "[/a] title" in printed
    assert "see [note] [/INST]" in printed


def test_dense_is_left_out_on_request(model: Any, tokens: torch.Tensor) -> None:
    result = trace(model, tokens, k=3, q_block=8, k_block=8, answer_tokens=1, dense=False)
    assert result.dense_answer is None
    assert "dense answer" not in result.seconds


def test_picture_shows_the_heads_that_attend_to_the_span(model: Any, tokens: torch.Tensor) -> None:
    result = trace(model, tokens, q_block=8, k_block=8, k=4, answer_tokens=1, spans={"needle": (100, 108)})
    layer, head = result.interesting_heads(1)[0]
    shares = {
        (number, h): float(pattern.to_dense(rows=slice(112, 120))[0, h, :, 96:112].sum())
        for number, pattern in result.cache.patterns().items()
        for h in range(4)
    }
    assert shares[layer, head] == pytest.approx(max(shares.values()), rel=1e-4)
    figure = result.plot()
    assert "T = 120" in figure.layout.title.text
    assert "k = 4" in figure.layout.title.text
    assert len(figure.data) == 4


@pytest.fixture
def options(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the command, for 150 words of text."""
    monkeypatch.setattr("stream_lens.cli.inputs.load", lambda *args, **kwargs: model)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{3 + n % 90}" for n in range(150)))
    sizes = ["--k", "4", "--q-block", "8", "--k-block", "8", "--answer-tokens", "2"]
    return ["trace", "--text", str(text), *sizes, "--out", str(tmp_path)]


def test_command(options: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache.safetensors"
    result = CliRunner().invoke(app, [*options, "--save-cache", str(cache)])
    assert result.exit_code == 0, result.output
    assert "Greedy answers" in result.output
    assert f"window of {WINDOW}" in result.output
    assert (tmp_path / "trace.html").stat().st_size > 1e6
    assert list(sl.SparseActivationCache.load(cache).patterns()) == [0, 1, 2]


def test_report_of_the_command(options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "pages" / "report.html"
    result = CliRunner().invoke(app, [*options, "--report", str(file)])
    assert result.exit_code == 0, result.output
    assert f"Report: {file}" in result.output
    assert "http" not in file.read_text(encoding="utf-8")
    with opened(file) as (page, problems):
        assert page.evaluate("data.layers.map((layer) => layer.layer)") == [0, 1, 2]
        words = page.evaluate("words.map((word) => word.textContent.trim())")
        assert words[-150:] == [f"t{3 + n % 90}" for n in range(150)]
        page.click("button[data-head='1.3']")
        assert "layer 1, head 3: k = 4, blocks of 8 × 8" in page.inner_text("#name")
        assert problems == []


@pytest.mark.parametrize(
    "command", [[], ["trace"], ["needle"], ["doctor"], ["minimal-k"], ["receivers"], ["diff"], ["routes"]]
)
def test_help_teaches(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_bad_options_get_a_sentence(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_lens.cli.inputs.load", lambda *args, **kwargs: model)
    missing = CliRunner().invoke(app, ["trace", "--text", str(tmp_path / "nothing.txt")])
    assert "is not a file" in str(missing.exception)
    long = tmp_path / "long.txt"
    long.write_text(" ".join(["t5"] * 600))
    assert "context is 512" in str(CliRunner().invoke(app, ["trace", "--text", str(long)]).exception)
    short = tmp_path / "short.txt"
    short.write_text(" ".join(["t5"] * 60))
    wrong = CliRunner().invoke(app, ["trace", "--text", str(short), "--layers", "7"])
    assert "layers [7] do not exist" in str(wrong.exception)


def test_lists_of_numbers() -> None:
    assert numbers("5,11,17") == (5, 11, 17)
    assert numbers("0-3, 7") == (0, 1, 2, 3, 7)
    assert decimals("0.1,0.5") == (0.1, 0.5)
    with pytest.raises(ValueError, match="no list of numbers"):
        numbers("five")
    with pytest.raises(ValueError, match="no list of numbers"):
        numbers("5-3")
    with pytest.raises(ValueError, match="no list of numbers"):
        decimals("0.1;0.2")
