from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stream_lens.circuits.categories import CATEGORIES, label_by_keywords
from stream_lens.circuits.segmentation import by_regex, chat, paragraphs, sentences, spans, windows
from stream_lens.circuits.segments import Segments, make_segments
from stream_lens.circuits.sentence_splitter import sentence_spans
from stream_lens.circuits.text_tokens import text_tokens

LINES = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "I think it works. Wait, let me check: 3 + 4 = 7. I am sure.",
    "<think>\nOkay, so we need the sum.\n\nIt is 12.\n</think>\n\nThe answer is \\boxed{12}.",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level_bpe(*, trim_offsets: bool = False, adds_bos: bool = False, adds_eos: bool = False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos or adds_eos:
        single = f"{'<bos> ' if adds_bos else ''}$A{' <eos>' if adds_eos else ''}"
        steps.append(processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)]))
    tokenizer.post_processor = processors.Sequence(steps)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def metaspace_unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<bos>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


TOKENIZERS = {
    "plain": byte_level_bpe(),
    "trimmed": byte_level_bpe(trim_offsets=True),
    "adds bos and eos": byte_level_bpe(adds_bos=True, adds_eos=True),
    "metaspace": metaspace_unigram(),
}
TOKENIZER = TOKENIZERS["plain"]

tokenizer_names = st.sampled_from(sorted(TOKENIZERS))
pieces = st.sampled_from(
    [*"aI.?! \n\t", "  ", "\n\n", "é", "🙂", "世界", "♨", "Dr. ", "<think>", "</think>", "1. ", "\u3000", *LINES]
)
texts = st.lists(pieces | st.text(max_size=4), max_size=30).map("".join)


@settings(deadline=None)
@given(text=texts, name=tokenizer_names, prepend_bos=st.booleans())
def test_tokens_hold_every_character_in_order(text, name, prepend_bos):
    tokens = text_tokens(text, TOKENIZERS[name], prepend_bos=prepend_bos)
    assert (np.diff(tokens.starts) >= 0).all()
    assert (np.diff(tokens.stops) >= 0).all()
    if tokens.n_tokens > tokens.n_bos:
        begins, ends = tokens.starts[tokens.n_bos :], tokens.stops[tokens.n_bos :]
        assert begins[0] == 0
        assert ends[-1] == len(text)
        assert (begins[1:] <= ends[:-1]).all()


@settings(deadline=None)
@given(text=texts.filter(bool), name=tokenizer_names, data=st.data())
def test_characters_to_tokens_to_characters_keeps_the_span(text, name, data):
    tokens = text_tokens(text, TOKENIZERS[name])
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    first, last = tokens.token_span(start, stop)
    if start < stop and tokens.n_tokens > 1:
        begin, end = tokens.char_span(first, last)
        assert begin <= start
        assert stop <= end
        assert first >= 1
        # No token at either end could be left out.
        assert tokens.stops[first] > start
        assert tokens.starts[last - 1] < stop
    assert tokens.token_span(*tokens.char_span(first, last))[0] <= first


def test_a_token_boundary_comes_back_exactly():
    tokens = text_tokens(LINES[1], TOKENIZER)
    for i in range(1, tokens.n_tokens):
        assert tokens.token_span(*tokens.char_span(i, i + 1)) == (i, i + 1)


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("name", ["plain", "adds bos and eos"])
def test_exactly_one_bos_or_none_and_never_an_eos(name, prepend_bos):
    tokens = text_tokens(LINES[0], TOKENIZERS[name], prepend_bos=prepend_bos)
    plain = TOKENIZER(LINES[0], add_special_tokens=False)["input_ids"]
    assert tokens.token_ids.tolist() == [0] * prepend_bos + plain
    assert tokens.n_bos == prepend_bos


def test_check_names_the_first_difference():
    tokens = text_tokens(LINES[0], TOKENIZER)
    tokens.check(torch.tensor(tokens.token_ids)[None])
    with pytest.raises(ValueError, match="from position 5 on"):
        tokens.check(tokens.token_ids[:5])
    changed = tokens.token_ids.copy()
    changed[3] += 1
    with pytest.raises(ValueError, match="from position 3 on"):
        tokens.check(changed)
    with pytest.raises(ValueError, match="not one text"):
        tokens.check(torch.zeros(2, 4))


