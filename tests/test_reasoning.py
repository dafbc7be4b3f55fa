from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stream_lens.circuits.categories import CATEGORIES
from stream_lens.circuits.segmentation import sentences
from stream_lens.circuits.text_tokens import text_tokens
from stream_lens.demo_models import DEMO_MODELS, DemoModelError, demo_folder
from stream_lens.tasks.reasoning import ReasoningTrace, example_traces, read_jsonl, read_math_rollouts, write_jsonl


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocab = {letter: number for number, letter in enumerate(["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


BYTES = byte_tokenizer()
PROMPT = "Solve this. Problem: What is 3 + 4? Solution: \n<think>\n"
OUTPUT = "I need the sum.\n\n3 + 4 = 7. So it is 7.\nDone\n</think>\n\nThe answer is \\boxed{7}."
CHUNKS = ["I need the sum.", "3 + 4 = 7.", "So it is 7."]


@pytest.fixture
def lines(tmp_path):
    def write(*rows) -> object:
        path = tmp_path / "traces.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture
def rollouts(tmp_path):
    """Three problems in the layout of math-rollouts."""
    for kind, number in (("correct", 330), ("correct", 9), ("incorrect", 12)):
        folder = tmp_path / "some-model" / "temperature_0.6_top_p_0.95" / f"{kind}_base_solution" / f"problem_{number}"
        folder.mkdir(parents=True)
        problem = {"problem": "What is 3 + 4?", "level": "Level 1", "type": "Algebra", "gt_answer": "7"}
        solution = {"prompt": PROMPT, "solution": OUTPUT, "full_cot": PROMPT + OUTPUT, "answer": "7"}
        tags = [["problem_setup"], ["unknown", "active_computation", "self_checking"], ["unknown"]]
        labelled = [
            {"chunk": chunk, "chunk_idx": j, "function_tags": tags[j], "depends_on": []}
            for j, chunk in enumerate(CHUNKS)
        ]
        (folder / "problem.json").write_text(json.dumps(problem))
        (folder / "base_solution.json").write_text(json.dumps(solution))
        (folder / "chunks_labeled.json").write_text(json.dumps(labelled))
        (folder / "chunks.json").write_text(json.dumps({"source_text": "", "solution_text": "", "chunks": CHUNKS}))
    return tmp_path


def test_the_examples_are_whole_and_use_all_eight_categories():
    traces = example_traces()
    assert len(traces) >= 3
    for trace in traces:
        assert len(trace.sentences) >= 30
        assert set(trace.categories) == set(CATEGORIES)
        assert trace.categories[-1] == "final_answer_emission"
        # The labelled sentences are all of the reasoning.
        texts = [trace.text[start:stop] for start, stop in trace.sentence_spans]
        assert "".join(texts) == trace.reasoning
        assert [text.strip() for text in texts] == list(trace.sentences)
        # What the splitter finds without them is the same.
        assert replace(trace, sentences=None, categories=None).sentence_spans == trace.sentence_spans


def test_text_and_segments_of_a_trace_without_full_cot():
    trace = ReasoningTrace(
        "What is 3 + 4?", "\nIt is 3 + 4. That is 7.\n", "7", ("It is 3 + 4.", "That is 7."), (None, "x")
    )
    assert trace.text == "What is 3 + 4?\n\n<think>\nIt is 3 + 4. That is 7.\n</think>\n\n7"
    segments = trace.segments(BYTES)
    assert segments.text == trace.text
    assert segments.texts == ("It is 3 + 4. ", "That is 7.")
    assert segments.labels == ("sentence 0", "sentence 1")
    assert segments.categories == (None, "x")
    assert segments.token_spans == tuple((a + 1, b + 1) for a, b in segments.char_spans)
    outer = trace.segments(BYTES, with_problem_and_answer=True, prepend_bos=False)
    assert outer.labels == ("problem", "sentence 0", "sentence 1", "answer")
    assert outer.texts == ("What is 3 + 4?\n\n", "It is 3 + 4. ", "That is 7.", "\n\n7")
    assert outer.n_bos == 0
    assert replace(trace, answer="").text.endswith("</think>")
    assert replace(trace, answer="").segments(BYTES, with_problem_and_answer=True).labels[-1] == "sentence 1"


def test_without_sentences_the_think_span_is_split():
    trace = replace(example_traces()[0], sentences=None, categories=None)
    ours, general = trace.segments(BYTES), sentences(trace.text, BYTES, think_only=True, min_chars=10)
    assert [text.strip() for text in ours.texts] == [text.strip() for text in general.texts]
    assert set(ours.categories) == {None}


def test_full_cot_is_kept_to_the_letter(lines):
    (trace,) = read_jsonl(lines({"problem": "What is 3 + 4?", "full_cot": PROMPT + OUTPUT, "sentences": CHUNKS}))
    assert trace.text == PROMPT + OUTPUT
    assert trace.reasoning == OUTPUT.partition("\n</think>")[0]
    assert trace.answer == "The answer is \\boxed{7}."
    assert trace.source == "traces.jsonl, line 1"
    outer = trace.segments(BYTES, with_problem_and_answer=True)
    # The unfinished last words belong to no sentence.
    assert outer.texts[1:-1] == ("I need the sum.\n\n", "3 + 4 = 7. ", "So it is 7.")
    assert outer.texts[0] == PROMPT.removesuffix("<think>\n")
    assert outer.texts[-1].strip() == trace.answer


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"problem": "P?", "response": "<think>\nYes. No.\n</think>\nA."}, "P?\n\n<think>\nYes. No.\n</think>\nA."),
        ({"prompt": "P?", "solution": "Yes. No.\n</think>\nA."}, "P?\n\n<think>\nYes. No.\n</think>\nA."),
        ({"problem": "P?", "solution": "Yes. No."}, "P?\n\n<think>\nYes. No."),
        ({"prompt": "P?<think>\n", "response": "Yes. No.</think>A."}, "P?<think>\nYes. No.</think>A."),
        (
            {"problem": "P?", "prompt": "Say: P? <think>", "response": "<think>Yes. No.</think>A."},
            "Say: P? <think><think>Yes. No.</think>A.",
        ),
        (
            {"problem": "P?", "prompt": "Use <think> </think>. P?", "response": "<think>Yes. No.</think>A."},
            "Use <think> </think>. P?\n\n<think>Yes. No.</think>A.",
        ),
        ({"problem": "P?", "reasoning": "Yes. No.", "answer": "A."}, "P?\n\n<think>\nYes. No.\n</think>\n\nA."),
    ],
)
def test_the_fields_that_a_line_may_have(lines, row, text):
    (trace,) = read_jsonl(lines(row))
    assert trace.text == text
    assert trace.problem == "P?"
    assert trace.reasoning == "Yes. No."
    assert trace.answer == ("A." if text.endswith("A.") else "")
    start, stop = trace.reasoning_span
    assert trace.text[start:stop] == "Yes. No."
    labels = trace.segments(BYTES, with_problem_and_answer=True).labels
    assert labels == ("problem", "sentence 0", *(("answer",) if trace.answer else ()))


