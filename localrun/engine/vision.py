"""Show images to a model, with an mmproj file and llama.cpp's multimodal library, libmtmd.

A projector turns an image into embeddings of the text model's size, which are decoded in place of a marker in the
prompt. We put the marker into the user's text, before the question, and the chat template renders it as any other
text: that works with every template, and libmtmd adds the model's own begin and end of an image.

What a sequence holds is a list with one number a position, as for text: a token, or for each position of an image the
same negative number, a hash of that image. So a longer prompt that begins with the same text and images finds them in
the KV cache. (A model with M-RoPE gives an image fewer positions than it takes cells.)

Left out on purpose: sound and video, which the same library reads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ArtifactError, ModelError, UsageError
from ..core.closes import Closes
from ..gguf.header import read_gguf
from .library import clear_log, keep_log, logged_reason, start_library
from .llama import Context, Model

MARKER = "<__media__>"
_TEXT, _IMAGE = 0, 1  # mtmd_input_chunk_type
_KV_FULL = 1
_MAGIC = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF8",
    b"BM",
)  # libmtmd would hand other files to ffmpeg, if there is one


def with_images(text: str, n_images: int) -> str:
    """Return a user's text with the markers of its images in front."""
    return f"{MARKER}\n" * n_images + text


def find_mmproj(model_path: Path) -> Path | None:
    """Return the projector beside a model; of several, the one whose name is most like the model's."""
    found = sorted(path for path in model_path.parent.glob("*.gguf") if "mmproj" in path.name and path != model_path)

    def likeness(path: Path) -> float:
        return SequenceMatcher(None, path.name, model_path.name).ratio()

    return max(found, key=likeness, default=None)


class _Chunk(NamedTuple):
    """A piece of a prompt: its text or image, and what each of its positions holds."""

    handle: Any
    is_image: bool
    held: list[int]


