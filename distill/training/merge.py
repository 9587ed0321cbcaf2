"""The results of a training: the adapter, and the student with the adapter merged, a plain checkpoint.

The adapter is written first, with a note that says which base it belongs to. Then it is merged in fp32 into the base on
disk, and the merged model's logits are compared with those of base and adapter. If the merge is interrupted, the
adapter is there to start it over.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ...errors import ArtifactError, ModelError
from ...localrun.core.atomic import replacing_folder
from ...localrun.core.text import first_line
from ..tokenizer import Tokenizer
from .lora import load_base
from .rows import Row

MERGE_TOLERANCE = 1e-3  # as a share of the largest logit
_BASE_FILE = "deepdistill_base.json"


def save_checkpoint(model: Any, base_dir: Path, *, tokenizer: Tokenizer, out: Path) -> None:
    """Write a plain checkpoint in the base's number format, and replace one that is there."""
    stored = AutoConfig.from_pretrained(base_dir, trust_remote_code=False).dtype or torch.float32
    model.config.use_cache = True
    model.config._attn_implementation = "sdpa"
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with replacing_folder(out) as temporary:
        model.to(device="cpu", dtype=stored).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for card in ("README.md", "LICENSE"):
            if (base_dir / card).exists():
                shutil.copy(base_dir / card, temporary / card)
        shutil.rmtree(out, ignore_errors=True)


def save_adapter(model: Any, base_dir: Path, *, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write a model's adapter and which base it belongs to; `weights` has all of them if the model holds a part."""
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        base = {"name": base_dir.name, "sha256": fingerprint(base_dir)}
        (temporary / _BASE_FILE).write_text(json.dumps(base), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)


def merge_adapter(
    adapter_dir: Path, base_dir: Path, *, tokenizer: Tokenizer, out: Path, rows: Sequence[Row] = ()
) -> float:
    """Merge an adapter into its base in fp32 and write the result to out, in the base's own number format.

    Returns the largest difference between the merged model's logits and those of base and adapter on the rows, as a
    share of the largest logit, before the weights are rounded to the format.

    Raises:
        ArtifactError: `code` "adapter-of-other-base" or "adapter-broken".
        ModelError: `code` "merge-inexact": the difference is more than MERGE_TOLERANCE.
    """
    adapted = _load_adapter(adapter_dir, base_dir)
    before = [_logits(adapted, row) for row in rows]
    merged = adapted.merge_and_unload()
    difference = max(
        (float((_logits(merged, row) - z).abs().max() / z.abs().max()) for row, z in zip(rows, before, strict=True)),
        default=0.0,
    )
    if not difference <= MERGE_TOLERANCE:  # so written that NaN is refused, too
        raise ModelError(
            f"the merged student's logits differ by {difference:.2g} from those of base and adapter",
            f"the adapter is in {adapter_dir}: use it unmerged, and report this",
            code="merge-inexact",
        )
    save_checkpoint(merged, base_dir, tokenizer=tokenizer, out=out)
    return difference


def _load_adapter(adapter_dir: Path, base_dir: Path) -> Any:
    """Return the base in fp32 with the adapter beside its weights."""
    from peft import PeftModel

    _check_base(adapter_dir, base_dir)
    try:
        base = load_base(base_dir, torch.float32)
        adapted = PeftModel.from_pretrained(base, str(adapter_dir), trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, UnpicklingError) as error:
        raise ArtifactError(
            f"cannot load the adapter in {adapter_dir}: {first_line(error)}", "train it again", code="adapter-broken"
        ) from error
    return adapted.eval()


def fingerprint(folder: Path) -> str:
    """Return a hash of the first and last MiB of a checkpoint's files: cheap, and different for each base."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def _check_base(adapter_dir: Path, base_dir: Path) -> None:
    try:
        base = json.loads((adapter_dir / _BASE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # another tool wrote it, without that note
    if base["sha256"] != fingerprint(base_dir):
        raise ArtifactError(
            f"the adapter in {adapter_dir} belongs to another base ({base['name']}) than {base_dir}",
            "an adapter fits only the very weights that it was trained on",
            code="adapter-of-other-base",
        )


@torch.no_grad()
def _logits(model: Any, row: Row) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
    return logits
