"""What a model takes, against what llama.cpp says that it allocates; what fits; what a container leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

from deepdistill.errors import ArtifactError, ModelError, UsageError
from deepdistill.localrun.machine import hardware, memory
from deepdistill.localrun.machine.memory import Footprint, available_bytes, fit_context, flash_attention, n_cells

N_CTX = 16384
EMBD, HEADS, LAYERS, VOCAB = 64, 2, 4, 96

# llama.cpp's own words, in a process of its own: it says what it allocates in its log alone.
ALLOCATE = """
import ctypes, json, sys
import llama_cpp
said = []
@llama_cpp.llama_log_callback
def keep(level, text, data):
    said.append(text.decode())
llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
for path, kv_type, n_seq, flash in json.loads(sys.argv[1]):
    said.clear()
    model_params = llama_cpp.llama_model_default_params()
    if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
        model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = int(sys.argv[2]), 512, 512
    params.n_seq_max, params.kv_unified = n_seq, True
    if not flash:
        params.flash_attn_type, params.n_ubatch = 0, 128
    params.type_k = params.type_v = {"f16": 1, "q4_0": 2, "q8_0": 8}[kv_type]
    context = llama_cpp.llama_init_from_model(model, params)
    print(json.dumps([bool(context), "".join(said)]))
    if context:
        llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