def test_tokenizers_that_cannot_serve_are_refused():
    with pytest.raises(TypeError, match="fast Hugging Face tokenizer"):
        sentences("a", object())
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    with pytest.raises(ValueError, match="no BOS"):
        text_tokens("a", bare)
    split_bos = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str()))
    split_bos._special_tokens_map["bos_token"] = "two words"
    with pytest.raises(ValueError, match="not one token"):
        text_tokens("a", split_bos)


@settings(deadline=None)
@given(text=texts, min_chars=st.sampled_from([0, 5, 10]))
def test_sentences_tile_the_text(text, min_chars):
    found = sentence_spans(text, min_chars=min_chars)
    assert "".join(text[a:b] for a, b in found) == text
    assert all(a < b for a, b in found)
    if len(found) > 1:
        assert all(len(text[a:b].strip()) >= min_chars for a, b in found)


def test_sentences_know_abbreviations_and_keep_spaces_with_the_earlier():
    text = "  Dr. Smith paid $3.50 at 5 p.m. today.\n\nIs it so?  Yes, x = 3.14. "
    assert sentences(text, TOKENIZER).texts == (
        "  Dr. Smith paid $3.50 at 5 p.m. today.\n\n",
        "Is it so?  ",
        "Yes, x = 3.14. ",
    )


def test_text_that_pysbd_drops_stays():
    text = "First one. a ♨ b. Then more. ∯ xx. The end."
    assert "".join(sentences(text, TOKENIZER).texts) == text


def test_short_sentences_merge_forward_and_the_last_one_backward():
    text = "No. Hm. This is a long sentence. Yes. Another long sentence. OK."
    assert sentences(text, TOKENIZER, min_chars=10).texts == (
        "No. Hm. This is a long sentence. ",
        "Yes. Another long sentence. OK.",
    )
    assert sentences("No. Hm.", TOKENIZER, min_chars=10).texts == ("No. Hm.",)


def test_a_long_text_splits_as_its_parts_do():
    one = "The cat sat on the mat. Dr. Smith saw it at 5 p.m. today. Was it so? "
    assert [b - a for a, b in sentence_spans(one * 400)] == [b - a for a, b in sentence_spans(one)] * 400


def test_a_text_without_any_sentence_end_still_ends():
    text = "x" * 100_000
    assert "".join(text[a:b] for a, b in sentence_spans(text)) == text


def test_think_only_leaves_the_rest_out():
    segments = sentences(LINES[2], TOKENIZER, think_only=True)
    assert "".join(segments.texts) == "\nOkay, so we need the sum.\n\nIt is 12.\n"
    outside = text_tokens(LINES[2], TOKENIZER).token_span(LINES[2].index("answer"), LINES[2].index("answer") + 6)
    assert [segments.of_token(i) for i in range(*outside)] == [None] * (outside[1] - outside[0])
    assert "".join(sentences("a<think>Cut. Off", TOKENIZER, think_only=True).texts) == "Cut. Off"
    with pytest.raises(ValueError, match="no <think>"):
        sentences("No tag.", TOKENIZER, think_only=True)


@settings(deadline=None)
@given(text=texts)
def test_paragraphs_tile_the_text(text):
    assert "".join(paragraphs(text, TOKENIZER).texts) == text


def test_paragraphs_part_at_blank_lines_only():
    assert paragraphs("\n\na\nb\n \n\nc\n\n", TOKENIZER).texts == ("\n\na\nb\n \n\n", "c\n\n")


@settings(deadline=None)
@given(text=texts, size=st.integers(1, 40), name=tokenizer_names, prepend_bos=st.booleans())
def test_windows_are_blocks_and_tile_the_text(text, size, name, prepend_bos):
    segments = windows(text, TOKENIZERS[name], tokens=size, prepend_bos=prepend_bos)
    if segments.n_tokens > segments.n_bos:
        assert "".join(segments.texts) == text
    overlap = segments.block_overlap(size).to_dense()
    assert ((overlap > 0).sum(0) <= 1).all()
    assert overlap.sum() == segments.n_tokens - segments.n_bos


