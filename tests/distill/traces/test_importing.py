"""Traces of others: small files in the layouts that their makers write, and what comes out of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from deepdistill.distill.records import Trace
from deepdistill.distill.traces.importing import import_traces
from deepdistill.distill.traces.store import TraceStore
from deepdistill.errors import ArtifactError, UsageError
from deepdistill.localrun.core.record_log import from_json, to_json

Q, THOUGHT, SAID = "What is 2+2?", "Two and two.", "It is \\boxed{4}."
TAGGED = f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"
SKY = (
    f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n{SAID}\n\n<|end_of_solution|>"
)


def write(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


LAYOUTS: dict[str, tuple[dict[str, Any], str | None]] = {  # the row, and the reference answer that it holds
    "openai chat": ({"messages": chat(("user", Q), ("assistant", TAGGED))}, None),
    "openai chat, the reasoning apart": (
        {"messages": [*chat(("user", Q)), {"role": "assistant", "content": SAID, "reasoning_content": THOUGHT}]},
        None,
    ),
    "the template had opened the thinking": (
        {"messages": chat(("user", Q), ("assistant", f"{THOUGHT}\n</think>\n\n{SAID}")), "answer": "4"},
        "4",
    ),
    "sharegpt": ({"conversations": sharegpt(("human", Q), ("gpt", TAGGED))}, None),
    "openthoughts 114k": ({"system": "Think.", "conversations": sharegpt(("user", Q), ("assistant", SKY))}, None),
    "openthoughts 114k metadata": (
        {
            "problem": Q,
            "deepseek_reasoning": THOUGHT,
            "deepseek_solution": SAID,
            "ground_truth_solution": "Count to \\boxed{4}.",
            "domain": "math",
            "source": "olympiads",
            "test_cases": None,
            "starter_code": None,
        },
        "4",
    ),
    "openthoughts 3": (
        {"difficulty": 7, "source": "s", "domain": "math", "conversations": sharegpt(("human", Q), ("gpt", TAGGED))},
        None,
    ),
    "openr1 math": (
        {
            "problem": Q,
            "solution": "It is 4.",
            "answer": "4",
            "problem_type": "Algebra",
            "source": "olympiads",
            "uuid": "u",
            "is_reasoning_complete": [True],
            "generations": [TAGGED],
            "correctness_math_verify": [True],
            "correctness_llama": None,
            "finish_reasons": None,
            "correctness_count": 1,
            "messages": chat(("user", Q), ("assistant", TAGGED)),
        },
        "4",
    ),
    "curator": ({"question": Q, "reasoning": THOUGHT, "deepseek_solution": SAID}, None),
    "distilabel": (
        {
            "instruction": Q,
            "generation": TAGGED,
            "model_name": "R1",
            "distilabel_metadata": {"statistics_text_generation_0": {"input_tokens": 12, "output_tokens": 34}},
        },
        None,
    ),
    "distilabel chat": ({"messages": chat(("user", Q)), "generation": TAGGED, "model_name": "R1"}, None),
    "alpaca": ({"instruction": Q, "input": "", "output": TAGGED}, None),
    "prompt and completion": ({"prompt": chat(("user", Q)), "completion": chat(("assistant", TAGGED))}, None),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_out_alike(tmp_path: Path, layout: str, kind: str) -> None:
    row, answer = LAYOUTS[layout]
    [(problem, trace)] = import_traces(write(tmp_path, [row], kind), teacher="someone")
    assert (trace.reasoning_content, trace.content) == (THOUGHT, SAID)
    assert [m["content"] for m in trace.messages if m["role"] == "user"] == [Q]
    assert [m["role"] for m in trace.messages][-1] == "user"
    assert (trace.verdict, trace.verdict_by, trace.finish_reason) == ("unknown", "none", "stop")
    assert (problem.question, problem.answer, problem.id) == (Q, answer, trace.problem_id)
    assert problem.grader == ("math" if answer else "none")
    assert trace.source == problem.source == row.get("source", f"rows.{kind}")
    assert trace.teacher.name == row.get("model_name", "someone")
    assert from_json(Trace, to_json(trace)) == trace


CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "trace_rows.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["layout"])
def test_given_layouts(tmp_path: Path, case: dict[str, Any]) -> None:
    [(problem, trace)] = import_traces(write(tmp_path, [case["row"]], "jsonl"))
    assert (trace.reasoning_content, trace.content) == (case["reasoning"], case["content"])
    assert problem.question == "What is 2+3?"


AM = f"<think>{THOUGHT}</think>\n<answer>{SAID}</answer>"
CHATML = f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{TAGGED}<|im_end|>\n"
HARMONY = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{SAID}<|return|>"
MORE: dict[str, tuple[dict[str, Any], str | None, str | None]] = {  # row, reasoning, reference
    "limo": ({"question": Q, "solution": SAID, "answer": "4"}, None, "4"),
    "am": ({"messages": chat(("user", Q), ("assistant", AM))}, THOUGHT, None),
    "chatml": ({"text": CHATML}, THOUGHT, None),
    "preferences": ({"prompt": Q, "chosen": TAGGED, "rejected": "5"}, THOUGHT, None),
    "preference chats": ({"chosen": chat(("user", Q), ("assistant", SAID)), "rejected": []}, None, None),
    "developer": ({"messages": chat(("developer", "Be brief."), ("user", Q), ("assistant", SAID))}, None, None),
    "harmony": ({"prompt": Q, "response": HARMONY}, THOUGHT, None),
    "s1K": ({"question": Q, "thinking_trajectories": [THOUGHT], "attempt": SAID, "solution": "4"}, THOUGHT, "4"),
}


@pytest.mark.parametrize("layout", MORE)
def test_more_layouts(tmp_path: Path, layout: str) -> None:
    row, reasoning, reference = MORE[layout]
    [(problem, trace)] = import_traces(write(tmp_path, [row], "jsonl"))
    assert (problem.question, trace.reasoning_content, trace.content) == (Q, reasoning, SAID)
    assert problem.answer == reference


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, [{"ask": Q, "why": THOUGHT, "said": SAID, "key": "4"}], "jsonl")
    query = Path(f"{path}?question=ask&reasoning=why&content=said&answer=key")
    [(problem, trace)] = import_traces(query)
    assert (problem.question, problem.answer) == (Q, "4")
    assert (trace.reasoning_content, trace.content) == (THOUGHT, SAID)
    with pytest.raises(UsageError, check=lambda error: error.code == "no-such-parameter"):
        list(import_traces(Path(f"{path}?thought=why")))


def test_a_row_that_is_not_taken_has_its_reason(tmp_path: Path) -> None:
    rows = [
        {"messages": chat(("user", Q), ("tool", "4"), ("assistant", SAID))},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": SAID}]},
        {"messages": chat(("system", Q), ("assistant", SAID))},
        {"answer": "4"},
        {"question": Q, "generation": SAID},
    ]
    skipped: list[str] = []
    path = write(tmp_path, rows, "jsonl")
    assert len(list(import_traces(path, on_skip=lambda where, why: skipped.append(why)))) == 1
    assert ["'tool'" in skipped[0], "not text" in skipped[1], "user" in skipped[2], "question" in skipped[3]] == [
        True
    ] * 4


def test_openr1_gives_a_trace_a_generation_and_believes_no_claim(tmp_path: Path) -> None:
    row = LAYOUTS["openr1 math"][0] | {
        "generations": [TAGGED, TAGGED.replace("4", "5"), "<think>\nand so on"],
        "finish_reasons": ["stop", "stop", "length"],
        "is_reasoning_complete": [True, True, False],
        "correctness_math_verify": [True, False, False],
    }
    traces = [trace for _, trace in import_traces(write(tmp_path, [row], "parquet"))]
    assert [trace.sample for trace in traces] == [0, 1, 2]
    assert len({trace.id for trace in traces}) == 3
    assert {(trace.verdict, trace.verdict_by) for trace in traces} == {("unknown", "none")}
    assert [trace.finish_reason for trace in traces] == ["stop", "stop", "length"]
    assert (traces[2].reasoning_content, traces[2].content) == ("and so on", "")
    del row["finish_reasons"]
    assert [trace.finish_reason for _, trace in import_traces(write(tmp_path, [row], "jsonl"))][2] == "length"


def test_thinking_that_never_closes_was_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path, [{"messages": chat(("user", Q), ("assistant", "<think>\non and on"))}], "jsonl")
    [(_, trace)] = import_traces(path)
    assert (trace.finish_reason, trace.reasoning_content, trace.content) == ("length", "on and on", "")


def test_importing_twice_stores_once(tmp_path: Path) -> None:
    path = write(tmp_path, [row for row, _ in LAYOUTS.values()], "jsonl")
    with TraceStore(tmp_path / "traces.jsonl") as store:
        for _ in range(2):
            for _, trace in import_traces(path):
                store.append(trace)
        assert 1 < len(store) <= len(LAYOUTS)
        stored = len(store)
    assert len(list(TraceStore.read(tmp_path / "traces.jsonl"))) == stored


def test_a_model_s_own_answer_is_never_its_reference(tmp_path: Path) -> None:
    [(problem, trace)] = import_traces(write(tmp_path, [{"question": Q, "reasoning": THOUGHT, "answer": "5"}], "jsonl"))
    assert (trace.content, problem.answer, problem.grader) == ("5", None, "none")


def test_earlier_turns_keep_their_thinking_apart(tmp_path: Path) -> None:
    turns = chat(("user", "Hi"), ("assistant", "<think>\ngreet\n</think>\n\nHello"), ("user", Q), ("assistant", TAGGED))
    [(problem, trace)] = import_traces(write(tmp_path, [{"system": "Be kind.", "messages": turns}], "jsonl"))
    assert trace.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "greet"},
        {"role": "user", "content": Q},
    ]
    assert problem.question == f"Hi\n{Q}"


def test_counts_of_distilabel_are_kept(tmp_path: Path) -> None:
    [(_, trace)] = import_traces(write(tmp_path, [LAYOUTS["distilabel"][0]], "parquet"))
    assert (trace.usage.prompt, trace.usage.completion) == (12, 34)


def test_rows_without_an_answer_are_named(tmp_path: Path) -> None:
    rows = [{"instruction": Q, "generation": None}, {"instruction": Q, "generation": TAGGED}]
    skipped: list[tuple[str, str]] = []
    path = write(tmp_path, rows, "jsonl")
    assert len(list(import_traces(path, on_skip=lambda where, why: skipped.append((where, why))))) == 1
    assert skipped == [(f"{path}:1", "it has no answer")]


def test_a_file_of_problems_is_none_of_traces(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": Q, "answer": "4"}], "jsonl")
    with pytest.raises(ArtifactError, check=lambda e: e.code == "no-traces" and "question, answer" in e.message):
        list(import_traces(path))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "no-such-file"):
        list(import_traces(tmp_path / "none.jsonl"))


def test_a_folder_of_shards(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, [LAYOUTS["sharegpt"][0]], "parquet")
    write(folder, [LAYOUTS["alpaca"][0] | {"instruction": "Other?"}], "jsonl")
    assert len(list(import_traces(folder))) == 2


def test_reading_another_tool_s_traces_names_the_command_that_takes_them(tmp_path: Path) -> None:
    path = write(tmp_path, [LAYOUTS["alpaca"][0]], "jsonl")
    with pytest.raises(ArtifactError) as caught:
        next(TraceStore.read(path))
    assert (caught.value.code, f"teach --traces {path}" in caught.value.hint) == ("line-broken", True)