"""


def allocate(*runs: tuple[Path, str, int], flash: bool = True) -> list[tuple[bool, dict[str, float]]]:
    """Return, for each (file, KV type, sequences), whether llama.cpp took it, and its buffers in MiB by name."""
    wanted = json.dumps([(str(path), kv_type, n_seq, flash) for path, kv_type, n_seq in runs])
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE, wanted, str(N_CTX)], capture_output=True, text=True, check=True
    )
    found = []
    for line in done.stdout.splitlines():
        worked, log = json.loads(line)
        sizes: dict[str, float] = {}
        for name, size in re.findall(r"(model|KV|compute) buffer size = +([\d.]+) MiB", log):
            sizes[name] = sizes.get(name, 0) + float(size)
        found.append((worked, sizes))
    return found


def write(path: Path, architecture: str, shapes: dict[str, tuple[int, ...]], add: Callable[[Any], None]) -> Path:
    """Write a model of zeros without a vocabulary."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(131072)
    writer.add_embedding_length(EMBD)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCAB)
    add(writer)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def layers(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes |= {"attn_norm": (EMBD,), "ffn_norm": (EMBD,)}
    shapes |= {"ffn_gate": (128, EMBD), "ffn_up": (128, EMBD), "ffn_down": (EMBD, 128)}
    return {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def latent_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek's latent attention: rank 32, rotary part 32, no position 32, values 32."""
    shapes = {
        "attn_q_a": (16, EMBD),
        "attn_q_a_norm": (16,),
        "attn_q_b": (HEADS * 64, 16),
        "attn_kv_a_mqa": (64, EMBD),
        "attn_kv_a_norm": (32,),
        "attn_k_b": (HEADS, 32, 32),
        "attn_v_b": (HEADS, 32, 32),
        "attn_output": (EMBD, HEADS * 32),
    }

    def add(writer: Any) -> None:
        writer.add_key_length(64)
        writer.add_value_length(32)
        writer.add_key_length_mla(64)
        writer.add_value_length_mla(32)
        writer.add_kv_lora_rank(32)
        writer.add_q_lora_rank(16)
        writer.add_rope_dimension_count(32)
        writer.add_leading_dense_block_count(LAYERS)
        writer.add_expert_count(2)
        writer.add_expert_used_count(1)
        writer.add_expert_shared_count(1)
        writer.add_expert_feed_forward_length(32)
        writer.add_expert_weights_scale(1.0)

    path = tmp_path_factory.mktemp("latent") / "latent.gguf"
    ends = {"token_embd": (VOCAB, EMBD), "output_norm": (EMBD,), "output": (VOCAB, EMBD)}
    return write(path, "deepseek2", ends | layers(shapes), add)


@pytest.fixture(scope="module")
def window_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3: a window of 64 tokens in five of six layers, one KV head for two."""
    shapes = {
        "attn_q": (HEADS * 32, EMBD),
        "attn_k": (32, EMBD),
        "attn_v": (32, EMBD),
        "attn_output": (EMBD, HEADS * 32),
        "attn_q_norm": (32,),
        "attn_k_norm": (32,),
        "post_attention_norm": (EMBD,),
        "post_ffw_norm": (EMBD,),
    }

    def add(writer: Any) -> None:
        writer.add_key_length(32)
        writer.add_value_length(32)
        writer.add_sliding_window(64)

    path = tmp_path_factory.mktemp("window") / "window.gguf"
    return write(path, "gemma3", {"token_embd": (VOCAB, EMBD), "output_norm": (EMBD,)} | layers(shapes), add)


@pytest.mark.parametrize("model", ["smollm2_gguf", "random_gguf", "latent_gguf", "window_gguf"])
def test_the_sum_is_what_llama_cpp_allocates(model: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    footprint = Footprint.of(path)
    runs = [(path, kv_type, n_seq) for kv_type in footprint.kv_types() for n_seq in (1, 4)]
    for (_, kv_type, n_seq), (worked, said) in zip(runs, allocate(*runs), strict=True):
        assert worked
        mib = footprint.kv_bytes_per_token(kv_type) * N_CTX / 2**20
        assert said["KV"] == pytest.approx(mib, abs=0.011), (kv_type, n_seq)  # it rounds two numbers to 0.01
        assert said["model"] == pytest.approx(footprint.weight_bytes / 2**20, abs=0.006)
        room = footprint.total_bytes(N_CTX, kv_type, n_seq) / 2**20
        assert sum(said.values()) < room + 2, "the batch's buffers are not covered"
        assert room < 1.2 * sum(said.values()) + 16, "more is asked for than is needed"


@pytest.mark.parametrize("model", ["smollm2_gguf", "random_gguf", "latent_gguf", "window_gguf"])
def test_the_scores_are_covered_where_there_is_no_flash_attention(model: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    footprint = Footprint.of(path)
    ((worked, said),) = allocate((path, "f16", 1), flash=False)
    assert worked
    assert sum(said.values()) < (footprint.total_bytes(N_CTX) + footprint.score_bytes(N_CTX)) / 2**20 + 2


def test_one_sequence_does_without_flash_attention_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = MODEL.total_bytes(4096) + 2 * 4 * 32 * memory.N_MICRO_BATCH * 4096
    room = int(enough / 0.9) + 2
    assert flash_attention(MODEL, 4096, kv_type="f16", available=room) is False
    assert flash_attention(MODEL, 4097, kv_type="f16", available=room) is None
    assert flash_attention(MODEL, 4096, kv_type="q8_0", available=10**12) is None, "a quantized cache needs it"
    monkeypatch.setattr(memory, "gpus", lambda: [object()])
    assert flash_attention(MODEL, 4096, kv_type="f16", available=10**12) is None


def test_a_kv_type_that_the_heads_do_not_divide_into_is_refused_as_llama_cpp_does(random_gguf: Path) -> None:
    footprint = Footprint.of(random_gguf)  # heads of 16
    assert footprint.kv_types() == ["f16"]
    assert [worked for worked, _ in allocate((random_gguf, "q8_0", 1), (random_gguf, "q4_0", 1))] == [False, False]
    with pytest.raises(UsageError, check=lambda error: error.code == "kv-type-unfit"):
        fit_context(random_gguf, "q8_0")
    with pytest.raises(UsageError, check=lambda error: error.code == "no-such-kv-type"):
        fit_context(random_gguf, "q3")


def test_what_a_header_says(latent_gguf: Path, window_gguf: Path, smollm2_gguf: Path) -> None:
    assert Footprint.of(window_gguf).sliding_window == 64
    assert Footprint.of(latent_gguf).sliding_window is None
    smollm2 = Footprint.of(smollm2_gguf)
    assert (smollm2.n_ctx_train, smollm2.n_embd, smollm2.n_vocab) == (8192, 576, 49152)
    assert smollm2.kv_rows == ((3, 64),) * 60
    assert smollm2.read_bytes == smollm2.weight_bytes  # tied: the embedding is the output matrix
    latent = Footprint.of(latent_gguf)
    assert latent.read_bytes == latent.weight_bytes - VOCAB * EMBD * 4


def test_layers_without_a_cache_of_their_own_and_skipped_experts(tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        writer.add_key_length(32)
        writer.add_value_length(16)
        writer.kv_data[0].pop("llama.attention.head_count_kv")
        writer.add_head_count_kv([0, 2, 0, 1])
        writer.add_expert_count(8)
        writer.add_expert_used_count(2)

    shapes = {"token_embd": (VOCAB, EMBD), "blk.0.ffn_up_exps": (8, 32, EMBD), "blk.0.ffn_gate_inp": (8, EMBD)}
    footprint = Footprint.of(write(tmp_path / "moe.gguf", "llama", shapes, add))
    assert footprint.kv_rows == ((2, 32), (2, 16), (1, 32), (1, 16))
    assert footprint.read_bytes == 4 * EMBD * (VOCAB + 2 * 32 + 8)


def test_a_split_model_counts_whole(tmp_path: Path) -> None:
    write(tmp_path / "m-00001-of-00002.gguf", "llama", {"token_embd": (VOCAB, EMBD)}, lambda writer: None)
    write(tmp_path / "m-00002-of-00002.gguf", "llama", {"output": (VOCAB, EMBD)}, lambda writer: None)
    footprint = Footprint.of(tmp_path / "m-00001-of-00002.gguf")
    assert footprint.weight_bytes == 2 * 4 * VOCAB * EMBD
    assert footprint.read_bytes == 4 * VOCAB * EMBD


def test_a_file_that_is_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + b"\xff" * 400)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "gguf-broken"):
        fit_context(tmp_path / "junk.gguf")


MODEL = Footprint(Path("big.gguf"), 32768, 4096, 32, 32000, ((8, 128),) * 64, None, 4_000_000_000, 4_000_000_000)


def test_the_context_is_the_models_own_up_to_the_default() -> None:
    assert fit_context(MODEL, available=10**12) == memory.MAX_DEFAULT_CTX
    assert fit_context(replace(MODEL, n_ctx_train=2000), available=10**12) == 2000
    assert fit_context(replace(MODEL, n_ctx_train=0), available=10**12) == memory.MAX_DEFAULT_CTX
    assert fit_context(MODEL, wanted=20000, available=10**12) == 20000


@pytest.mark.parametrize("kv_type", memory.KV_TYPES)
@pytest.mark.parametrize("n_seq", [1, 16])
def test_the_longest_context_is_the_last_that_fits(kv_type: str, n_seq: int) -> None:
    available = 10**10
    longest = MODEL.max_ctx(available, kv_type, n_seq)
    assert longest % 256 == 0
    usable = available * 0.9
    assert MODEL.total_bytes(longest, kv_type, n_seq) <= usable < MODEL.total_bytes(longest + 256, kv_type, n_seq)
    assert fit_context(MODEL, kv_type, n_seq=n_seq, wanted=longest, available=available) == longest
    with pytest.raises(ModelError, check=lambda error: error.code == "not-enough-memory"):
        fit_context(MODEL, kv_type, n_seq=n_seq, wanted=longest + 1, available=available)


def test_without_a_wish_the_context_shrinks_to_the_memory() -> None:
    assert fit_context(MODEL, available=5_500_000_000) == MODEL.max_ctx(5_500_000_000) == 6400


def test_what_would_fit_is_said_and_does_fit() -> None:
    available = 6_500_000_000
    with pytest.raises(ModelError) as refused:
        fit_context(MODEL, wanted=16384, available=available)
    assert refused.value.message == (
        "not enough memory: big.gguf with 16384 tokens of f16 context takes 6.2 GB, and there is room for 5.8 GB"
    )
    found = re.fullmatch(r"what would fit: --context (\d+), or --kv-type (\w+) with this context", refused.value.hint)
    assert found
    assert fit_context(MODEL, wanted=int(found[1]), available=available) == int(found[1])
    assert fit_context(MODEL, found[2], wanted=16384, available=available) == 16384


def test_no_more_context_is_recommended_than_the_model_was_trained_for() -> None:
    with pytest.raises(ModelError) as refused:
        fit_context(MODEL, wanted=10**9, available=10**12)
    assert refused.value.hint == "what would fit: --context 32768, the model's own"


def test_when_the_weights_alone_do_not_fit_a_smaller_file_is_named() -> None:
    with pytest.raises(ModelError) as refused:
        fit_context(MODEL, available=2_000_000_000)
    found = re.fullmatch(r"a file of at most (\d\.\d) GB would fit: .*", refused.value.hint)
    assert found
    smaller = replace(MODEL, weight_bytes=int((float(found[1]) - 0.05) * 1e9))
    assert fit_context(smaller, available=2_000_000_000) >= 256
    with pytest.raises(ModelError) as refused:
        fit_context(MODEL, available=10_000_000)
    assert refused.value.hint == "close other programs"


def test_many_sequences_need_room_each() -> None:
    assert n_cells(300, 1) == 300
    assert n_cells(300, 16) == 16 * memory.ROOM_PER_SEQUENCE
    room = MODEL.total_bytes(4096) / 0.9 + 1
    assert fit_context(MODEL, n_seq=8, wanted=4096, available=int(room)) == 4096
    with pytest.raises(ModelError) as refused:
        fit_context(MODEL, n_seq=12, wanted=4096, available=int(room))
    assert refused.value.hint == "what would fit: --kv-type q8_0 with this context"
    with pytest.raises(ModelError) as refused:
        fit_context(MODEL, "q4_0", n_seq=640, wanted=4096, available=int(room))
    assert refused.value.hint == "what would fit: fewer sequences at once"


def test_the_systems_own_number_is_psutils(machine: Callable[[dict[str, str]], int]) -> None:
    now = pytest.approx(psutil.virtual_memory().available, rel=0.2)  # other programs come and go between
    assert machine({}) == now
    assert machine({"proc/meminfo": Path("/proc/meminfo").read_text()}) == now
    assert machine({"proc/meminfo": "MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:       7 kB\n"}) == 7 * 1024


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], int]:
    """Write files below a root of our own; return what is available there."""
    monkeypatch.setattr(hardware, "ROOT", tmp_path)

    def read(files: dict[str, str]) -> int:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return available_bytes()

    return read


def test_without_control_groups_the_system_says(machine: Callable[[dict[str, str]], int]) -> None:
    kib = int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]
    assert machine({}) == pytest.approx(kib * 1024, rel=0.1)


STAT = "anon 500\ninactive_file 30\nactive_file 20\n"


@pytest.mark.parametrize("place", ["/", "/pod/one", "/not/seen/from/here"])
def test_a_container_of_version_2_leaves_its_limit(place: str, machine: Callable[[dict[str, str]], int]) -> None:
    group = "sys/fs/cgroup" if place.startswith("/not") else f"sys/fs/cgroup{place}".rstrip("/")
    files = {"memory.max": "1000\n", "memory.current": "550\n", "memory.stat": STAT}
    assert machine({"proc/self/cgroup": f"0::{place}\n"} | {f"{group}/{k}": v for k, v in files.items()}) == 500


def test_the_tightest_group_above_counts(machine: Callable[[dict[str, str]], int]) -> None:
    files = {
        "proc/self/cgroup": "0::/pod/one\n",
        "sys/fs/cgroup/pod/one/memory.max": "max\n",
        "sys/fs/cgroup/pod/one/memory.current": "300\n",
        "sys/fs/cgroup/pod/memory.max": "900\n",
        "sys/fs/cgroup/pod/memory.current": "800\n",
        "sys/fs/cgroup/memory.max": "5000\n",
    }
    assert machine(files) == 100


def test_a_container_of_version_1_leaves_its_limit(machine: Callable[[dict[str, str]], int]) -> None:
    files = {
        "proc/self/cgroup": "5:devices:/x\n4:cpu,memory:/docker/x\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "700\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 60\ntotal_active_file 40\n",
    }
    assert machine(files) == 400
    assert (
        machine({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}) > 10**8
    )  # its way to say no limit