@settings(deadline=None, max_examples=200)
@given(text=texts, name=tokenizer_names, prepend_bos=st.booleans(), data=st.data())
def test_every_token_belongs_where_most_of_its_characters_are(text, name, prepend_bos, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=12)))
    kept = [(a, b) for a, b in pairwise(cuts) if data.draw(st.booleans())]
    tokens = text_tokens(text, TOKENIZERS[name], prepend_bos=prepend_bos)
    segments = make_segments(tokens, kept, [str(j) for j in range(len(kept))])
    owner = [segments.of_token(i) for i in range(segments.n_tokens)]
    for j, (start, stop) in enumerate(segments.token_spans):
        assert [i for i in range(len(owner)) if owner[i] == j] == list(range(start, stop))
    for i in range(tokens.n_bos, tokens.n_tokens):
        held = range(int(tokens.starts[i]), int(tokens.stops[i]))
        if not held:
            continue
        counted = [c for c in held if not text[c].isspace()] or list(held)
        segment_of = {c: next((j for j, (a, b) in enumerate(kept) if a <= c < b), None) for c in counted}
        # Two stretches of text outside of all segments are two sides.
        side_of = {c: segment_of[c] if segment_of[c] is not None else f"gap {_gap(kept, c)}" for c in counted}
        best = max(dict.fromkeys(side_of.values()), key=list(side_of.values()).count)
        assert owner[i] == (best if isinstance(best, int) else None)


def _gap(kept, char):
    return sum(b <= char for a, b in kept if a < b)


def test_a_straddling_token_of_one_letter_goes_with_its_letter():
    text = "It works. I agree."
    segments = sentences(text, TOKENIZER)
    tokens = text_tokens(text, TOKENIZER)
    (letter, _) = tokens.token_span(text.index("I agree"), text.index("I agree") + 1)
    assert tokens.char_span(letter, letter + 1) == (9, 11)
    assert segments.char_spans[1] == (10, 18)
    assert segments.of_token(letter) == 1


