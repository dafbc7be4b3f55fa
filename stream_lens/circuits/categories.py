"""Thought Anchors' eight sentence categories, and a labeller of a few keywords."""

from __future__ import annotations

import re
from collections.abc import Iterable

CATEGORIES: tuple[str, ...] = (
    "problem_setup",
    "plan_generation",
    "fact_retrieval",
    "active_computation",
    "uncertainty_management",
    "result_consolidation",
    "self_checking",
    "final_answer_emission",
)

# The first rule that matches names the sentence, so the rarer and surer signs stand first.
_RULES: tuple[tuple[str, str], ...] = (
    ("final_answer_emission", r"\\boxed|\bfinal answers?\b|\bthe answer (is|should be|must be)\b"),
    (
        "self_checking",
        r"\b(double|re)-?check|\b(let me|let's|to) (just )?(check|verify|confirm)|\bverif(y|ies|ied|ying)\b"
        r"|\bplug(ging)? .*\bback\b|\bmake sure\b|\bsanity check|\bchecks out\b",
    ),
    (
        "uncertainty_management",
        r"^\W*(wait|hmm+|hold on|but wait|alternatively|actually|maybe|perhaps)\b|\bnot (entirely |quite )?sure\b"
        r"|\bconfus(ed|ing)\b|\bi (might|may) (have|be)\b|\bmistaken?\b|\bdoesn't (seem|look|make)\b|\bis that right\b",
    ),
    (
        "problem_setup",
        r"\b(the|this) (problem|question) (is|says|asks|states|gives|wants)\b"
        r"|\b(we are|we're|i am|i'm) (given|asked|told)\b"
        r"|\b(i|we) (need|have) to (find|figure out|determine|compute|solve)\b"
        r"|\bgiven that\b|\btrying to (find|solve)\b",
    ),
    (
        "fact_retrieval",
        r"\b(recall|remember|i know|we know|known)\b|\b(formula|theorem|identity|definition|by definition|property)\b"
        r"|\b(is|are) defined (as|by)\b",
    ),
    (
        "result_consolidation",
        r"^\W*(therefore|thus|hence|overall|altogether|in (summary|total|conclusion)|to (summarize|sum up))\b"
        r"|^\W*so,? (the|all|in total|that means|we (have|get|found))\b"
        r"|\bputting (it|this|that|these|all) .*together\b",
    ),
    (
        "plan_generation",
        r"\b(let me|let's|let us)\b"
        r"|\b(i|we)('ll| will| should| can| could) (start|try|use|first|need|begin|now|set|consider)\b"
        r"|^\W*(first|next|then|now)\b.*\b(i|we|let)\b|\b(approach|strategy|plan|method|idea) (is|would|will|to)\b",
    ),
    ("active_computation", r"\d\s*[-+*/×·÷^=<>]\s*\(*-?[\w\\]|[\w)}]\s*=\s*\S|\\(frac|times|cdot|sqrt)\b|\bequals?\b"),
)
_COMPILED = tuple((category, re.compile(rule, re.IGNORECASE)) for category, rule in _RULES)


def label_by_keywords(sentences: Iterable[str]) -> tuple[str | None, ...]:
    """One category for each sentence, by English keywords; None where no rule matches.

    A stand-in where no labels are given. Thought Anchors (arXiv 2506.19143) lets a large language model label every
    sentence with the whole trace before it; this looks at one sentence at a time and only at its words. So: it knows
    English mathematical reasoning only; it gives one category where the paper allows several; a sentence that does
    two things gets the rarer one (final answer, check, doubt before plan and computation); “let me check” without a
    check still counts as one; a restated result without “so” or “therefore” counts as computation. Its agreement with
    the paper's labels has not been measured: for a claim about categories give real labels.
    """
    return tuple(next((name for name, rule in _COMPILED if rule.search(text)), None) for text in sentences)
