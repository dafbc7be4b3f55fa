from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from stream_lens.circuits.text_tokens import text_tokens
from stream_lens.cli import app
from stream_lens.demo_models import DEMO_MODELS, DemoModelError, demo_folder
from stream_lens.sweep import cell_name
from stream_lens.tasks.needle import NeedleCase, needle_case, score
from stream_lens.tasks.needle_study import needle_cells
from stream_lens.tasks.ruler import NOISE, TASKS

ESSAY = (
    "The harbour wakes before the town does. Nets dry on the rail, and a grey cat counts the gulls.\n\n"
    "Dr. Brandt says that v1.2.Next will never be released! Who would miss it? By noon the fog has gone, "
    "the ferry has come and left again, and nobody has asked where it goes. We mend what the night has torn.\n"
)
ESSAY_TASKS = sorted(task for task in TASKS if TASKS[task].haystack == "essay")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocab = {letter: number for number, letter in enumerate(["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or a run of punctuation."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


BYTES, WORDS = byte_tokenizer(), word_tokenizer()


@pytest.fixture(scope="module")
def essay(tmp_path_factory):
    path = tmp_path_factory.mktemp("essay") / "harbour.txt"
    path.write_text(ESSAY, encoding="utf-8")
    return path


def make(task: str, tokenizer, essay, **choices) -> NeedleCase:
    return needle_case(task, tokenizer, essay=essay if task in ESSAY_TASKS else None, **choices)


def context_of(case: NeedleCase) -> tuple[int, int]:
    return case.prompt.index("\n") + 1, case.question_span[0] - 1


def without_needles(case: NeedleCase) -> str:
    """The haystack alone, its separators seen as spaces."""
    start, stop = context_of(case)
    needles = sorted(case.needle_spans + case.distractor_spans)
    gaps = zip([start, *(b for _, b in needles)], [*(a for a, _ in needles), stop], strict=True)
    return " ".join(" ".join(case.prompt[a:b] for a, b in gaps).split())


def check(case: NeedleCase, tokenizer) -> None:
    kind = TASKS[case.task]
    assert case.n_tokens <= case.tokens
    assert text_tokens(case.prompt, tokenizer, prepend_bos=case.prepend_bos).n_tokens == case.n_tokens

    needles = [case.prompt[start:stop] for start, stop in case.needle_spans]
    values = [case.prompt[start:stop] for start, stop in case.value_spans]
    assert tuple(values) == case.answers
    assert len(case.keys) == kind.queries
    asked = [key for key in case.keys for _ in range(kind.values)]
    assert needles == [
        f"One of the special magic {kind.value} for {key} is: {value}."
        for key, value in zip(asked, values, strict=True)
    ]
    assert len(case.distractor_spans) == (kind.keys - kind.queries) * kind.values
    for start, stop in case.distractor_spans:
        assert re.fullmatch(rf"One of the special magic {kind.value} for \S.* is: \S+\.", case.prompt[start:stop])

    assert case.prompt.endswith(case.answer_prefix)
    assert case.question_span[1] == case.answer_prefix_span[0]
    assert case.prompt[case.question_span[0] - 1] == "\n"

    segments = case.segments(tokenizer)
    labels = sorted(
        [(span, "needle") for span in case.needle_spans]
        + [(span, "distractor") for span in case.distractor_spans]
        + [(case.question_span, "question"), (case.answer_prefix_span, "answer prefix")]
    )
    assert segments.char_spans == tuple(span for span, _ in labels)
    assert segments.labels == tuple(label for _, label in labels)
    assert segments.n_tokens == case.n_tokens
    assert segments.token_spans[-1][1] == case.n_tokens


@settings(deadline=None, max_examples=60)
@given(
    task=st.sampled_from(sorted(TASKS)),
    tokens=st.integers(800, 4000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    prepend_bos=st.booleans(),
)
def test_spans_lengths_and_segments(task, tokens, depth, seed, prepend_bos, essay):
    case = make(task, BYTES, essay, tokens=tokens + 400, depth=depth, seed=seed, prepend_bos=prepend_bos)
    check(case, BYTES)
    # One token a byte, so the tokens of each segment are its characters.
    segments = case.segments(BYTES)
    assert segments.token_spans == tuple((a + segments.n_bos, b + segments.n_bos) for a, b in segments.char_spans)


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("tokens", [300, 1000, 1003, 5000])
def test_the_length_is_met_to_the_last_unit_of_haystack(task, tokens, essay):
    case = make(task, WORDS, essay, tokens=tokens)
    check(case, WORDS)
    # The most that one more word (v1.2.Next) or one more needle costs.
    unit = 5
    if TASKS[task].haystack == "needle":
        unit = max(WORDS(case.prompt[a:b], return_length=True)["length"][0] for a, b in case.needle_spans) + 4
    if task != "multikey_3":  # a uuid is up to nine runs of letters and digits, each a token
        assert case.tokens - case.n_tokens < unit


@pytest.mark.parametrize("task", ["single_1", "single_2"])
def test_the_haystack_is_the_noise_or_the_essay_from_its_first_word(task, essay):
    case = make(task, WORDS, essay, tokens=700, depth=0.4)
    words = (NOISE if task == "single_1" else ESSAY).split()
    haystack = without_needles(case).split()
    assert len(haystack) > len(words)
    assert haystack == [words[i % len(words)] for i in range(len(haystack))]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_depth_moves_the_needle(task, essay):
    places = []
    for depth in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1):
        case = make(task, WORDS, essay, tokens=3000, depth=depth)
        start, stop = context_of(case)
        n_answers = len(case.answers)
        if depth == 0:
            assert case.needle_spans[0][0] == start
        if depth == 1:
            assert case.needle_spans[-1][1] == stop
        if n_answers == 1:
            # Distractors stand in the haystack too, so their share is left to the tolerance.
            assert (case.needle_spans[0][0] - start) / (stop - start) == pytest.approx(depth, abs=0.04)
        places.append(case.needle_spans[0][0])
    assert places == sorted(places)
    assert len(set(places)) == len(places)


def test_the_same_arguments_give_the_same_prompt_and_seeds_differ(essay):
    for task in sorted(TASKS):
        case = make(task, WORDS, essay, tokens=900, seed=3)
        assert case == make(task, WORDS, essay, tokens=900, seed=3)
        longer = make(task, WORDS, essay, tokens=1500, depth=0.9, seed=3)
        assert (longer.keys, longer.answers) == (case.keys, case.answers)
        assert make(task, WORDS, essay, tokens=900, seed=4).answers != case.answers


def ruler_prompt(kind, key_text: str, context: str) -> str:
    """RULER's own steps: its template, its replacements for one answer, then format."""
    template = (
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will "
        "quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} "
        "for {query} mentioned in the provided text? The special magic {type_needle_v} for {query} mentioned in the "
        "provided text are"
    )
    values = kind.value
    if kind.queries * kind.values == 1:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        values = values[:-1]
    return template.format(type_needle_v=values, context=context, query=key_text)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_wording_is_rulers(task, essay):
    case = make(task, WORDS, essay, tokens=600, seed=1)
    keys = list(case.keys)
    key_text = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    start, stop = context_of(case)
    assert case.prompt == ruler_prompt(TASKS[task], key_text, case.prompt[start:stop])


def test_keys_and_values_are_rulers_and_never_repeat(essay):
    case = make("multikey_2", WORDS, essay, tokens=6000)
    lines = case.prompt.split("\n")[1:-1]
    found = [re.fullmatch(r"One of the special magic numbers for (.+) is: (\d{7})\.", line) for line in lines]
    assert all(found)
    assert len({match[1] for match in found}) == len({match[2] for match in found}) == len(lines) > 300
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    case = make("multikey_3", WORDS, essay, tokens=2000)
    assert re.fullmatch(uuid, case.keys[0])
    assert re.fullmatch(uuid, case.answers[0])


def test_the_metric_is_rulers_string_match_all(essay):
    case = make("multivalue", WORDS, essay, tokens=600)
    assert score(case, " " + ", ".join(case.answers)).string_match_all == 100
    assert score(case, " " + ", ".join(case.answers)).found
    half = score(case, f" {case.answers[2]} and {case.answers[0]}.")
    assert (half.string_match_all, half.found) == (50, False)
    assert score(case, "").string_match_all == 0
    uuid = make("single_3", WORDS, essay, tokens=600)
    assert score(uuid, uuid.answers[0].upper()).found


def test_what_cannot_be_made_is_an_error(essay, tmp_path):
    with pytest.raises(ValueError, match=r"Unknown needle task 'single'.*multikey_1"):
        needle_case("single", WORDS, tokens=500)
    for depth in (-0.1, 1.5, 50, float("nan")):
        with pytest.raises(ValueError, match="depth must lie in 0"):
            needle_case("single_1", WORDS, tokens=500, depth=depth)
    with pytest.raises(ValueError, match="give essay= a text file"):
        needle_case("single_2", WORDS, tokens=500)
    with pytest.raises(ValueError, match="no effect"):
        needle_case("single_1", WORDS, tokens=500, essay=essay)
    with pytest.raises(ValueError, match=r"takes .* tokens without any haystack"):
        needle_case("single_1", WORDS, tokens=20)
    with pytest.raises(TypeError, match="not a number of tokens"):
        needle_case("single_1", WORDS, tokens=1e3)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no words"):
        needle_case("single_2", WORDS, tokens=500, essay=tmp_path / "empty.txt")
    with pytest.raises(TypeError, match="fast Hugging Face tokenizer"):
        needle_case("single_1", object(), tokens=500)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_shortest_prompt_has_no_haystack(task, essay):
    with pytest.raises(ValueError, match="without any haystack") as error:
        make(task, WORDS, essay, tokens=1)
    least = int(re.search(r"takes (\d+) tokens", str(error.value))[1])
    case = make(task, WORDS, essay, tokens=least)
    check(case, WORDS)
    assert case.n_tokens == least
    assert without_needles(case) == ""


def test_text_without_a_full_stop_and_a_long_text_split_as_they_go(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("word " * 3000 + "end. " + "More words follow here. " * 4000)
    case = needle_case("single_2", WORDS, tokens=6000, depth=1, essay=path)
    assert without_needles(case).split() == path.read_text().split()[: len(without_needles(case).split())]
    assert case.tokens - case.n_tokens < 3


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DEMO_MODELS))
def test_real_tokenizers(name, essay, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        tokenizer = AutoTokenizer.from_pretrained(demo_folder(DEMO_MODELS[name]))
    except DemoModelError as error:
        pytest.skip(str(error))
    for task in sorted(TASKS):
        for tokens, depth in ((512, 0.0), (1024, 0.3), (4096, 1.0)):
            case = make(task, tokenizer, essay, tokens=tokens + 256 * (task == "multiquery"), depth=depth)
            check(case, tokenizer)
            if TASKS[task].haystack != "needle":
                assert case.tokens - case.n_tokens <= 4
            ids = text_tokens(case.prompt, tokenizer).token_ids
            segments = case.segments(tokenizer)
            for text, (start, stop) in zip(segments.texts, segments.token_spans, strict=True):
                decoded = tokenizer.decode(ids[start:stop])
                # A token may hold the full stop and the line break after it.
                assert text.strip().rstrip(".?") in decoded
                assert len(decoded) <= len(text) + 2


def test_cells_of_the_command_name_their_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def note(loader: Any, cells: list[dict[str, Any]], *args: Any, **options: Any) -> None:
        seen.extend(cells)
        raise ValueError("enough")

    monkeypatch.setattr("stream_lens.sweep.sweep", note)
    for model in ("one", "another"):
        CliRunner().invoke(app, ["needle", "--model", model, "--out", str(tmp_path), "--k", "4", "--cases", "1"])
    names = {cell_name(cell) for cell in seen}
    assert len(names) == len(seen)
    assert {cell["model"] for cell in seen} == {"one", "another"}


def test_cells_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"selectors \['dense'\] are not known"):
        needle_cells([900], [0.5], [0], ks=[4], selectors=["dense"])
    with pytest.raises(ValueError, match=r"depths \[1.5\]"):
        needle_cells([900], [1.5], [0], ks=[4])
