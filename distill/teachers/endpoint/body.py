"""The body of a request: sampling, what the user adds, and what a server turns out not to take.

Servers differ in the fields that they take. One that refuses a field by its name gets the request again without it; a
limit of tokens is never left out, but renamed where the server wants OpenAI's newer name. What was learned holds for
the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ....errors import UsageError
from ....localrun.core.generation import Message, Sampling
from ...recipe.gathering import RequestRecipe
from ...records import Request

_MAY_GO = ("temperature", "top_p", "top_k", "min_p", "seed", "stream_options", "return_tokens_as_token_ids")
"""Fields that a request can do without. Log-probabilities have a ladder of their own."""
_LIMIT, _NEW_LIMIT = "max_tokens", "max_completion_tokens"
_THINKS_BY_TEMPLATE = re.compile(r"qwen|glm|nemotron|deepseek|granite|smollm3|hunyuan|ernie|exaone|seed|mimo|kimi")


class RequestBody:
    """Builds the bodies of a teacher's requests, and remembers what its servers do not take.

    `left_out` has the fields that are not sent any more, by the names that `Sampling` has for them.
    """

    def __init__(self, model: str, request: RequestRecipe | None = None, *, host: str = "") -> None:
        """Take the model's name on its server and what every request has beside the problem.

        Raises:
            UsageError: `code` "thinking-unknown": nobody knows how this teacher's thinking is switched.
        """
        self.model, self._request = model, request or RequestRecipe()
        self.left_out: set[str] = set()
        self._limit = _LIMIT
        added = json.loads(self._request.body) if self._request.body else {}
        self._added: dict[str, Any] = _merged(_switches(self._request, model, host), added)

    def messages(self, request: Request) -> Sequence[Message]:
        """Return the conversation of a request, with the user's system message before its own."""
        system = self._request.system
        if not system:
            return request.messages
        first, *rest = request.messages
        if first["role"] == "system":
            return [{"role": "system", "content": f"{system}\n\n{first['content']}"}, *rest]
        return [{"role": "system", "content": system}, *request.messages]

    def build(self, request: Request, sampling: Sampling, *, n_logprobs: int, with_ids: bool) -> dict[str, Any]:
        """Return the body of a request that asks for so many log-probabilities a token."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in self.messages(request)],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._limit: sampling.max_tokens,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # These are not part of OpenAI's API: they are sent only if somebody sets them.
        body |= {"top_k": sampling.top_k} if sampling.top_k > 0 else {}
        body |= {"min_p": sampling.min_p} if sampling.min_p > 0 else {}
        body |= {"logprobs": True, "top_logprobs": n_logprobs} if n_logprobs else {}
        body |= {"return_tokens_as_token_ids": True} if with_ids else {}
        return _merged({name: value for name, value in body.items() if name not in self.left_out}, self._added)

    def learn(self, refusal: str, body: Mapping[str, Any]) -> str | None:
        """Change what is sent after a server refused a body; return what was changed, or None if nothing helps."""
        named = [name for name in _MAY_GO if name in body and _names(refusal, name)]
        if _LIMIT in body and _NEW_LIMIT not in self._added and _names(refusal, _NEW_LIMIT):
            self._limit = _NEW_LIMIT
            return f"takes the limit of tokens as {_NEW_LIMIT}"
        fresh = [name for name in named if name not in self._added and name not in self.left_out]
        if not fresh:
            # Others that asked at the same time may have learned it: then this body is only out of date.
            is_old = self.left_out & body.keys() or (_LIMIT in body and self._limit != _LIMIT)
            return "" if is_old else None
        self.left_out |= set(fresh)
        return f"does not take {' and '.join(fresh)}: deepdistill asks without"


def _names(refusal: str, field: str) -> bool:
    return re.search(rf"(?<![a-z_]){field}(?![a-z_])", refusal) is not None


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return both objects as one; of values that are objects too, both at every depth."""
    found = dict(one)
    for name, value in other.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if both else value
    return found


def _switches(request: RequestRecipe, model: str, host: str) -> dict[str, Any]:
    """Return the fields that switch thinking on or off and set its effort, as this model's server takes them.

    Source: the vendors' pages on thinking of November 2026; for servers of one's own the chat templates' variables.
    """
    think, effort, name = request.think, request.effort, model.casefold()
    if think == "auto" and effort is None:
        return {}
    if "openrouter.ai" in host:
        reasoning = ({"enabled": think == "on"} if think != "auto" else {}) | ({"effort": effort} if effort else {})
        return {"reasoning": reasoning}
    body: dict[str, Any] = {"reasoning_effort": effort} if effort else {}
    if think == "auto":
        return body
    if host.endswith(("deepseek.com", "moonshot.ai", "moonshot.cn", "z.ai", "bigmodel.cn")):
        return body | {"thinking": {"type": "enabled" if think == "on" else "disabled"}}
    if _THINKS_BY_TEMPLATE.search(name):
        variable = "thinking" if "deepseek" in name or "granite" in name or "kimi" in name else "enable_thinking"
        return body | {"chat_template_kwargs": {variable: think == "on"}}
    if "mistral.ai" in host:
        return body | {"prompt_mode": "reasoning" if think == "on" else None}
    raise UsageError(
        f"deepdistill does not know how the thinking of {model} is switched",
        'send the field that its server takes: --body \'{"chat_template_kwargs": {"enable_thinking": false}}\'',
        code="thinking-unknown",
    )
