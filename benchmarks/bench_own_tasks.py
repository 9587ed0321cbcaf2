"""From a file of one's own to a student in a file: three tasks, with times, scores and unknown shares.

    python benchmarks/bench_own_tasks.py [--rows 300] [--tasks labels,json,conversions] [--minutes 8] [--out DIR]
    python benchmarks/bench_own_tasks.py --write DIR        # the three files alone

The tasks are what people bring: support messages with one of four labels, JSON to extract from a sentence, and unit
conversions. Their rows are made here, each once, from parts that are drawn at random; nothing in them is marked for
deepdistill. The teacher is a server in this process that knows the answers and gives them as models do, with some
reasoning, in sentences, in bold or in a code fence. Everything else is the product: `deepdistill teach` and
`deepdistill quantize`, each a process of its own, with the settings that a new user has. A finished task is kept in
--out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Row = dict[str, str]

PRODUCTS = ["the app", "my tablet", "the web shop", "your newsletter", "the calendar", "the export", "the login page"]
PRODUCTS += ["the printer driver", "the mobile version", "the search", "the dashboard", "the desktop client"]
LABELS = {
    "billing": [
        "I was charged twice for {p} in {m}.",
        "Please send the invoice of {m} for {p} again.",
        "The refund for {p} that you promised in {m} has not arrived.",
        "My card was declined when I renewed {p} on {d} {m}.",
        "Why does {p} cost more since {m}?",
        "I cancelled {p} on {d} {m} and still pay for it.",
    ],
    "bug": [
        "{P} crashes as soon as I open it, since the update of {d} {m}.",
        "Since {d} {m} {p} shows a blank screen.",
        "{P} loses my changes when I save. It began in {m}.",
        "I get error {n} from {p} every time.",
        "{P} freezes after {n} seconds.",
        "Dates in {p} are a day off: {d} {m} is shown as the day before.",
    ],
    "feature": [
        "It would be great if {p} had a dark mode before {m}.",
        "Could you add an export to CSV to {p}? I need {n} rows at once.",
        "Please let us share {p} with {n} colleagues.",
        "I wish {p} could remind me on {d} {m}.",
        "Do you plan to support more languages in {p} by {m}?",
        "A keyboard shortcut for {p} would save me {n} clicks a day.",
    ],
    "praise": [
        "I have used {p} since {m} and I love it.",
        "Thank you! {P} saved me {n} hours in {m}.",
        "{P} is the best tool that I have tried this year, and I tried {n}.",
        "Great work on {p}: everything that I wanted came in {m}.",
        "Just wanted to say that {p} works beautifully, {n} days in a row.",
        "My team of {n} is very happy with {p}.",
    ],
}
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"]
FIRST = ["Maria", "Jonas", "Aisha", "Pedro", "Lena", "Tom", "Yuki", "Omar", "Ines", "Karl", "Nora", "Ravi", "Eva"]
LAST = ["Keller", "Okafor", "Silva", "Novak", "Berg", "Tanaka", "Haddad", "Costa", "Lind", "Moreau", "Weber", "Rossi"]
CITIES = ["Graz", "Lyon", "Porto", "Oslo", "Accra", "Kyoto", "Lima", "Gdansk", "Turin", "Bergen", "Leeds", "Split"]
SENTENCES = [
    "{f} {l} from {c} paid {n} euros on {d} {m}.",
    "On {d} {m} we received {n} euros from {f} {l}, {c}.",
    "Order of {d} {m}: {f} {l}, {c}, {n} euros in all.",
    "{f} {l} ({c}) still owes us {n} euros, due {d} {m}.",
]
UNITS = [("km", "metres", "m", 1000), ("kg", "grams", "g", 1000), ("hours", "minutes", "min", 60)]
UNITS += [("m", "centimetres", "cm", 100), ("minutes", "seconds", "s", 60), ("litres", "millilitres", "ml", 1000)]


def main() -> None:
    """Write the files, or run the tasks that are missing and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--tasks", default="labels,json,conversions", help="with commas between them")
    parser.add_argument("--minutes", type=float, help="of training; deepdistill's default, unless given")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_own_tasks"))
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the files and stop")
    parser.add_argument("flags", nargs="*", help="more flags for teach, after --")
    options = parser.parse_args()
    folder = options.write or options.out
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {name: rows_of(name, options.rows) for name in options.tasks.split(",")}
    for name, rows in tasks.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    if options.write:
        return
    path = folder / "cells.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with Teacher([row for rows in tasks.values() for row in rows]) as teacher:
        for name in tasks:
            if name not in cells:
                cells[name] = run(folder, name, url=teacher.url, options=options)
                path.write_text(json.dumps(cells, indent=1))
    print(json.dumps({name: cells[name] for name in tasks}))


def rows_of(task: str, n: int) -> list[Row]:
    """Return n different rows of a task, always the same ones."""
    rng, make, rows = random.Random(task), MAKERS[task], dict[str, Row]()
    while len(rows) < n:
        row = make(rng)
        rows.setdefault(row["question"], row)
    return list(rows.values())