class Projector(Closes):
    """A loaded mmproj file. Close it before the model that it was loaded for."""

    def __init__(self, path: Path, model: Model, n_threads: int) -> None:
        """Load a file.

        Raises:
            ArtifactError: code "no-such-projector", "not-a-projector", or see `read_gguf`.
            ModelError: code "projector-mismatch": it belongs to another model; "load-failed": see `llama.Model`.
        """
        _check_projector(path)
        self._library = _library()
        self.path, self.model = path, model
        params = self._library.mtmd_context_params_default()
        params.n_threads, params.print_timings = n_threads, False
        clear_log()
        self.handle = self._library.mtmd_init_from_file(os.fsencode(path), model.handle, params)
        if not self.handle:
            raise _load_error(path, model.path, logged_reason())
        if not self._library.mtmd_support_vision(self.handle):
            self.close()
            raise ModelError(f"{path} cannot read images: it is a projector for sound", code="not-a-projector")

    def evaluate(
        self,
        context: Context,
        prompt: str,
        *,
        images: Sequence[Path | bytes],
        cached: Sequence[int] = (),
        sequence: int = 0,
    ) -> tuple[list[int], int]:
        """Bring a sequence to a prompt, so that generation can continue from its end.

        The prompt holds one `MARKER` for each image, in order; an image is a file or its bytes. `cached` is what the
        sequence holds before the call: a beginning that the prompt shares is not computed again. Returns what the
        sequence holds after it, one number a position, and the index of the last token's logits in the context's last
        batch. After an error the sequence is empty.

        Raises:
            ArtifactError: code "no-such-image", "image-broken" or "file-unreadable".
            ModelError: code "prompt-too-long" or "image-too-large".
            UsageError: code "images-misplaced": the prompt has more or fewer markers than images, or ends in one.
        """
        try:
            with self._chunks(prompt, images) as chunks:
                held = [number for chunk in chunks for number in chunk.held]
                if not held or chunks[-1].is_image:
                    raise UsageError("the prompt ends in an image", "put text after it", code="images-misplaced")
                if len(held) >= context.n_ctx:
                    raise ModelError(
                        f"the conversation with its images takes {len(held)} tokens and the context holds "
                        f"{context.n_ctx}",
                        "give a larger --context, or fewer or smaller images",
                        code="prompt-too-long",
                    )
                return held, self._run(context, chunks, n_same=_n_same(chunks, cached), sequence=sequence)
        except BaseException:
            context.forget(sequence)
            raise

    def _run(self, context: Context, chunks: Sequence[_Chunk], *, n_same: int, sequence: int) -> int:
        """Decode what comes after the first n_same positions; return the index of the last logits."""
        if context.forget(sequence, n_same) != n_same:  # a recurrent state cannot be cut, only dropped
            n_same = context.forget(sequence)
        position = at = 0
        for chunk in chunks:
            end = position + len(chunk.held)
            if chunk.is_image and n_same < end:
                self._decode_image(context, chunk, position=position, sequence=sequence)
            elif n_same < end:
                start = max(n_same, position)
                at = context.run(chunk.held[start - position :], start, sequence=sequence)
            position = end
        return at

    def _decode_image(self, context: Context, chunk: _Chunk, *, position: int, sequence: int) -> None:
        """Encode an image and decode its embeddings."""
        n_tokens = self._library.mtmd_input_chunk_get_n_tokens(chunk.handle)
        at_once = self._library.mtmd_decode_use_non_causal(self.handle, chunk.handle)
        if at_once and n_tokens > context.n_batch:
            raise ModelError(
                f"an image takes {n_tokens} tokens at once and a batch holds {context.n_batch}",
                "give a smaller image",
                code="image-too-large",
            )
        after = ctypes.c_int32(position)
        clear_log()
        code = self._library.mtmd_helper_eval_chunk_single(
            self.handle,
            context.handle,
            chunk.handle,
            position,
            sequence,
            context.n_batch,
            False,
            ctypes.byref(after),
        )
        if code == _KV_FULL:
            raise context.full()
        if code != 0:
            raise ModelError(
                f"{self.path} cannot encode the image (code {code}): {logged_reason()}", code="decode-failed"
            )
        assert after.value == position + len(chunk.held), "an image took more or fewer positions than it announced"

    @contextmanager
    def _chunks(self, prompt: str, images: Sequence[Path | bytes]) -> Iterator[list[_Chunk]]:
        """Yield a prompt's pieces of text and images."""
        library = self._library
        if prompt.count(MARKER) != len(images):
            raise UsageError(
                f"the prompt has places for {prompt.count(MARKER)} images, and there are {len(images)}",
                code="images-misplaced",
            )
        bos = b"".join(map(self.model.piece, self.model.tokenize(""))).decode("utf-8", "replace")
        data = (prompt if prompt.startswith(bos) else bos + prompt).encode("utf-8", "replace")
        bitmaps, output = [], library.mtmd_input_chunks_init()
        try:
            bitmaps = [self._read(image) for image in images]
            text = library.mtmd_input_text(data, len(data), False, True)
            clear_log()
            code = library.mtmd_tokenize(
                self.handle,
                output,
                ctypes.byref(text),
                (ctypes.c_void_p * len(bitmaps))(*bitmaps),
                len(bitmaps),
            )
            if code != 0:
                raise ModelError(
                    f"{self.path} cannot take the images (code {code}): {logged_reason()}", code="decode-failed"
                )
            n_chunks = library.mtmd_input_chunks_size(output)
            yield [self._chunk(library.mtmd_input_chunks_get(output, i)) for i in range(n_chunks)]
        finally:
            for bitmap in bitmaps:
                library.mtmd_bitmap_free(bitmap)
            library.mtmd_input_chunks_free(output)

    def _chunk(self, handle: Any) -> _Chunk:
        if self._library.mtmd_input_chunk_get_type(handle) == _TEXT:
            n = ctypes.c_size_t()
            tokens = self._library.mtmd_input_chunk_get_tokens_text(handle, ctypes.byref(n))
            return _Chunk(handle, False, list(tokens[: n.value]))
        digest = self._library.mtmd_input_chunk_get_id(handle)  # of the file's bytes, SHA-256 in hexadecimal
        n_positions = int(self._library.mtmd_input_chunk_get_n_pos(handle))
        return _Chunk(handle, True, [-1 - int(digest[:15], 16)] * n_positions)

    def _read(self, image: Path | bytes) -> Any:
        """Return an image as a bitmap, which the caller has to free."""
        name = str(image) if isinstance(image, Path) else "the image"
        data = _image_bytes(image) if isinstance(image, Path) else image
        if not data.startswith(_MAGIC):
            hint = "give a PNG, JPEG, GIF or BMP file"
            raise ArtifactError(f"{name} is not an image that deepdistill can read", hint, code="image-broken")
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        read = self._library.mtmd_helper_bitmap_init_from_buf_wrapper(
            self.handle, buffer, len(data), False, self._library.mtmd_helper_init_opt_default()
        )
        if read.video_ctx:
            self._library.mtmd_helper_video_free(read.video_ctx)
            self._library.mtmd_bitmap_free(read.bitmap)
        if read.video_ctx or not read.bitmap:
            hint = "open it in another program and save it again"
            raise ArtifactError(f"{name} is broken or cut short", hint, code="image-broken")
        return read.bitmap

    def close(self) -> None:
        """Free the projector. More than one call does no harm."""
        if self.handle:
            self._library.mtmd_free(self.handle)
            self.handle = None


