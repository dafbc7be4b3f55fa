"""Read and write reasoning traces: JSON Lines, the math-rollouts folders, and the few examples that are shipped.

The math-rollouts data set (huggingface.co/datasets/uzaymacar/math-rollouts) is Thought Anchors' (arXiv 2506.19143).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from stream_lens.tasks.reasoning_trace import ReasoningTrace, after_reasoning, think_span

__all__ = ["ReasoningTrace", "example_traces", "read_jsonl", "read_math_rollouts", "write_jsonl"]

_FIELDS = ("source", "problem", "reasoning", "answer", "sentences", "categories", "full_cot")


def read_jsonl(path: str | PathLike[str]) -> list[ReasoningTrace]:
    """Read one trace a line. Blank lines are skipped, fields not named here are ignored.

    Fields of a line:
        problem, prompt: one of them at least. When both are there, the prompt is what the model was given.
        full_cot, reasoning, response, solution: the first of them that is there. `full_cot` is the whole text with its
            tags; `reasoning` only what stands between them; `response` and `solution` are the model's output, with or
            without the opening tag (some prompts end with it), and without any tag all of it is reasoning.
        answer: text or a number; where it is missing, what follows ``</think>``.
        sentences, categories: lists, or missing. "unknown" is read as null.
        source: text; where it is missing, the file's name and the line.

    Raises:
        ValueError: a line that cannot be read; the message names the file, the line and the field.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    traces = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            traces.append(_trace(_parsed(line, place), place, source=f"{path.name}, line {number}"))
    if not traces:
        raise ValueError(f"{path} holds no trace: it needs one JSON object a line.")
    return traces


def write_jsonl(traces: Iterable[ReasoningTrace], path: str | PathLike[str]) -> None:
    """Write one trace a line; `read_jsonl` gives equal traces back."""
    with Path(path).open("w", encoding="utf-8") as file:
        for trace in traces:
            row = {field: getattr(trace, field) for field in _FIELDS}
            kept = {field: value for field, value in row.items() if value is not None}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")


def read_math_rollouts(folder: str | PathLike[str]) -> list[ReasoningTrace]:
    """Read the base solutions below a folder of the math-rollouts layout, by path and then by problem number.

    The layout is ``<model>/<temperature and top p>/<correct or incorrect>_base_solution/problem_<n>/``; `folder` may be
    any of these levels. Of each problem's files this reads `problem.json` (problem, gt_answer), `base_solution.json`
    (full_cot, answer) and, where it is there, `chunks_labeled.json` (chunk, function_tags; else the chunks of
    `chunks.json`, without labels). A sentence that has several tags gets the first that is not "unknown". The rollouts
    are not read. The answer is the one that the base solution gives, right or wrong.

    Raises:
        FileNotFoundError: no `base_solution.json` at or below the folder, or one without its `problem.json`.
        ValueError: a file that cannot be read; the message names the file and the field.
    """
    folder = Path(folder)
    found = [file.parent for file in folder.rglob("base_solution.json")]
    if not found:
        raise FileNotFoundError(
            f"No base_solution.json at or below {folder}: give a folder of the math-rollouts layout "
            "(…/correct_base_solution/problem_<n>/base_solution.json)."
        )
    return [_rollout(problem, folder) for problem in sorted(found, key=_problem_order)]


def example_traces() -> list[ReasoningTrace]:
    """Three short traces on word problems, written and labelled by hand for this project (its licence, MIT).

    No model wrote them: they are for demos and tests, not for claims about models.
    """
    with resources.as_file(resources.files("stream_lens.tasks") / "data" / "reasoning.jsonl") as path:
        return read_jsonl(path)


def _problem_order(folder: Path) -> tuple[str, int, str]:
    number = re.search(r"\d+$", folder.name)
    return str(folder.parent), int(number[0]) if number else -1, folder.name


def _rollout(folder: Path, root: Path) -> ReasoningTrace:
    problem_file, solution_file = folder / "problem.json", folder / "base_solution.json"
    problem, solution = (_parsed(file.read_text("utf-8"), str(file)) for file in (problem_file, solution_file))
    row = {
        "problem": _text(problem, "problem", str(problem_file)),
        "full_cot": _text(solution, "full_cot", str(solution_file)),
        "answer": solution.get("answer"),
        **_chunks(folder),
    }
    source = folder.relative_to(root).as_posix() if folder != root else folder.name
    return _trace(row, str(folder), source=source)


