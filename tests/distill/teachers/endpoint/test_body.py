"""What goes into a request: what the user adds, and what is left out once a server refuses it."""

from __future__ import annotations

from typing import Any

import pytest
from fake_server import Failure, FakeServer, Handler, ask, status, stream

from deepdistill.distill.recipe.gathering import RequestRecipe
from deepdistill.distill.recipe.teach import EvalRecipe
from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace
from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.distill.teachers.endpoint.body import RequestBody
from deepdistill.distill.teachers.endpoint.teacher import EndpointTeacher
from deepdistill.errors import TeacherError, UsageError
from deepdistill.localrun.core.generation import Completion, Sampling
from deepdistill.localrun.core.settings import build

HOT = Sampling(temperature=0.6, top_p=0.9, max_tokens=64)


def refusing(*fields: str, code: int = 400) -> Failure:
    """Refuse a body with any of these fields by name, else answer."""

    def answer(handler: Handler, question: str) -> None:
        body = handler.server.requests[-1][2]
        if bad := next((name for name in fields if name in body), None):
            return handler.send(code, {"error": {"message": f"Unsupported parameter: '{bad}'.", "param": bad}})
        return stream()(handler, question)

    return answer


def bodies(server: FakeServer) -> list[dict[str, Any]]:
    return [body for _, _, body, _ in server.requests]


def test_a_field_that_is_refused_by_name_is_left_out_for_the_run(server: FakeServer) -> None:
    notes: list[str] = []
    for i in range(4):
        server.failures[f"question {i}"] = [refusing("temperature", "seed")] * 4
    with EndpointTeacher(server.url, concurrency=1, max_backoff_s=0.01) as teacher:
        teacher.on_note = notes.append
        answers = [answer for _, answer in teacher.generate(ask(4), HOT)]
    assert [answer.finish_reason for answer in answers] == ["stop"] * 4
    assert {answer.not_sent for answer in answers} == {frozenset({"temperature", "seed"})}
    assert len(server.requests) == 6
    assert all(not {"temperature", "seed"} & body.keys() for body in bodies(server)[2:])
    assert [("temperature" in note, "seed" in note) for note in notes] == [(True, False), (False, True)]


def test_what_was_not_sent_is_not_in_the_traces_sampling() -> None:
    problem, grade = Problem("id", "q", "4", "s", "math"), Grade("4", "right", "grader", 1.0)
    done = Completion("4", None, None, "stop", 1, 1, 0, 0.1, not_sent=frozenset({"temperature"}))
    trace = Trace.make(problem, done, grade=grade, info=TeacherInfo("t", "endpoint"), teacher="t", sampling=HOT)
    assert "temperature" not in trace.sampling
    assert (trace.sampling["top_p"], trace.sampling["max_tokens"]) == (0.9, 64)


def test_the_limit_of_tokens_is_renamed_and_never_left_out(server: FakeServer, teacher: EndpointTeacher) -> None:
    def answer(handler: Handler, question: str) -> None:
        if "max_tokens" in handler.server.requests[-1][2]:
            text = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            return handler.send(400, {"error": {"message": text, "param": "max_tokens"}})
        return stream()(handler, question)

    server.failures["question 0"] = [answer] * 3
    [(_, completion)] = teacher.generate(ask(1), HOT)
    assert completion.finish_reason == "stop"
    assert [body.get("max_completion_tokens") for body in bodies(server)] == [None, 64]


@pytest.mark.parametrize("code", [400, 422])
def test_the_same_refusal_again_and_again_ends_the_run_with_the_servers_words(server: FakeServer, code: int) -> None:
    for i in range(300):
        server.failures[f"question {i}"] = [status(code, f"max_tokens is too large: 9999, request {i}")] * 3
    with (
        EndpointTeacher(server.url, concurrency=2, max_backoff_s=0.01) as teacher,
        pytest.raises(TeacherError) as caught,
    ):
        list(teacher.generate(ask(300), HOT))
    assert (caught.value.code, "max_tokens is too large" in caught.value.message) == ("server-refuses", True)
    assert len(server.requests) < 20