@settings(deadline=None)
@given(text=texts, size=st.integers(1, 20), prepend_bos=st.booleans())
def test_block_overlap_counts_tokens(text, size, prepend_bos):
    segments = sentences(text, TOKENIZER, prepend_bos=prepend_bos)
    counted = torch.zeros(len(segments), segments.n_blocks(size))
    for i in range(segments.n_tokens):
        j = segments.of_token(i)
        if j is not None:
            counted[j, i // size] += 1
    overlap = segments.block_overlap(size)
    assert torch.equal(overlap.to_dense(), counted)
    assert overlap.coalesce().values().numel() <= len(segments) + segments.n_blocks(size)
    for b in range(segments.n_blocks(size)):
        assert list(segments.of_block(b, size)) == torch.nonzero(counted[:, b])[:, 0].tolist()


def test_a_segment_without_tokens_is_allowed_and_found_nowhere():
    text = "The grass is green."
    segments = spans(text, TOKENIZER, [(0, 1), (1, 2), (2, 19)])
    assert segments.token_span(1)[0] == segments.token_span(1)[1]
    assert 1 not in [segments.of_token(i) for i in range(segments.n_tokens)]
    assert segments.block_overlap(4).to_dense()[1].sum() == 0


def test_regex_labels_by_group_and_refuses_what_matches_nothing():
    segments = by_regex("a 12 b 345", TOKENIZER, r"(?P<number>\d+)|(?P<letter>b)")
    assert segments.labels == ("number", "letter", "number")
    assert segments.texts == ("12", "b", "345")
    assert by_regex("a 12", TOKENIZER, r"\d+").labels == ("match 0",)
    with pytest.raises(ValueError, match="matches nowhere"):
        by_regex("abc", TOKENIZER, r"\d")
    with pytest.raises(ValueError, match="empty text"):
        by_regex("abc", TOKENIZER, r"\d*")


def test_given_spans_are_checked():
    with pytest.raises(ValueError, match="without overlap"):
        spans("abcdef", TOKENIZER, [(3, 5), (0, 2)])
    with pytest.raises(ValueError, match="must lie in"):
        spans("abcdef", TOKENIZER, [(3, 9)])
    with pytest.raises(ValueError, match="as many labels"):
        spans("abcdef", TOKENIZER, [(0, 2)], labels=["a", "b"])


def test_chat_messages_are_found_even_when_a_role_is_named_alike():
    messages = [
        {"role": "user", "content": " user "},
        {"role": "assistant", "content": "user"},
        {"role": "user", "content": "Why?"},
    ]
    segments = chat(messages, TOKENIZER)
    assert segments.text.endswith("<|assistant|>\n")
    assert segments.labels == ("user", "assistant", "user")
    assert segments.texts == ("user", "user", "Why?")
    assert segments.char_spans[0][0] == len("<|user|>\n")
    assert segments.n_bos == 0


def test_a_rewritten_chat_message_is_an_error():
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }};{% endfor %}"
    with pytest.raises(ValueError, match=r"Message 0 \(user\)"):
        chat([{"role": "user", "content": "hello"}], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat([{"role": "user", "content": "hello"}], tokenizer)


@settings(deadline=None)
@given(text=texts)
def test_json_gives_back_equal_segments(text):
    segments = sentences(text, TOKENIZER)
    segments = segments.with_categories(label_by_keywords(segments.texts))
    assert Segments.from_json(segments.to_json()) == segments


@pytest.mark.parametrize("document", ["", "[]", "{}", json.dumps({"text": 3})])
def test_other_json_is_refused(document):
    with pytest.raises(ValueError, match="Not a Segments document"):
        Segments.from_json(document)


def test_frame_and_ranges():
    segments = sentences(LINES[0], TOKENIZER)
    frame = segments.to_frame()
    assert len(frame) == len(segments) == 5
    assert frame["tokens"].sum() == segments.n_tokens - 1
    assert "".join(frame["text"]) == LINES[0]
    with pytest.raises(IndexError, match="out of range"):
        segments.of_token(segments.n_tokens)
    with pytest.raises(IndexError, match="out of range"):
        segments.of_block(99, 8)
    with pytest.raises(ValueError, match="at least 1"):
        segments.block_overlap(0)
    with pytest.raises(ValueError, match="at least 1"):
        windows(LINES[0], TOKENIZER, tokens=0)


def test_keywords_label_plain_cases():
    labelled = {
        "Okay, so I need to find the number of bits.": "problem_setup",
        "Let me break it down step by step.": "plan_generation",
        "Each hexadecimal digit, I remember, stands for 4 bits.": "fact_retrieval",
        "6 * 16^4 = 393216.": "active_computation",
        "Wait, that can't be.": "uncertainty_management",
        "Therefore the binary number has 19 digits.": "result_consolidation",
        "Let me double-check the sum.": "self_checking",
        "So the final answer is \\boxed{19}.": "final_answer_emission",
        "Blue.": None,
    }
    assert label_by_keywords(labelled) == tuple(labelled.values())
    assert set(labelled.values()) - {None} == set(CATEGORIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_real_tokenizers_agree_with_to_tokens(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from stream_lens.models import DemoModelError, load_demo_model

    try:
        model = load_demo_model(name)
    except DemoModelError as error:
        pytest.skip(str(error))
    text = "".join(LINES) + " Ünïcode 🙂 世界 … and\ttabs.\n"
    for prepend_bos in (True, False):
        tokens = text_tokens(text, model.tokenizer, prepend_bos=prepend_bos)
        tokens.check(model.to_tokens(text, prepend_bos=prepend_bos))
        segments = sentences(text, model.tokenizer, prepend_bos=prepend_bos)
        assert "".join(segments.texts) == text
        assert sum(b - a for a, b in segments.token_spans) == segments.n_tokens - segments.n_bos
