"""Exported rows, read back by those who would load them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest

from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace
from deepdistill.distill.traces.exporting import export_traces
from deepdistill.distill.traces.importing import import_traces
from deepdistill.distill.traces.store import Judgement, TraceStore
from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.generation import Completion, Sampling


def make(index: int) -> Trace:
    problem = Problem(f"p{index}", f"question {index}?", "42", "test", "math")
    done = Completion("**42** – naïve", f"40+2={index}", True, "stop", 10, 5, 3, 0.5)
    return Trace.make(
        problem,
        done,
        grade=Grade("42", "right", "grader", 1.0),
        info=TeacherInfo("t", "gguf"),
        teacher="t",
        sampling=Sampling(),
    )


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    path = tmp_path / "traces.jsonl"
    with TraceStore(path) as store:
        for trace in (
            make(0),
            replace(make(1), verdict="wrong"),
            replace(make(2), verdict="unknown", verdict_by="none"),
            replace(make(3), verdict="unknown", verdict_by="none", reasoning_content=None),
            replace(make(4), finish_reason="length"),
        ):
            store.append(trace)
        store.append_judgements([Judgement(make(3).id, "vote", 0.75)])
    return path


@pytest.mark.parametrize("to", ["messages", "parquet"])
def test_accepted_traces_with_their_reasoning(traces: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "new" / f"rows.{to}"
    assert export_traces(traces, out, to=to) == 2  # type: ignore[arg-type]
    if to == "parquet":
        rows = pyarrow.parquet.read_table(out).to_pylist()
    else:
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["problem_id"] for row in rows] == ["p0", "p3"]
    assert rows[0]["messages"] == [
        {"role": "user", "content": "question 0?", "reasoning_content": ""},
        {"role": "assistant", "content": "**42** – naïve", "reasoning_content": "40+2=0"},
    ]
    assert rows[1]["messages"][1]["reasoning_content"] == ""
    assert (rows[1]["verdict_by"], rows[1]["agreement"], rows[1]["teacher"]) == ("vote", 0.75, "t")
    assert [path.name for path in out.parent.iterdir()] == [out.name], "nothing half-written stays"


def test_thinking_in_the_content_and_everything(traces: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert export_traces(traces, out, reasoning="think", include="all") == 5
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows[1]["messages"][1] == {
        "role": "assistant",
        "content": "<think>\n40+2=1\n</think>\n\n**42** – naïve",
    }
    assert rows[3]["messages"][1]["content"] == "**42** – naïve"


@pytest.mark.parametrize("to", ["messages", "parquet"])
@pytest.mark.parametrize("reasoning", ["field", "think"])
def test_what_is_exported_can_be_imported(traces: Path, tmp_path: Path, to: str, reasoning: str) -> None:
    out = tmp_path / f"rows.{'parquet' if to == 'parquet' else 'jsonl'}"
    export_traces(traces, out, to=to, reasoning=reasoning, include="all")  # type: ignore[arg-type]
    back = [trace for _, trace in import_traces(out)]
    assert [(t.reasoning_content, t.content) for t in back] == [
        (t.reasoning_content, t.content) for t in TraceStore.read(traces)
    ]


def test_many_rows_take_several_groups(tmp_path: Path) -> None:
    path, out = tmp_path / "traces.jsonl", tmp_path / "rows.parquet"
    with TraceStore(path) as store:
        for index in range(2100):
            store.append(make(index))
    assert export_traces(path, out, to="parquet") == 2100
    with pyarrow.parquet.ParquetFile(out) as file:
        assert file.num_row_groups == 3
        assert [row["problem_id"] for row in file.read().to_pylist()] == [f"p{index}" for index in range(2100)]


def test_half_a_surrogate_pair_hurts_no_loader(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    with TraceStore(path) as store:
        store.append(replace(make(0), content="a \ud83d b"))
    assert [trace.content for trace in TraceStore.read(path)] == ["a \ud83d b"]
    for to in ("messages", "parquet"):
        assert export_traces(path, tmp_path / to, to=to) == 1  # type: ignore[arg-type]
    assert "a ? b" in (tmp_path / "messages").read_text(encoding="utf-8")


def test_nothing_to_export(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    with TraceStore(path) as store:
        store.append(replace(make(0), verdict="wrong"))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "no-traces" and "--all" in error.hint):
        export_traces(path, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("to", ["messages", "parquet"])
def test_datasets_loads_it(traces: Path, tmp_path: Path, to: str) -> None:
    datasets = pytest.importorskip("datasets")
    out = tmp_path / f"rows.{'parquet' if to == 'parquet' else 'jsonl'}"
    export_traces(traces, out, to=to)  # type: ignore[arg-type]
    kind = "parquet" if to == "parquet" else "json"
    rows = datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["messages"][1]["reasoning_content"] == "40+2=0"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.parametrize(("to", "reasoning"), [("parquet", "field"), ("messages", "field"), ("messages", "think")])
def test_trl_trains_on_it(traces: Path, tmp_path: Path, pocket_student: Path, to: str, reasoning: str) -> None:
    """SFTTrainer takes the file as it is, and what it trains on holds the reasoning and the answer."""
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    trl = pytest.importorskip("trl", reason="pip install trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / f"rows.{'parquet' if to == 'parquet' else 'jsonl'}"
    export_traces(traces, out, to=to, reasoning=reasoning)  # type: ignore[arg-type]
    kind = "parquet" if to == "parquet" else "json"
    rows = datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", max_length=512, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(pocket_student)
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    trained = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert 0 < trained.index("40+2=0") < trained.index("</think>") < trained.index("42"), trained
    assert trainer.train().training_loss > 0