def label_row(rng: random.Random) -> Row:
    """Return a support message and its label."""
    label, product = rng.choice(sorted(LABELS)), rng.choice(PRODUCTS)
    text = rng.choice(LABELS[label]).format(
        p=product, P=product[0].upper() + product[1:], m=rng.choice(MONTHS), d=rng.randint(1, 28), n=rng.randint(3, 90)
    )
    return {"question": f"Which kind of message is this: billing, bug, feature or praise?\n\n{text}", "answer": label}


def json_row(rng: random.Random) -> Row:
    """Return a sentence and what it holds, as JSON."""
    first, last, city, n = rng.choice(FIRST), rng.choice(LAST), rng.choice(CITIES), rng.randint(10, 900)
    sentence = rng.choice(SENTENCES).format(f=first, l=last, c=city, n=n, d=rng.randint(1, 28), m=rng.choice(MONTHS))
    answer = json.dumps({"name": f"{first} {last}", "city": city, "amount": n})
    return {"question": f"Extract name, city and amount as JSON: {sentence}", "answer": answer}


def conversion_row(rng: random.Random) -> Row:
    """Return a conversion to a smaller unit."""
    unit, word, symbol, factor = rng.choice(UNITS)
    tenths = rng.randint(2, 400) if factor > 60 else 10 * rng.randint(2, 90)
    value = f"{tenths / 10:g}"
    return {"question": f"How many {word} are {value} {unit}?", "answer": f"{tenths * factor // 10} {symbol}"}


MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "labels": label_row,
    "json": json_row,
    "conversions": conversion_row,
}


def reply_to(row: Row) -> tuple[str, str]:
    """Return (reasoning, content) as a model would give them, the same for a row each time."""
    rng, answer, question = random.Random(row["question"]), row["answer"], row["question"]
    if answer.startswith("{"):
        fence = f"```json\n{answer}\n```"
        content = rng.choice([answer, fence, f"Here is the JSON:\n\n{fence}", f"{fence}\n\nI hope this helps."])
        return "I look for the name, the city and the amount in the sentence.", content
    if answer in LABELS:
        forms = ["{a}", "The label is **{a}**.", "Label: {a}", "This should be labelled as {a}.", "**{a}**"]
        return f"The message is about {answer}, not about anything else.", rng.choice(forms).format(a=answer)
    number, unit = answer.split()
    forms = ["{n} {u}", "The answer is **{n} {u}**.", "That is {n} {u}.", r"\boxed{{{n}\text{{ {u}}}}}"]
    value, small = question.split(" are ")[1].rstrip("?"), question.split()[2]
    return f"{value} in {small}: I multiply and get {number}.", rng.choice(forms).format(n=number, u=unit)


class Teacher:
    """A server that finds the question in what it is asked and streams its reply."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = {row["question"]: row for row in rows}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> Teacher:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a reply."""
        asked = body["messages"][-1]["content"]
        row = next((row for question, row in self.rows.items() if question in asked), None)
        reasoning, content = reply_to(row) if row else ("", "I don't know.")
        usage = {"prompt_tokens": len(asked) // 4, "completion_tokens": (len(reasoning) + len(content)) // 4 + 1}
        for delta in ({"reasoning_content": reasoning}, {"content": content}):
            yield {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(json.dumps({"data": [{"id": "stand-in"}]}).encode(), "application/json")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                lines = [f"data: {json.dumps(event)}\n\n" for event in teacher.events(body)]
                self._send("".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream")

            def _send(self, data: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def run(folder: Path, name: str, *, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Teach and quantize one task as a user would; return times and scores. What is printed is kept beside the run."""
    run_dir = folder / name
    minutes = [] if options.minutes is None else ["--minutes", str(options.minutes)]
    teach = ["teach", "--problems", str(folder / f"{name}.jsonl"), "--teacher", url, "--model", "stand-in"]
    commands = [
        [*teach, "--out", str(run_dir), *minutes, *options.flags],
        ["quantize", str(run_dir), "--type", "Q8_0", "--n", "200"],
    ]
    seconds = {}
    with (folder / f"{name}.txt").open("a", encoding="utf-8") as log:
        for command in commands:
            print("$ deepdistill", *command, file=log, flush=True)
            print("$ deepdistill", *command, file=sys.stderr, flush=True)
            started = time.monotonic()
            code = subprocess.run([sys.executable, "-m", "deepdistill", *command], stdout=log, stderr=log).returncode
            seconds[command[0]] = round(time.monotonic() - started, 1)
            if code:
                sys.exit(f"{command[0]} ended with {code}: see {folder / name}.txt")
    scores = json.loads((run_dir / "scores.json").read_text(encoding="utf-8"))
    return {"seconds": seconds, "scores": scores, "training": json.loads((run_dir / "training.json").read_text())}


if __name__ == "__main__":
    main()
