"""What a GGUF tells about itself, for people and for Ollama: a README, a Modelfile, and its use of memory."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ..core.text import format_bytes
from ..families.template import render
from ..families.thinking import Tags, tags_of
from ..gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from ..gguf.header import Header, read_gguf
from ..machine.memory import Footprint

MAX_CTX = 4096  # tokens: a phone has little memory, and its user little patience

_MIN_CTX = 1024
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# Placeholders, to be found in the rendered chat template.
_SYSTEM, _USER, _ANSWER = "A-system-message", "A-user-message", "An-answer"


@dataclass(frozen=True)
class ModelCard:
    """A file and what its header says, as people, pages and Ollama need it; `n_ctx` is what the memory allows."""

    path: Path
    header: Header
    n_ctx: int

    @classmethod
    def of(cls, path: Path, memory: int) -> ModelCard:
        """Read a file's header; `n_ctx` is the longest context, at most 4,096 tokens, that fits in so many bytes."""
        header = read_gguf(path)
        footprint = Footprint.of(path, header)
        return cls(path, header, min(footprint.max_ctx(memory), footprint.n_ctx_train or MAX_CTX, MAX_CTX))

    @cached_property
    def footprint(self) -> Footprint:
        """The memory that it needs."""
        return Footprint.of(self.path, self.header)

    @property
    def min_ctx(self) -> int:
        """The shortest useful context, in tokens: room for a question, the thinking and an answer."""
        return min(_MIN_CTX, self.footprint.n_ctx_train or _MIN_CTX)

    @property
    def fits(self) -> bool:
        """Whether the memory allows at least that."""
        return self.n_ctx >= self.min_ctx

    @property
    def memory_bytes(self) -> int:
        """The bytes of memory that it takes with its context."""
        return self.footprint.total_bytes(self.n_ctx)

    @property
    def name(self) -> str:
        """The file's name without its ending, safe in a URL and a shell."""
        return re.sub(r"[^\w.-]+", "-", self.path.stem, flags=re.ASCII).strip(".-") or "model"

    @property
    def size_bytes(self) -> int:
        """The file's size."""
        return self.path.stat().st_size

    @property
    def n_weights(self) -> int:
        """The number of weights in all tensors."""
        return sum(
            tensor.n_bytes // GGML_QUANT_SIZES[tensor.type][1] * GGML_QUANT_SIZES[tensor.type][0]
            for tensor in self.header.tensors.values()
        )

    @property
    def type(self) -> str:
        """The file type's name, such as Q4_K_M; where the file names none, the type that most tensors have."""
        try:
            return LlamaFileType(self.header.metadata["general.file_type"]).name.partition("_")[2]  # MOSTLY_Q4_K_M
        except (KeyError, ValueError):
            return Counter(tensor.type for tensor in self.header.tensors.values()).most_common(1)[0][0].name

    @property
    def is_float(self) -> bool:
        """Whether no tensor is quantized."""
        return all(tensor.type in _FLOATS for tensor in self.header.tensors.values())

    @property
    def tags(self) -> Tags | None:
        """The tags around its thinking; None if it names none."""
        return tags_of({key: value for key, value in self.header.metadata.items() if isinstance(value, str)})

    def special(self, kind: str) -> str:
        """Return the text of the `bos` or the `eos` token, empty if the file names none."""
        token = self.header.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        tokens = self.header.metadata.get("tokenizer.ggml.tokens") or []
        return str(tokens[token]) if isinstance(token, int) and token < len(tokens) else ""

    def render(self, *messages: dict[str, str]) -> str:
        """Return the prompt that its chat template makes of messages.

        Raises:
            ModelError: code "no-chat-template" or "template-refused".
        """
        source = self.header.metadata.get("tokenizer.chat_template")
        special = {f"{kind}_token": self.special(kind) for kind in ("bos", "eos")}
        return render(source, messages, thinking=True, variables=special)


def about(model: ModelCard) -> str:
    """Return the page's footer: type, size, origin, licence."""
    origin = ", ".join(name for name, _ in _bases(model.header.metadata))
    licence = model.header.metadata.get("general.license")
    parts = [
        f"{model.type}, {format_bytes(model.size_bytes)}",
        f"from {origin}" if origin else "",
        licence or "no licence named",
    ]
    return " · ".join(part for part in parts if part)


