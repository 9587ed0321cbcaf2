"""An image goes the whole way: a file, a tiny random projector, the model's KV cache, the logits after it."""

from __future__ import annotations

import ctypes
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_cpp import mtmd_cpp

from deepdistill.errors import DeepDistillError, ModelError
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.llama import Context, Entry, Model
from deepdistill.localrun.engine.vision import MARKER, Projector, find_mmproj, with_images

N_TEXT, N_VISION, N_FF, N_LAYER = 64, 32, 64, 2  # the first is that of conftest's model
IMAGE, PATCH = 28, 7
N_IMAGE_TOKENS = (IMAGE // PATCH) ** 2


def write_mmproj(path: Path, *, n_text: int = N_TEXT, kind: str = "mlp", without: str = "") -> Path:
    """Write a tiny LLaVA projector with random weights: a vision transformer and two linear layers."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", kind)
    writer.add_uint32("clip.vision.embedding_length", N_VISION)
    writer.add_uint32("clip.vision.feed_forward_length", N_FF)
    writer.add_uint32("clip.vision.block_count", N_LAYER)
    writer.add_uint32("clip.vision.projection_dim", n_text)
    writer.add_uint32("clip.vision.image_size", IMAGE)
    writer.add_uint32("clip.vision.patch_size", PATCH)
    writer.add_uint32("clip.vision.attention.head_count", 2)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (N_VISION, 3, PATCH, PATCH),
        "v.position_embd.weight": (N_IMAGE_TOKENS, N_VISION),
        "mm.0.weight": (n_text, N_VISION),
        "mm.0.bias": (n_text,),
        "mm.2.weight": (n_text, n_text),
        "mm.2.bias": (n_text,),
    }
    for i in range(N_LAYER):
        block = f"v.blk.{i}"
        shapes |= {f"{block}.attn_{name}.weight": (N_VISION, N_VISION) for name in ("q", "k", "v", "out")}
        shapes |= {f"{block}.{name}.{part}": (N_VISION,) for name in ("ln1", "ln2") for part in ("weight", "bias")}
        shapes |= {f"{block}.ffn_up.weight": (N_FF, N_VISION), f"{block}.ffn_down.weight": (N_VISION, N_FF)}
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(name, rng.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def png(*colours: tuple[int, int, int], side: int = 20) -> bytes:
    """Return a square PNG with a column for each colour."""
    row = b"\0" + b"".join(bytes(colours[x * len(colours) // side]) for x in range(side))

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(row * side)) + part(b"IEND", b"")


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))
ASK = f"<|im_start|>user\n{with_images('what is it?', 1)}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model(random_gguf: Path) -> Iterator[Model]:
    loaded = Model(random_gguf)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Iterator[Projector]:
    loaded = Projector(write_mmproj(tmp_path_factory.mktemp("vision") / "mmproj.gguf"), model, 1)
    yield loaded
    loaded.close()


@pytest.fixture
def new_context(model: Model) -> Iterator[Callable[..., Context]]:
    opened: list[Context] = []

    def open_context(n_ctx: int = 512, n_batch: int = 64) -> Context:
        opened.append(Context(model, n_ctx, n_seq=2, n_batch=n_batch))
        return opened[-1]

    yield open_context
    for context in opened:
        context.close()


def logits_after(projector: Projector, context: Context, images: list[Any], **more: Any) -> np.ndarray:
    context.forget(more.get("sequence", 0))
    _, at = projector.evaluate(context, ASK, images=images, **more)
    return context.logits(at).copy()


def test_images_that_differ_change_what_follows(projector: Projector, new_context: Any, tmp_path: Path) -> None:
    context = new_context()
    (tmp_path / "red.png").write_bytes(RED)
    red, blue = (logits_after(projector, context, [image]) for image in (RED, BLUE))
    assert np.abs(red - blue).max() > 0.1
    np.testing.assert_array_equal(red, logits_after(projector, context, [tmp_path / "red.png"]))
    np.testing.assert_allclose(red, logits_after(projector, context, [RED], sequence=1), atol=1e-4)


def test_positions_are_those_of_text_and_image(projector: Projector, new_context: Any, model: Model) -> None:
    held, _ = projector.evaluate(new_context(), ASK, images=[RED])
    before, after = ASK.split(MARKER)
    assert [number for number in held if number >= 0] == model.tokenize(before) + model.tokenize(after)
    start = len(model.tokenize(before))
    assert len(set(held[start : start + N_IMAGE_TOKENS])) == 1
    assert max(held[start : start + N_IMAGE_TOKENS]) < 0
    assert len(held) == len(model.tokenize(before)) + N_IMAGE_TOKENS + len(model.tokenize(after))


def by_libmtmd(projector: Projector, context: Context, image: bytes) -> tuple[int, np.ndarray]:
    """Evaluate the prompt with the library's own helper for all of it; return the new n_past and the logits."""
    handle = projector.handle
    buffer = (ctypes.c_uint8 * len(image)).from_buffer_copy(image)
    bitmap = mtmd_cpp.mtmd_helper_bitmap_init_from_buf(handle, buffer, len(image), False)
    chunks, data, n_past = mtmd_cpp.mtmd_input_chunks_init(), ASK.encode(), ctypes.c_int32()
    text = mtmd_cpp.mtmd_input_text(data, len(data), False, True)
    assert mtmd_cpp.mtmd_tokenize(handle, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1) == 0
    arguments = (chunks, 0, 0, context.n_batch, True, ctypes.byref(n_past))
    assert mtmd_cpp.mtmd_helper_eval_chunks(handle, context.handle, *arguments) == 0
    mtmd_cpp.mtmd_input_chunks_free(chunks)
    mtmd_cpp.mtmd_bitmap_free(bitmap)
    return n_past.value, context.logits(-1).copy()


@pytest.mark.parametrize("n_batch", [64, 5])
def test_equals_libmtmds_own_evaluation(n_batch: int, projector: Projector, new_context: Any) -> None:
    n_past, expected = by_libmtmd(projector, new_context(n_batch=n_batch), BLUE)
    context = new_context(n_batch=n_batch)
    held, at = projector.evaluate(context, ASK, images=[BLUE])
    assert len(held) == n_past
    np.testing.assert_allclose(context.logits(at), expected, atol=1e-4)


def test_generation_goes_on_after_the_image(projector: Projector, new_context: Any) -> None:
    """Greedy tokens, one by one, against one evaluation of the whole text."""
    context = new_context()
    held, at = projector.evaluate(context, ASK, images=[RED])
    said = [int(context.logits(at).argmax())]
    for i in range(3):
        assert context.decode([Entry(said[-1], len(held) + i, 0, True)])
        said.append(int(context.logits(0).argmax()))
    other = new_context()
    projector.evaluate(other, ASK, images=[RED])
    assert other.decode([Entry(token, len(held) + i, 0, True) for i, token in enumerate(said[:3])])
    assert [int(other.logits(i).argmax()) for i in range(3)] == said[1:]


def test_what_is_cached_is_not_computed_again(
    projector: Projector, new_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = new_context()
    longer = f"{ASK}red<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    _, at = projector.evaluate(context, longer, images=[RED])
    expected = context.logits(at).copy()
    context.forget(0)
    held, _ = projector.evaluate(context, ASK, images=[RED])
    seen, evaluate = [], mtmd_cpp.mtmd_helper_eval_chunk_single

    def count(*arguments: Any) -> int:
        seen.append(arguments)
        return int(evaluate(*arguments))

    monkeypatch.setattr(mtmd_cpp, "mtmd_helper_eval_chunk_single", count)
    again, at = projector.evaluate(context, longer, images=[RED], cached=held)
    assert seen == []
    assert again[: len(held)] == held
    np.testing.assert_allclose(context.logits(at), expected, atol=1e-4)
    same, at = projector.evaluate(
        context, longer, images=[RED], cached=again
    )  # the last token runs again, for its logits
    assert same == again
    np.testing.assert_allclose(context.logits(at), expected, atol=1e-4)
    projector.evaluate(context, longer, images=[BLUE], cached=again)
    assert len(seen) == 1


def test_any_part_of_what_is_cached_will_do(projector: Projector, new_context: Any) -> None:
    """Half an image is none: it is seen again."""
    context = new_context()
    held, at = projector.evaluate(context, ASK, images=[RED])
    expected = context.logits(at).copy()
    for n in range(0, len(held) + 1, 5):
        again, at = projector.evaluate(context, ASK, images=[RED], cached=held[:n])
        assert again == held
        np.testing.assert_allclose(context.logits(at), expected, atol=1e-4)


def test_another_image_in_the_same_place_is_seen(projector: Projector, new_context: Any) -> None:
    context = new_context()
    held, _ = projector.evaluate(context, ASK, images=[RED])
    _, at = projector.evaluate(context, ASK, images=[BLUE], cached=held)
    blue = context.logits(at).copy()
    np.testing.assert_allclose(blue, logits_after(projector, new_context(), [BLUE]), atol=1e-4)


def test_two_images_keep_their_order(projector: Projector, new_context: Any) -> None:
    prompt = with_images("compare", 2)
    assert prompt == f"{MARKER}\n{MARKER}\ncompare"
    results = []
    for images in ([RED, BLUE], [BLUE, RED]):
        context = new_context()
        held, at = projector.evaluate(context, prompt, images=images)
        assert sum(number < 0 for number in held) == 2 * N_IMAGE_TOKENS
        results.append(context.logits(at).copy())
    assert np.abs(results[0] - results[1]).max() > 0.1


def test_bos_comes_first_where_the_model_asks_for_it(build_gguf: Any, tmp_path: Path) -> None:
    path = write_mmproj(tmp_path / "mmproj.gguf")
    model = Model(build_gguf(tmp_path / "bos.gguf", add_bos=True))
    context, projector = Context(model, 256, n_batch=64), Projector(path, model, 1)
    for prompt in (f"{MARKER}\nx", f"<|endoftext|>{MARKER}\nx"):
        held, _ = projector.evaluate(context, prompt, images=[RED])
        assert [number for number in held if number >= 0] == model.tokenize("\nx")
    projector.close()
    context.close()
    model.close()


@pytest.mark.parametrize(
    ("prompt", "images", "code"),
    [
        (ASK, ["gone.png"], "no-such-image"),
        (ASK, ["."], "file-unreadable"),
        (ASK, [b""], "image-broken"),
        (ASK, [b"RIFF\0\0\0\0WAVE"], "image-broken"),
        (ASK, [RED[:60]], "image-broken"),
        (ASK, [], "images-misplaced"),
        ("no marker", [RED], "images-misplaced"),
        (f"look {MARKER}", [RED], "images-misplaced"),
        (f"{MARKER}\n" * 40 + "x", [RED] * 40, "prompt-too-long"),
    ],
)
def test_what_cannot_be_shown_is_one_error(
    prompt: str,
    images: list[Any],
    code: str,
    projector: Projector,
    new_context: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    context = new_context()
    given = [tmp_path / image if isinstance(image, str) else image for image in images]
    with pytest.raises(DeepDistillError, check=lambda error: error.code == code):
        projector.evaluate(context, prompt, images=given)
    assert capfd.readouterr().err == ""
    assert context.forget(0, 100) == 0  # nothing is left behind


def test_a_full_cache_is_told(projector: Projector, new_context: Any) -> None:
    """The sequences share the cells: what another one holds leaves no room."""
    context = new_context(n_ctx=256)
    for start in range(0, 240, 60):
        assert context.decode([Entry(5, start + i, 1, False) for i in range(60)])
    with pytest.raises(ModelError, check=lambda error: error.code == "context-full"):
        projector.evaluate(context, ASK, images=[RED])


def test_a_wrong_projector_is_told(
    model: Model, random_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def error_of(path: Path) -> DeepDistillError:
        with pytest.raises(DeepDistillError) as caught:
            Projector(path, model, 1)
        assert "\n" not in caught.value.message
        return caught.value

    other = write_mmproj(tmp_path / "other.gguf", n_text=48)
    whole = write_mmproj(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-100])
    (tmp_path / "text.gguf").write_text("hello")
    assert error_of(tmp_path / "gone.gguf").code == "no-such-projector"
    assert error_of(tmp_path / "text.gguf").code == "gguf-broken"
    assert error_of(tmp_path / "cut.gguf").code == "gguf-cut-short"
    assert error_of(random_gguf).code == "not-a-projector"
    assert error_of(other).code == "projector-mismatch"
    assert "n_embd = 64" in error_of(other).message
    assert "unknown projector type: new" in error_of(write_mmproj(tmp_path / "new.gguf", kind="new")).message
    less = write_mmproj(tmp_path / "less.gguf", without="v.blk.1.attn_out.weight")
    assert "v.blk.1.attn_out.weight" in error_of(less).message
    assert capfd.readouterr().err == ""


def test_the_projector_beside_a_model_is_found(tmp_path: Path) -> None:
    small, large = tmp_path / "Small-VL-256M-Q8_0.gguf", tmp_path / "Large-VL-2B-Q4_K_M.gguf"
    small.touch()
    large.touch()
    assert find_mmproj(small) is None
    for name in ("mmproj-Small-VL-256M-f16.gguf", "mmproj-Large-VL-2B-f16.gguf"):
        (tmp_path / name).touch()
    assert find_mmproj(small) == tmp_path / "mmproj-Small-VL-256M-f16.gguf"
    assert find_mmproj(large) == tmp_path / "mmproj-Large-VL-2B-f16.gguf"


def test_an_engine_answers_about_an_image(random_gguf: Path, tmp_path: Path) -> None:
    mmproj = write_mmproj(tmp_path / "mmproj.gguf")
    sampling = Sampling(max_tokens=30)
    with Engine(random_gguf, n_threads=1, mmproj_path=mmproj) as engine:
        assert engine.sees_images
        answers = [[step.token for step in engine.stream(ASK, sampling, images=[image])] for image in (RED, BLUE, RED)]
        assert answers[0] == answers[2] != answers[1]
        follow_up = f"{ASK}red<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
        kept = list(engine.stream(follow_up, sampling, images=[RED]))
        text = engine.prompt([{"role": "user", "content": "why?"}])
        after_image = [step.token for step in engine.stream(text, sampling)]
        assert kept[0].n_prompt > len(engine.tokenize(follow_up))
    with Engine(random_gguf, n_threads=1, mmproj_path=mmproj) as engine:
        assert [s.token for s in engine.stream(follow_up, sampling, images=[RED])] == [s.token for s in kept]
        assert [s.token for s in engine.stream(text, sampling)] == after_image
    with (
        Engine(random_gguf, n_threads=1) as engine,
        pytest.raises(ModelError, check=lambda error: error.code == "no-projector"),
    ):
        list(engine.stream(ASK, sampling, images=[RED]))