@cache
def _library() -> Any:
    """Return the bindings of libmtmd, after checking that they fit it.

    Raises:
        ModelError: code "llama-cpp-mismatch": they do not, or it is missing.
    """
    try:
        from llama_cpp import mtmd_cpp

        params = mtmd_cpp.mtmd_context_params_default()
        # From the front, the middle and the end of the struct: a field more or less shifts what comes after it.
        seen = (params.n_threads, params.media_marker, params.image_min_tokens, params.image_max_tokens)
        fits = seen == (4, MARKER.encode(), -1, -1) and hasattr(mtmd_cpp, "mtmd_helper_bitmap_init_from_buf_wrapper")
    except (ImportError, OSError, RuntimeError, AttributeError):
        fits = False
    if not fits:
        raise ModelError(
            "the installed llama-cpp-python cannot show images to a model",
            "pip install --upgrade llama-cpp-python (images are tested with 0.3.36)",
            code="llama-cpp-mismatch",
        )
    start_library()
    mtmd_cpp.mtmd_helper_log_set(keep_log, ctypes.c_void_p(0))
    return mtmd_cpp


def _check_projector(path: Path) -> None:
    """Refuse any other file before it is loaded."""
    if not path.is_file():
        hint = "it comes with the model, as a file named mmproj-….gguf"
        raise ArtifactError(f"there is no projector {path}", hint, code="no-such-projector")
    kind = read_gguf(path).metadata.get("general.architecture")
    if kind != "clip":
        raise ArtifactError(
            f"{path} is not a projector: it holds a {kind} model",
            "give the file named mmproj-….gguf that came with the model",
            code="not-a-projector",
        )


def _load_error(path: Path, model_path: Path, reason: str) -> ModelError:
    if "mismatch between text model" in reason:
        why = reason.splitlines()[0]
        return ModelError(f"{path} does not belong to {model_path}: {why}", code="projector-mismatch")
    return ModelError(f"cannot load {path}: {reason}", "a newer llama-cpp-python may be able to", code="load-failed")


def _n_same(chunks: Sequence[_Chunk], cached: Sequence[int]) -> int:
    """Return how many positions need not be computed: never half an image, never the last one, which gives logits."""
    held = [number for chunk in chunks for number in chunk.held][:-1]
    n = next((i for i, (a, b) in enumerate(zip(cached, held, strict=False)) if a != b), min(len(cached), len(held)))
    position = 0
    for chunk in chunks:
        end = position + len(chunk.held)
        if chunk.is_image and position < n < end:
            return position
        position = end
    return n


def _image_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"there is no image {path}", code="no-such-image") from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}", code="file-unreadable") from error