def readme(model: ModelCard, n_shards: int) -> str:
    """Return the folder's README.md."""
    metadata, file = model.header.metadata, f"{model.name}.gguf"
    bases = ", ".join(f"[{name}]({url})" if url else name for name, url in _bases(metadata)) or "not named in the file"
    tags = model.tags
    bits = 8 * model.footprint.weight_bytes / model.n_weights
    rows = [
        ("licence", metadata.get("general.license") or "not named in the file: ask where you got it"),
        ("made from", bases),
        ("architecture", f"{metadata.get('general.architecture')}, {_count(model.n_weights)} weights"),
        ("file", f"`{file}`, {model.type}, {format_bytes(model.size_bytes)}, {bits:.2f} bits a weight"),
        ("memory", f"about {format_bytes(model.memory_bytes)} with {model.n_ctx:,} tokens of context"),
        ("thinking", f"between `{tags.open}` and `{tags.close}`, before the answer" if tags else "no tags are named"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    parts = "one part" if n_shards == 1 else f"{n_shards} parts, `-00001-of-{n_shards:05d}.gguf` and so on,"
    return f"""# {model.name}

A language model as one file that phones, browsers and laptops run by themselves.

| | |
|---|---|
{table}

## In a browser

`web/` is a page that runs the model inside the browser. Serve the folder with any static file server:

    python -m http.server --directory web 8000

and open http://localhost:8000. At the first visit the browser keeps the page and the model on the device; from then on
it works without a network and without the server. Browsers allow that for `https` addresses and for `localhost` only.
From any other address, such as a laptop's in the local network, the page runs too, but more slowly and only while the
server does. To have it on a phone, put `web/` on any static host that has https, or serve it on the phone (see Termux).

The model is split into {parts} so that no file is too large for a host or a browser.
The page needs a browser with WebAssembly SIMD; without 64-bit memory, as on iPhones, it uses a slower build.
It contacts no other address than its own.

## In an app

Copy `{file}` to the device and open it with one of these; they are independent projects:

- [PocketPal AI](https://github.com/a-ghorbani/pocketpal-ai), Android and iPhone: Models, then add a local model
- [ChatterUI](https://github.com/Vali-98/ChatterUI), Android: Models, then import
- [LM Studio](https://lmstudio.ai), laptops: `lms import {file}`
- [llama.cpp](https://github.com/ggml-org/llama.cpp), everywhere: `llama-cli -m {file} --jinja -c {model.n_ctx}`

## With Ollama

    ollama create {model.name.lower()} -f Modelfile
    ollama run {model.name.lower()}

`Modelfile` holds the chat template, rewritten from the model's own for one question at a time.

## In Termux, on Android

With [Termux](https://termux.dev) installed and this folder in the phone's downloads, in the terminal:

    termux-setup-storage
    pkg install llama-cpp
    llama-cli -m ~/storage/downloads/FOLDER/{file} --jinja -c {model.n_ctx} --temp 0

The page, offline in the phone's browser:

    pkg install python
    python -m http.server --directory ~/storage/downloads/FOLDER/web 8000

then open http://localhost:8000.

## With deepdistill

    deepdistill chat {file}

## Third-party software in this folder

`web/wllama/` is [wllama](https://github.com/ngxson/wllama), llama.cpp for browsers, under the MIT licence beside it.
"""


def modelfile(model: ModelCard) -> str:
    """Return an Ollama Modelfile with the model's prompt format: Ollama itself knows only some chat templates."""
    lines = [f"FROM ./{model.name}.gguf"]
    if template := _ollama_template(model):
        lines.append(f'TEMPLATE """{template}"""')
    if (eos := model.special("eos")) and '"' not in eos:
        lines.append(f'PARAMETER stop "{eos}"')
    lines += ["PARAMETER temperature 0", f"PARAMETER num_ctx {model.n_ctx}"]
    if (licence := model.header.metadata.get("general.license")) and '"' not in licence:
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n"


def _ollama_template(model: ModelCard) -> str | None:
    """Return the prompt with and without a system message as a Go template; None if that cannot be expressed."""
    user = {"role": "user", "content": _USER}
    without = _as_go(model, model.render(user))
    try:
        with_system = _as_go(model, model.render({"role": "system", "content": _SYSTEM}, user))
    except ModelError:  # the template takes no system message
        with_system = without
    if not without or not with_system:
        return None
    both = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{without}{{{{ end }}}}"
    after = _after_answer(model, without.partition("{{ .Prompt }}")[0])
    return f"{without if without == with_system else both}{{{{ .Response }}}}{after}"


def _after_answer(model: ModelCard, before_question: str) -> str:
    """Return what the chat template puts between an answer and the next question: in most, a token and a newline."""
    question, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    between = model.render(question, answer, question).partition(_ANSWER)[2].partition(_USER)[0]
    return between.removesuffix(before_question) if between.endswith(before_question) else model.special("eos")


def _as_go(model: ModelCard, prompt: str) -> str | None:
    """Return a rendered prompt with Ollama's variables for the messages; Ollama adds BOS itself."""
    if "{{" in prompt or '"""' in prompt or _USER not in prompt:
        return None
    if model.header.metadata.get("tokenizer.ggml.add_bos_token"):
        prompt = prompt.removeprefix(model.special("bos"))
    return prompt.replace(_SYSTEM, "{{ .System }}").replace(_USER, "{{ .Prompt }}")


def _bases(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, URL or empty) of each model that this one was made from."""
    found: list[tuple[str, str]] = []
    while name := metadata.get(f"general.base_model.{len(found)}.name"):
        found.append((str(name), str(metadata.get(f"general.base_model.{len(found)}.repo_url") or "")))
    return found


def _count(n: int) -> str:
    """Return a number of weights as people write it: 134M, 7.2B."""
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"
