"""Every setting of `chat`, declared once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from .core.settings import Flag
from .families.thinking import Think

KVType = Literal["f16", "q8_0", "q4_0"]

_TALK, _SAMPLING, _ANSWER, _MODEL = "Conversation", "Sampling", "Answer", "Model"


@dataclass(frozen=True)
class SamplingRecipe:
    """How tokens are chosen. None leaves it to the conversation that is resumed, or else to the default."""

    temperature: Annotated[
        float | None, Flag("Sampling temperature. Greedy (0), unless set.", min=0, heading=_SAMPLING)
    ] = None
    top_p: Annotated[float | None, Flag("Nucleus sampling. Off (1), unless set.", min=0, max=1, heading=_SAMPLING)] = (
        None
    )
    top_k: Annotated[
        int | None, Flag("Choose from the k likeliest tokens. Off (0), unless set.", min=0, heading=_SAMPLING)
    ] = None
    min_p: Annotated[
        float | None,
        Flag(
            "Leave out tokens less likely than this share of the likeliest. Off (0), unless set.",
            min=0,
            max=1,
            heading=_SAMPLING,
        ),
    ] = None
    max_tokens: Annotated[
        int | None, Flag("Tokens per answer, thinking included. 2048, unless set.", min=1, heading=_SAMPLING)
    ] = None
    seed: Annotated[int | None, Flag("Seed of the sampling. 0, unless set.", min=0, heading=_SAMPLING)] = None


@dataclass(frozen=True)
class ChatRecipe:
    """How to talk to a GGUF file."""

    system: Annotated[str | None, Flag("A system message.", heading=_TALK, metavar="TEXT")] = None
    think: Annotated[
        Think | None, Flag("Whether the model thinks; auto leaves it to its template.", heading=_ANSWER)
    ] = None
    think_budget: Annotated[
        int | None, Flag("Tokens of thinking, at most; an answer always follows.", min=0, heading=_ANSWER)
    ] = None
    loop_guard: Annotated[bool, Flag("End thinking and answers that go in circles.", heading=_ANSWER)] = True
    schema: Annotated[
        Path | None, Flag("Make the answer fit the JSON schema in this file.", heading=_ANSWER, metavar="FILE")
    ] = None
    grammar: Annotated[
        Path | None, Flag("Make the answer fit the GBNF grammar in this file.", heading=_ANSWER, metavar="FILE")
    ] = None
    tools: Annotated[
        Path | None,
        Flag(
            "Offer the tools in this JSON file, in OpenAI's form; calls are printed in it too.",
            heading=_ANSWER,
            metavar="FILE",
        ),
    ] = None
    images: Annotated[
        tuple[Path, ...],
        Flag("Show an image with the first question. Repeatable.", name="image", heading=_TALK, metavar="FILE"),
    ] = ()
    fold: Annotated[bool, Flag("Show the thinking as one line.", heading=_TALK)] = False
    keep: Annotated[bool, Flag("Keep the conversation on this machine.", name="log", heading=_TALK)] = True
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    repeat_penalty: Annotated[float, Flag("Penalty on the last 64 tokens; 1 is off.", min=1, heading=_SAMPLING)] = 1.0
    dry: Annotated[float, Flag("DRY's multiplier against long repeats; 0 is off.", min=0, heading=_SAMPLING)] = 0.0
    n_ctx: Annotated[
        int | None,
        Flag(
            "Tokens of context. The model's own as far as memory allows, unless set.",
            min=16,
            name="context",
            heading=_MODEL,
        ),
    ] = None
    kv_type: Annotated[KVType, Flag("Type of the KV cache; q8_0 and q4_0 take less memory.", heading=_MODEL)] = "f16"
    speculate: Annotated[
        bool, Flag("Guess tokens ahead where that pays: faster on text that repeats.", heading=_MODEL)
    ] = False
    draft: Annotated[
        Path | None,
        Flag(
            "A small GGUF of the same vocabulary that guesses ahead; implies --speculate.",
            heading=_MODEL,
            metavar="FILE",
        ),
    ] = None
    mmproj: Annotated[
        Path | None,
        Flag(
            "The projector for images. The mmproj-….gguf beside the model, unless set.", heading=_MODEL, metavar="FILE"
        ),
    ] = None
    offline: Annotated[bool, Flag("Never touch the network.", heading="Running")] = False