def test_a_content_filter_on_some_questions_ends_nothing(server: FakeServer, teacher: EndpointTeacher) -> None:
    for i in range(12):
        server.failures[f"question {i}"] = [status(400, "The response was filtered by the content management policy")]
    answers = dict(teacher.generate(ask(14), HOT))
    assert [answers[i].finish_reason for i in (0, 11, 12, 13)] == ["error", "error", "stop", "stop"]


def test_what_the_user_adds_is_sent(server: FakeServer) -> None:
    added = '{"chat_template_kwargs": {"a": 1}, "temperature": 0.1}'
    request = RequestRecipe(system="Be brief.", think="off", effort="low", body=added)
    server.models = ["Qwen3-8B"]
    with open_teacher(server.url, request=request, concurrency=1) as teacher:
        asked = Request([{"role": "system", "content": "Mine."}, {"role": "user", "content": "question 1"}])
        list(teacher.generate([*ask(1), asked], HOT))
    first, second = bodies(server)
    assert first["chat_template_kwargs"] == {"enable_thinking": False, "a": 1}
    assert (first["reasoning_effort"], first["temperature"], first["top_p"]) == ("low", 0.1, 0.9)
    assert [message["content"] for message in first["messages"]] == ["Be brief.", "question 0"]
    assert [message["content"] for message in second["messages"]] == ["Be brief.\n\nMine.", "question 1"]


@pytest.mark.parametrize(
    ("model", "host", "think", "effort", "sent"),
    [
        ("deepseek-v4-pro", "api.deepseek.com", "on", None, {"thinking": {"type": "enabled"}}),
        ("deepseek-v4-pro", "api.deepseek.com", "auto", "high", {"reasoning_effort": "high"}),
        ("deepseek-ai/DeepSeek-V3.1", "localhost:8000", "on", None, {"chat_template_kwargs": {"thinking": True}}),
        ("Qwen/Qwen3-8B", "localhost:8000", "off", None, {"chat_template_kwargs": {"enable_thinking": False}}),
        ("zai-org/GLM-4.7", "localhost", "off", None, {"chat_template_kwargs": {"enable_thinking": False}}),
        ("kimi-k3", "api.moonshot.ai", "off", None, {"thinking": {"type": "disabled"}}),
        ("openai/gpt-oss-120b", "localhost", "auto", "low", {"reasoning_effort": "low"}),
        ("deepseek/deepseek-r1", "openrouter.ai", "on", "high", {"reasoning": {"enabled": True, "effort": "high"}}),
    ],
)  # fmt: skip
def test_thinking_is_switched_as_each_family_takes_it(
    model: str, host: str, think: Any, effort: str | None, sent: dict[str, Any]
) -> None:
    body = RequestBody(model, RequestRecipe(think=think, effort=effort), host=host)
    built = body.build(Request([{"role": "user", "content": "q"}]), HOT, n_logprobs=0, with_ids=False)
    assert {name: built[name] for name in sent} == sent
    plain = RequestBody(model, host=host).build(Request([]), HOT, n_logprobs=0, with_ids=False)
    assert not plain.keys() & {"thinking", "reasoning", "reasoning_effort", "chat_template_kwargs"}


def test_what_cannot_be_sent_is_said_before_anything_is_asked(server: FakeServer) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "thinking-unknown"):
        EndpointTeacher(server.url, request=RequestRecipe(think="on"))
    with pytest.raises(UsageError, check=lambda error: error.code == "server-only"):
        open_teacher("pocket", request=RequestRecipe(system="x"))
    for text in ("{", "[]", "3"):
        with pytest.raises(UsageError, check=lambda error: error.code == "bad-settings"):
            build(EvalRecipe, {"request": {"body": text}})
    assert server.requests == []
