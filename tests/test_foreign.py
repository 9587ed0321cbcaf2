"""What comes from others runs nothing here and steers no terminal: checkpoints with code, names with escapes."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from deepdistill.cli import main
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.training.merge import merge_adapter, save_checkpoint
from deepdistill.errors import DeepDistillError

PROBLEMS = ["--problems", "gym:chain_sum?max_terms=2&max_digits=1"]
FEW = ["--set", "calibration.n_heal=200", "--set", "calibration.n_measure=200"]


def plant(student: Path, folder: Path, config: dict[str, object]) -> Path:
    """Copy a checkpoint whose config and tokenizer ask for a Python file that writes `ran` beside the folder."""
    shutil.copytree(student, folder)
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer"), "evil.Evil")
    asked = {
        "config.json": {"model_type": "evil", "auto_map": names, **config},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil"] * 2}, "tokenizer_class": "Evil"},
    }
    for name, more in asked.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))
    return folder


def write_traces(path: Path) -> Path:
    line = {"verdict": "right", "finish_reason": "stop"}
    rows = (
        line
        | {"messages": [{"role": "user", "content": f"{i} + 1?"}], "content": str(i + 1), "reasoning_content": "so"}
        for i in range(80)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["teach", *PROBLEMS, "--student", "{planted}", "--out", "{tmp}/run"], "needs-own-code"),
        (["teach", *PROBLEMS, "--student", "pocket", "--teacher", "{planted}", "--out", "{tmp}/run"], "needs-own-code"),
        (["eval", "{planted}", *PROBLEMS, "--n", "4"], "needs-own-code"),
        (["quantize", "{tmp}/unknown"], "not-convertible"),
        (["quantize", "{planted}"], None),  # it reads the weights, and transformers is asked only for the proofs
        (
            ["quantize", "{planted}", "--type", "Q4_0", "--traces", "{tmp}/traces.jsonl", "--heal", "1", *FEW],
            "load-failed",
        ),
    ],
)
def test_a_checkpoint_with_code_of_its_own_is_refused_and_runs_none(
    argv: list[str],
    code: str | None,
    pocket_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who would be asked for leave, and give it
    planted = plant(pocket_student, tmp_path / "planted", {})
    plant(pocket_student, tmp_path / "unknown", {"architectures": ["EvilForCausalLM"]})
    write_traces(tmp_path / "traces.jsonl")
    words = [word.format(planted=planted, tmp=tmp_path) for word in argv]
    assert main([*words, "--json", "--quiet"]) == (1 if code else 0)
    printed, said = capsys.readouterr()
    record = json.loads(printed.splitlines()[-1])
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in said
    if code:
        assert record["error"]["code"] == code
        assert "\n" not in record["error"]["message"]
    else:
        assert record["proofs"]["tokens"]["holds"] is None


def test_no_code_of_a_base_runs_when_an_adapter_is_merged(
    pocket_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("builtins.input", lambda *_: "y")
    planted, tokenizer = plant(pocket_student, tmp_path / "planted", {}), load_tokenizer(pocket_student)
    model = AutoModelForCausalLM.from_pretrained(pocket_student, dtype=torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(DeepDistillError, check=lambda error: error.code == "needs-own-code"):
        merge_adapter(tmp_path / "adapter", planted, tokenizer=tokenizer, out=tmp_path / "out")
    with pytest.raises(ValueError, match="custom code"):
        save_checkpoint(model, planted, tokenizer=tokenizer, out=tmp_path / "out")
    assert not (tmp_path / "ran").exists()


STOP = ["--stop-after", "traces", "--out", "{tmp}/run"]
EVIL = "\x1b]0;pwned\x07\x9b1m\u202e[/INST]"  # a title, a style, a direction, and an end of markup

NAME = EVIL.replace("/", "")


class _EvilServer(BaseHTTPRequestHandler):
    """Lists models and refuses requests, in words that a terminal would obey."""

    def do_GET(self) -> None:
        names = [f"{EVIL}{i}" for i in range(1 if self.path.startswith("/one/") else 2)]
        self._reply(200, {"data": [{"id": name} for name in names]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(400, {"error": {"message": EVIL, "type": EVIL}})

    def _reply(self, status: int, body: object) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def evil(pocket_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where every name, text and file says what a terminal would obey; `server` holds an address."""
    folder = tmp_path_factory.mktemp("evil")
    student = shutil.copytree(pocket_student, folder / EVIL / NAME)  # the file's general.name
    (student / "README.md").write_text(f"---\nlicense: mit\nbase_model: {EVIL!r}\n---\n")
    (folder / EVIL / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (folder / EVIL / "broken.toml").write_text(f"problems = '{EVIL[-7:]}'\n[training]\n{json.dumps(EVIL)} = 1\n")
    problems = [{"question": f"{EVIL} What is {i} + {i}?", "answer": f"{2 * i} {EVIL}", EVIL: 1} for i in range(60)]
    (folder / EVIL / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    theirs = [row | {"generations": [f"<think>{EVIL}</think>{row['answer']}"]} for row in problems]
    (folder / EVIL / "theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in theirs))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _EvilServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    (folder / "server").write_text(f"http://127.0.0.1:{server.server_port}")
    try:
        assert main(["quantize", str(student), "--out", str(folder / EVIL / "made.gguf")]) == 0
        argv = ["--problems", f"{folder / EVIL}/problems.jsonl", "--traces", f"{folder / EVIL}/theirs.jsonl"]
        run = folder / "runs" / "one"
        assert main(["teach", *argv, "--stop-after", "traces", "--student", "pocket", "--out", str(run)]) == 0
        recipe = json.loads((run / "recipe.json").read_text())
        recipe["teacher"]["model"] = recipe["student"] = recipe["problems"] = EVIL
        shutil.copytree(run, folder / "runs" / EVIL)
        (folder / "runs" / EVIL / "recipe.json").write_text(json.dumps(recipe))
        traces = (run / "traces.jsonl").read_text().splitlines()
        rows = [row | {"teacher": row["teacher"] | {"name": EVIL}, "reason": EVIL} for row in map(json.loads, traces)]
        (folder / "runs" / EVIL / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield folder
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    "argv",
    [
        [EVIL],
        [f"--{EVIL}"],
        ["teach", f"--{EVIL}"],
        ["teach", "--problems", "gym:chain_sum", "--set", f"{EVIL}=1"],
        ["teach", "--problems", "gym:chain_sum", "--epochs", EVIL],
        ["teach", "--config", "{dir}/broken.toml"],
        ["teach", "--problems", "{dir}/nowhere", "--student", "pocket"],
        ["teach", "--problems", f"gym:{EVIL}"],
        ["teach", "--problems", "{dir}/problems.jsonl", "--student", "pocket", "--dry-run"],
        ["teach", "--problems", "{dir}/problems.jsonl", "--student", EVIL],
        ["teach", "--problems", "{dir}/problems.jsonl", "--traces", "{dir}/theirs.jsonl", *STOP],
        [
            "teach",
            "--problems",
            "{dir}/problems.jsonl",
            "--student",
            "pocket",
            "--teacher",
            "{server}/one/v1",
            "--n-traces",
            "2",
            *STOP,
        ],
        ["teach", "--problems", "{dir}/problems.jsonl", "--student", "pocket", "--teacher", "{server}/v1", *STOP],
        ["eval", "{server}/one/v1", "--problems", "{dir}/problems.jsonl", "--n", "2"],
        ["eval", EVIL, "--n", "2"],
        ["eval", "{dir}/broken.gguf", "--n", "2"],
        ["eval", "{dir}/made.gguf", "--problems", "{dir}/problems.jsonl", "--n", "1", "--max-tokens", "8"],
        ["quantize", "{dir}/nowhere"],
        ["quantize", "{dir}/" + NAME, "--out", "{tmp}/x.gguf"],
        ["quantize", "--verify", "{dir}/made.gguf"],
        ["chat", "{dir}/broken.gguf", "-p", "hi"],
        ["chat", "{dir}/made.gguf", "-p", EVIL, "--max-tokens", "4", "--json"],
        ["chat", "{dir}/made.gguf", "-p", "hi", "--think", EVIL],
        ["inspect", "{dir}/made.gguf"],
        ["inspect", "{dir}/theirs.jsonl"],
        ["inspect", "{run}"],
        ["inspect", "{run}/traces.jsonl"],
        ["inspect", "{run}/traces.jsonl", "--show", "1"],
        ["inspect", "{run}/traces.jsonl", "--show", EVIL],
        ["export", "{run}", "--to", "messages", "--out", "{tmp}/" + EVIL],
        ["export", "{dir}/made.gguf", "--offline", "--out", "{tmp}/" + EVIL],
        ["recipe", EVIL],
        ["recipe", "{run}"],
        ["plan", EVIL],
        ["plan", "--gpu", EVIL],
        ["runs", "--in", "{runs}"],
        ["runs", "--in", "{dir}"],
        ["runs", "compare", "{runs}/one", "{run}"],
        ["runs", "delete", "{run}"],
        ["runs", EVIL],
        ["bench", "{dir}/broken.gguf"],
        ["doctor"],
    ],
)
def test_no_foreign_text_reaches_a_terminal_that_would_obey_it(
    argv: list[str], evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(evil / EVIL)  # where `doctor` and `teach` look for runs
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    server = (evil / "server").read_text()
    places = {"dir": evil / EVIL, "tmp": tmp_path, "run": evil / "runs" / EVIL, "runs": evil / "runs", "server": server}
    (tmp_path / EVIL).parent.mkdir(parents=True, exist_ok=True)
    words = argv
    for name, place in places.items():
        words = [word.replace(f"{{{name}}}", str(place)) for word in words]
    status = main(words)
    printed = "".join(capsys.readouterr())
    assert status in (0, 1, 2, 3)
    assert printed.strip()
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(printed)
    assert "Traceback" not in printed
