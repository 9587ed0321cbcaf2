"""The student that is trained: its weights on the device, with an adapter or all of them learning."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ...errors import ModelError, UsageError
from ...localrun.core.text import first_line
from ..device import quiet_transformers
from ..recipe.training import TrainingRecipe
from ..teachers.huggingface.loading import loading_error
from .rows import Row


def load_student(base_dir: Path, settings: TrainingRecipe, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a student to train: a frozen base in dtype with an adapter in fp32, or all weights in fp32.

    Raises:
        ModelError: the weights cannot be loaded (see `load_base`) or quantized (see `four_bits`).
        UsageError: `code` "no-such-layer": the student has no linear map or layer that the recipe names.
    """
    quiet_transformers()
    is_full, is_qlora = settings.weights == "full", settings.weights == "qlora"
    model = load_base(base_dir, torch.float32 if is_full else dtype, four_bits(device) if is_qlora else None)
    model = model if is_qlora else model.to(device)
    model.config.use_cache = False
    if is_full:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(settings.seed or 0)
    lora = _lora_config(model, settings)
    if is_qlora:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, lora)


def _lora_config(model: Any, settings: TrainingRecipe) -> Any:
    """Return peft's settings of the adapter.

    Raises:
        UsageError: `code` "no-such-layer".
    """
    from peft import LoraConfig

    lora, layers = settings.lora, model.get_decoder().layers
    linears = [name for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)]
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    if unknown := set(lora.targets) - set(kinds):
        raise UsageError(
            f"the student has no linear map {', '.join(sorted(unknown))}",
            f"choose from {', '.join(kinds)}",
            code="no-such-layer",
        )
    if lora.first_layer >= len(layers):
        raise UsageError(
            f"the student has no layer {lora.first_layer}",
            "give a smaller training.lora.first_layer",
            code="no-such-layer",
        )
    wanted = [name for name in linears if name.rpartition(".")[2] in (lora.targets or kinds)]
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=[f"layers.{name}" for name in wanted if int(name.split(".")[0]) >= lora.first_layer],
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )


def load_base(base_dir: Path, dtype: torch.dtype, quantization: Any = None) -> Any:
    """Load a checkpoint.

    Raises:
        ModelError: its weights cannot be loaded: see `loading.load_model`.
    """
    options = {} if quantization is None else {"quantization_config": quantization}
    try:
        return AutoModelForCausalLM.from_pretrained(
            base_dir, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, UnpicklingError) as error:
        raise loading_error(error, base_dir, part="weights", offline=True) from error


def check_vocabulary(model: Any, rows: list[Row], n_tokens: int) -> None:
    """Check that the model embeds every token of the rows; its tokenizer knows n_tokens.

    Raises:
        ModelError: `code` "token-not-embedded".
    """
    n_embeddings = model.get_input_embeddings().num_embeddings
    highest = max(max(row.input_ids) for row in rows)
    if highest >= n_embeddings:
        raise ModelError(
            f"the rows have token {highest}, the student embeds only {n_embeddings}, its tokenizer knows {n_tokens}",
            "take the tokenizer that belongs to these weights, or resize the embedding for tokens that were added",
            code="token-not-embedded",
        )


def parameter_groups(model: Any, settings: TrainingRecipe) -> list[dict[str, Any]]:
    """Return the optimizer's groups: no weight decay on vectors, and LoRA's B apart if its learning rate differs."""
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = "lora_B" in name and settings.lora.plus != 1.0
            groups.setdefault((is_b, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.peak_lr * (settings.lora.plus if is_b else 1.0),
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
        }
        for (is_b, is_matrix), parameters in groups.items()
    ]


def four_bits(device: torch.device) -> Any:
    """Return the 4-bit format in which QLoRA holds the base.

    Raises:
        ModelError: `code` "needs-gpu", or "not-installed" where bitsandbytes is missing or does not work.
    """
    from transformers import BitsAndBytesConfig

    if device.type != "cuda":
        raise ModelError(
            "--weights qlora needs an NVIDIA GPU: 4-bit weights only slow a CPU down",
            "use --weights lora",
            code="needs-gpu",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("bitsandbytes")
    except (ImportError, RuntimeError, OSError) as error:
        raise ModelError(
            f"--weights qlora needs bitsandbytes: {first_line(error)}", "pip install bitsandbytes", code="not-installed"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