def test_numbers_as_answers_and_unknown_as_no_category(lines):
    row = {"problem": "P?", "reasoning": "Yes. No.", "sentences": ["Yes.", "No."], "categories": ["unknown", "mine"]}
    first, second = read_jsonl(lines({**row, "answer": 7}, "", {**row, "categories": None}))
    assert first.answer == "7"
    assert first.categories == (None, "mine")
    assert second.categories is None
    assert second.source == "traces.jsonl, line 3"


words = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=12)
filled = words.filter(str.strip)


@settings(deadline=None)
@given(
    problem=filled,
    parts=st.lists(filled, min_size=1, max_size=5),
    answer=words,
    source=words,
    labels=st.lists(st.sampled_from([None, *CATEGORIES]), min_size=5, max_size=5) | st.none(),
    split=st.booleans(),
    around=st.sampled_from([None, "{}", "<think>{}</think>", "a <think>\n\n{}  </think> b", "<think><think>{}"]),
)
def test_what_is_written_reads_back_equal(tmp_path_factory, problem, parts, answer, source, labels, split, around):
    reasoning = "\n".join(part.strip() for part in parts)
    trace = ReasoningTrace(
        problem=problem,
        reasoning=reasoning,
        answer=answer,
        sentences=tuple(parts) if split else None,
        categories=tuple(labels[: len(parts)]) if split and labels else None,
        source=source,
        full_cot=around.format(reasoning) if around and "<think>" in around else None,
    )
    path = tmp_path_factory.mktemp("round") / "trip.jsonl"
    write_jsonl([trace, trace], path)
    assert read_jsonl(path) == [trace, trace]


def test_the_examples_read_back_equal(tmp_path):
    write_jsonl(example_traces(), tmp_path / "copy.jsonl")
    assert read_jsonl(tmp_path / "copy.jsonl") == example_traces()


GOOD = {"problem": "P?", "reasoning": "Yes. No."}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "it is not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ({"reasoning": "Yes."}, "one of the fields problem, prompt; it has reasoning"),
        ({"problem": "P?"}, "one of the fields full_cot, reasoning, response, solution"),
        ({"problem": 3, "reasoning": "Yes."}, "field problem: it must be text that is not empty, got 3"),
        ({"problem": "P?", "reasoning": " "}, "field reasoning: it must be text that is not empty"),
        ({"problem": "P?", "full_cot": "No tags."}, "full_cot has no <think>"),
        ({"problem": "P?", "reasoning": "<think>Yes.</think>"}, "holds a <think> tag"),
        ({"problem": "P?", "response": "<think>\n</think> A."}, "reasoning is empty"),
        ({**GOOD, "answer": ["7"]}, "field answer: it must be text or a number, got list"),
        ({**GOOD, "sentences": "Yes."}, "field sentences: it must be a list of text."),
        ({**GOOD, "sentences": ["Yes.", None]}, "field sentences: it must be a list of text."),
        ({**GOOD, "sentences": ["Yes."], "categories": [1]}, "field categories: it must be a list of text or null"),
        ({**GOOD, "categories": ["x"]}, "give the sentences too"),
        ({**GOOD, "sentences": ["Yes.", "No."], "categories": ["x"]}, "2 sentences need as many categories"),
        ({**GOOD, "sentences": ["No.", "Yes."]}, "sentence 1 is not in the reasoning after sentence 0: 'Yes.'"),
        ({**GOOD, "sentences": [" "]}, "sentence 0 is empty"),
    ],
)
def test_a_bad_line_is_named(lines, row, complaint):
    path = lines(GOOD, "", row)
    with pytest.raises(ValueError, match=r"traces\.jsonl, line 3") as error:
        read_jsonl(path)
    assert complaint in str(error.value)