def _chunks(folder: Path) -> dict[str, Any]:
    """The sentences, and their categories where they are labelled; nothing when there is no file of chunks."""
    labelled, plain = folder / "chunks_labeled.json", folder / "chunks.json"
    if labelled.is_file():
        chunks = _json(labelled.read_text("utf-8"), str(labelled))
        if not isinstance(chunks, list) or not all(isinstance(chunk, dict) for chunk in chunks):
            raise ValueError(f"{labelled}: it must be a list of objects, one a chunk.")
        return {
            "sentences": [_text(chunk, "chunk", f"{labelled}, chunk {j}") for j, chunk in enumerate(chunks)],
            "categories": [_first_tag(chunk, f"{labelled}, chunk {j}") for j, chunk in enumerate(chunks)],
        }
    if plain.is_file():
        return {"sentences": _parsed(plain.read_text("utf-8"), str(plain)).get("chunks")}
    return {}


def _first_tag(chunk: Mapping[str, Any], place: str) -> str | None:
    tags = chunk.get("function_tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{place}, field function_tags: it must be a list of names, got {tags!r}.")
    return next((tag for tag in tags if tag != "unknown"), None)


def _trace(row: Mapping[str, Any], place: str, source: str) -> ReasoningTrace:
    """The trace of one line's fields; `place` stands in front of every complaint."""
    name = _first_field(row, ("problem", "prompt"), place)
    # A prompt alone is the problem, without the tag that some end with.
    problem = re.sub(r"\s*<think>\s*\Z", "", _text(row, name, place))
    reasoning, full_cot, rest = _reasoning(row, problem, place)
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    elif answer is not None and not isinstance(answer, str):
        raise ValueError(f"{place}, field answer: it must be text or a number, got {type(answer).__name__}.")
    categories = _names(row, "categories", place, or_null=True)
    try:
        return ReasoningTrace(
            problem=problem,
            reasoning=reasoning,
            answer=rest if answer is None else answer,
            sentences=_names(row, "sentences", place, or_null=False),
            categories=categories and tuple(None if name == "unknown" else name for name in categories),
            source=row["source"] if isinstance(row.get("source"), str) else source,
            full_cot=full_cot,
        )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _reasoning(row: Mapping[str, Any], problem: str, place: str) -> tuple[str, str | None, str]:
    """The reasoning, the whole text when the line says what it was, and what follows ``</think>``."""
    name = _first_field(row, ("full_cot", "reasoning", "response", "solution"), place)
    given = _text(row, name, place)
    if name == "reasoning":
        return given, None, ""
    if name == "full_cot":
        text = given
    else:
        prompt = _text(row, "prompt", place) if row.get("prompt") is not None else problem
        if prompt.rstrip().endswith("<think>"):
            text = prompt + given
        else:
            opening = "" if "<think>" in given else "<think>\n"
            text = f"{prompt.rstrip()}\n\n{opening}{given}"
    try:
        start, stop = think_span(text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return text[start:stop], text, after_reasoning(text, stop).strip()


def _first_field(row: Mapping[str, Any], names: tuple[str, ...], place: str) -> str:
    found = next((name for name in names if row.get(name) is not None), None)
    if found is None:
        raise ValueError(f"{place}: it needs one of the fields {', '.join(names)}; it has {', '.join(row) or 'none'}.")
    return found


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        what = "is missing" if value is None else f"must be text that is not empty, got {value!r:.80}"
        raise ValueError(f"{place}, field {name}: it {what}.")
    return value


def _names(row: Mapping[str, Any], name: str, place: str, *, or_null: bool) -> tuple[Any, ...] | None:
    values = row.get(name)
    if values is None:
        return None
    fits = isinstance(values, list) and all(isinstance(v, str) or (or_null and v is None) for v in values)
    if not fits:
        raise ValueError(f"{place}, field {name}: it must be a list of text{' or null' if or_null else ''}.")
    return tuple(values)


def _parsed(document: str, place: str) -> dict[str, Any]:
    row = _json(document, place)
    if not isinstance(row, dict):
        raise ValueError(f"{place}: it must be a JSON object, got {type(row).__name__}.")
    return row


def _json(document: str, place: str) -> Any:
    try:
        return json.loads(document)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: it is not JSON ({error}).") from error
