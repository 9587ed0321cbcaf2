"""Log-probabilities of a given text from a server: vLLM's, which tokenizes a conversation and scores any prompt.

`/tokenize` says which tokens the chat template makes of the conversation, so that the place of each of the answer's
tokens is known; a completion of one token with `prompt_logprobs` gives the most probable ones at every place. OpenAI's
API has nothing of the kind, so no other server named in docs/teachers.md does.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/ (Tokenizer API, completions' extra parameters).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from ....errors import ModelError, TeacherError
from ....localrun.core.generation import Message, TopLogprobs
from .retry import backoff
from .server import CONNECT_S, Retryable, Server, tls_context

_ATTEMPTS = 5
# Until a server has given tokens once: it may not know the question, and answer with silence.
_FIRST_ATTEMPTS, _FIRST_TIMEOUT_S = 2, 20.0


class Scorer:
    """Asks one server for the tokens of texts and for the log-probabilities of given ones. Safe from many threads."""

    def __init__(self, server: Server, model: str, timeout_s: float) -> None:
        self._server, self._model, self._timeout_s = server, model, timeout_s
        self._gives_tokens = False
        self._client = httpx.Client(
            headers=server.headers, timeout=httpx.Timeout(None, connect=CONNECT_S), verify=tls_context()
        )

    def tokens_of(self, text: str | Sequence[Message]) -> list[int]:
        """Return the token ids of a text, or of a conversation up to where its answer begins.

        Raises:
            TeacherError: `code` "cannot-score" or "server-keeps-failing".
        """
        body: dict[str, Any] = {"model": self._model, "add_special_tokens": False}
        if isinstance(text, str):
            body |= {"prompt": text}
        else:
            body |= {"messages": [dict(message) for message in text], "add_generation_prompt": True}
        # /tokenize is beside /v1, not in it.
        found = self._ask(f"{self._server.url.removesuffix('/v1')}/tokenize", body).get("tokens")
        if not isinstance(found, list) or not found or not all(type(token) is int for token in found):
            raise self._cannot("it does not give tokens")
        self._gives_tokens = True
        return found

    def score(self, messages: Sequence[Message], answer: str | Sequence[int], *, k: int) -> TopLogprobs:
        """Return the k most probable tokens `[T, k]` at the place of each of the answer's T, its own among them.

        Raises:
            TeacherError: `code` "cannot-score" or "server-keeps-failing".
            ModelError: `code` "context-too-small".
        """
        prompt = self.tokens_of(messages)
        ids = self.tokens_of(answer) if isinstance(answer, str) else list(answer)
        body = {"model": self._model, "prompt": [*prompt, *ids], "max_tokens": 1, "temperature": 0}
        choices = self._ask(f"{self._server.url}/completions", body | {"prompt_logprobs": k}).get("choices")
        places = choices[0].get("prompt_logprobs") if isinstance(choices, list) and choices else None
        if not isinstance(places, list) or len(places) != len(prompt) + len(ids):
            raise self._cannot("it does not score a prompt")
        return _top(places[len(prompt) :], ids, k)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        attempt, most = 1, _ATTEMPTS if self._gives_tokens else _FIRST_ATTEMPTS
        while True:
            try:
                return self._ask_once(url, body)
            except Retryable as error:
                if attempt == most:
                    text, hint = f"{self._server.host} does not score: {error}", "try again when it works"
                    raise TeacherError(text, hint, code="server-keeps-failing") from None
            time.sleep(backoff(attempt, None, longest_s=30.0))
            attempt += 1

    def _ask_once(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            wait_s = self._timeout_s if self._gives_tokens else min(self._timeout_s, _FIRST_TIMEOUT_S)
            response = self._client.post(url, json=body, timeout=httpx.Timeout(wait_s, connect=CONNECT_S))
        except httpx.RequestError as error:
            raise Retryable(self._server.reason_of(error)) from None
        if response.status_code == 400 and "context length" in response.text:
            raise ModelError(
                f"the text does not fit the context of {self._model} at {self._server.host}",
                "give a shorter text, or serve the model with a larger context",
                code="context-too-small",
            )
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise Retryable(f"HTTP {response.status_code}", status=response.status_code)
        try:
            found = response.json() if response.status_code == 200 else None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._cannot(f"HTTP {response.status_code}")
        return found

    def _cannot(self, why: str) -> TeacherError:
        return TeacherError(
            f"{self._server.host} gives no log-probabilities of a given text ({why})",
            "vLLM does, and so does every model in this process",
            code="cannot-score",
        )


def _top(places: Sequence[Any], ids: Sequence[int], k: int) -> TopLogprobs:
    """Return the k best tokens of each place; the given token takes the last place if it is not among them."""
    top_ids = np.full((len(ids), k), -1, np.int32)
    values = np.full((len(ids), k), -np.inf, np.float32)
    for row, (place, given) in enumerate(zip(places, ids, strict=True)):
        found = {int(token): float(entry["logprob"]) for token, entry in place.items()}
        best = sorted(found, key=lambda token: -found[token])[:k]
        if given in found and given not in best:
            best[-1] = given
        top_ids[row, : len(best)] = best
        values[row, : len(best)] = [found[token] for token in best]
    return TopLogprobs(top_ids, values)