def test_a_file_without_traces_is_an_error(lines, tmp_path):
    with pytest.raises(ValueError, match="holds no trace"):
        read_jsonl(lines("", " "))
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "missing.jsonl")


def test_a_trace_around_another_reasoning_is_an_error():
    with pytest.raises(ValueError, match="does not hold this reasoning"):
        ReasoningTrace("P?", "Yes.", full_cot="P? <think>No.</think>")
    with pytest.raises(ValueError, match="problem is empty"):
        ReasoningTrace(" ", "Yes.")


def test_math_rollouts_are_read_from_any_level(rollouts):
    traces = read_math_rollouts(rollouts)
    assert [trace.source.split("/")[-2:] for trace in traces] == [
        ["correct_base_solution", "problem_9"],
        ["correct_base_solution", "problem_330"],
        ["incorrect_base_solution", "problem_12"],
    ]
    trace = traces[0]
    assert trace.text == PROMPT + OUTPUT
    assert trace.problem == "What is 3 + 4?"
    assert trace.answer == "7"
    assert trace.sentences == tuple(CHUNKS)
    assert trace.categories == ("problem_setup", "active_computation", None)
    assert trace.segments(BYTES).texts == ("I need the sum.\n\n", "3 + 4 = 7. ", "So it is 7.")
    problem = rollouts / trace.source
    assert len(read_math_rollouts(problem.parent)) == 2
    (alone,) = read_math_rollouts(problem)
    assert alone == replace(trace, source="problem_9")


def test_math_rollouts_without_labels_or_chunks(rollouts):
    (problem,) = rollouts.rglob("problem_12")
    (problem / "chunks_labeled.json").unlink()
    (trace,) = read_math_rollouts(problem)
    assert (trace.sentences, trace.categories) == (tuple(CHUNKS), None)
    (problem / "chunks.json").unlink()
    (trace,) = read_math_rollouts(problem)
    assert trace.sentences is None
    assert len(trace.segments(BYTES)) >= 3


@pytest.mark.parametrize(
    ("file", "document", "complaint"),
    [
        ("problem.json", "{", "it is not JSON"),
        ("problem.json", {"gt_answer": "7"}, "field problem: it is missing"),
        ("base_solution.json", {"solution": OUTPUT}, "field full_cot: it is missing"),
        ("base_solution.json", {"full_cot": OUTPUT}, "full_cot has no <think>"),
        ("chunks_labeled.json", {"0": {}}, "must be a list of objects"),
        ("chunks_labeled.json", [{"chunk_idx": 0}], "chunk 0, field chunk: it is missing"),
        ("chunks_labeled.json", [{"chunk": "3 + 4 = 7.", "function_tags": "x"}], "chunk 0, field function_tags"),
        ("chunks_labeled.json", [{"chunk": "Not there."}], "sentence 0 is not in the reasoning there: 'Not there.'"),
    ],
)
def test_a_bad_rollout_file_is_named(rollouts, file, document, complaint):
    (problem,) = rollouts.rglob("problem_9")
    (problem / file).write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match="problem_9") as error:
        read_math_rollouts(rollouts)
    assert complaint in str(error.value)


def test_a_folder_of_something_else_is_an_error(tmp_path, rollouts):
    (tmp_path / "else").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No base_solution\.json"):
        read_math_rollouts(tmp_path / "else")
    (problem,) = rollouts.rglob("problem_9")
    (problem / "problem.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"problem\.json"):
        read_math_rollouts(problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DEMO_MODELS))
def test_real_tokenizers(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        tokenizer = AutoTokenizer.from_pretrained(demo_folder(DEMO_MODELS[name]))
    except DemoModelError as error:
        pytest.skip(str(error))
    for trace in example_traces():
        ids = text_tokens(trace.text, tokenizer).token_ids
        segments = trace.segments(tokenizer, with_problem_and_answer=True)
        assert segments.n_tokens == len(ids)
        for text, (start, stop) in zip(segments.texts, segments.token_spans, strict=True):
            assert text.strip().rstrip(".?") in tokenizer.decode(ids[start:stop])
