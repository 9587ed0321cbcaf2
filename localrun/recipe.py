"""Every setting of `chat`, declared once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .core.settings import setting
from .families.thinking import Think

KVType = Literal["f16", "q8_0", "q4_0"]

_TALK, _SAMPLING, _ANSWER, _MODEL = "Conversation", "Sampling", "Answer", "Model"


@dataclass(frozen=True)
class SamplingRecipe:
    """How tokens are chosen. None leaves it to the conversation that is resumed, or else to the default."""

    temperature: float | None = setting(None, "Sampling temperature. Greedy (0), unless set.", min=0, heading=_SAMPLING)
    top_p: float | None = setting(None, "Nucleus sampling. Off (1), unless set.", min=0, max=1, heading=_SAMPLING)
    top_k: int | None = setting(
        None, "Choose from the k likeliest tokens. Off (0), unless set.", min=0, heading=_SAMPLING
    )
    min_p: float | None = setting(
        None,
        "Leave out tokens less likely than this share of the likeliest. Off (0), unless set.",
        min=0,
        max=1,
        heading=_SAMPLING,
    )
    max_tokens: int | None = setting(
        None, "Tokens per answer, thinking included. 2048, unless set.", min=1, heading=_SAMPLING
    )
    seed: int | None = setting(None, "Seed of the sampling. 0, unless set.", min=0, heading=_SAMPLING)


@dataclass(frozen=True)
class ChatRecipe:
    """How to talk to a GGUF file."""

    system: str | None = setting(None, "A system message.", heading=_TALK, metavar="TEXT")
    think: Think | None = setting(None, "Whether the model thinks; auto leaves it to its template.", heading=_ANSWER)
    think_budget: int | None = setting(
        None, "Tokens of thinking, at most; an answer always follows.", min=0, heading=_ANSWER
    )
    loop_guard: bool = setting(True, "End thinking and answers that go in circles.", heading=_ANSWER)
    schema: Path | None = setting(
        None, "Make the answer fit the JSON schema in this file.", heading=_ANSWER, metavar="FILE"
    )
    grammar: Path | None = setting(
        None, "Make the answer fit the GBNF grammar in this file.", heading=_ANSWER, metavar="FILE"
    )
    tools: Path | None = setting(
        None,
        "Offer the tools in this JSON file, in OpenAI's form; calls are printed in it too.",
        heading=_ANSWER,
        metavar="FILE",
    )
    images: tuple[Path, ...] = setting(
        (), "Show an image with the first question. Repeatable.", name="image", heading=_TALK, metavar="FILE"
    )
    fold: bool = setting(False, "Show the thinking as one line.", heading=_TALK)
    keep: bool = setting(True, "Keep the conversation on this machine.", name="log", heading=_TALK)
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    repeat_penalty: float = setting(1.0, "Penalty on the last 64 tokens; 1 is off.", min=1, heading=_SAMPLING)
    dry: float = setting(0.0, "DRY's multiplier against long repeats; 0 is off.", min=0, heading=_SAMPLING)
    n_ctx: int | None = setting(
        None,
        "Tokens of context. The model's own as far as memory allows, unless set.",
        min=16,
        name="context",
        heading=_MODEL,
    )
    kv_type: KVType = setting("f16", "Type of the KV cache; q8_0 and q4_0 take less memory.", heading=_MODEL)
    speculate: bool = setting(False, "Guess tokens ahead where that pays: faster on text that repeats.", heading=_MODEL)
    draft: Path | None = setting(
        None,
        "A small GGUF of the same vocabulary that guesses ahead; implies --speculate.",
        heading=_MODEL,
        metavar="FILE",
    )
    mmproj: Path | None = setting(
        None,
        "The projector for images. The mmproj-….gguf beside the model, unless set.",
        heading=_MODEL,
        metavar="FILE",
    )
    offline: bool = setting(False, "Never touch the network.", heading="Running")
