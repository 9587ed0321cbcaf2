"""The fast pass against plain PyTorch: states, losses and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepdistill.distill.training.fast import attention, blocks, fused
from deepdistill.distill.training.fast.blocks import rms_norm, rms_norm_backward
from deepdistill.distill.training.fast.linears import Linears, adapter_of, refresh
from deepdistill.distill.training.fast.model import fast_decoder
from deepdistill.distill.training.packing import pack
from deepdistill.distill.training.rows import Row

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

# rows that begin alike, in three ways
ROWS = [
    Row([5, 6, 7, 8, 9, 10], 2),
    Row([5, 6, 7, 11, 12], 2),
    Row([5, 6, 7, 8, 13, 14, 15, 16], 3),
    Row([20, 21, 22], 1),
    Row([5, 6, 7, 8, 9, 10], 4),
]


def _model(kind: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    if kind == "qwen2":
        base: Any = Qwen2ForCausalLM(Qwen2Config(**sizes))
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    elif kind == "mistral":
        base = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
    else:
        base = LlamaForCausalLM(LlamaConfig(**sizes))
    for name, parameter in base.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    config = LoraConfig(r=4, lora_alpha=10, target_modules="all-linear", task_type="CAUSAL_LM", **lora)
    model = get_peft_model(base.to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _naive(model: Any, rows: list[Row]) -> Tensor:
    """Return the summed loss of the targets, each row by itself through the plain model."""
    total = torch.zeros(())
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0].float()
        total = total + F.cross_entropy(
            logits[row.n_prompt - 1 : -1], torch.tensor(row.input_ids[row.n_prompt :]), reduction="sum"
        )
    return total


def _gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_packed_rows_that_share_their_beginnings_have_the_loss_and_gradients_of_separate_rows(kind: str) -> None:
    model = _model(kind)
    expected = _naive(model, ROWS)
    expected.backward()
    wanted = _gradients(model)
    fast = fast_decoder(model.get_base_model())
    assert fast is not None
    batch = pack(ROWS)
    assert batch.input_ids.shape[1] < batch.n_tokens
    assert batch.layout is not None
    hidden = fast(batch.input_ids, batch.layout)
    logits = model.get_base_model().lm_head(hidden[batch.positions])
    loss = F.cross_entropy(logits, batch.targets.ids, reduction="sum")
    loss.backward()
    found = _gradients(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.keys() == wanted.keys()
    assert len(wanted) == 28
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_in_bf16_the_gradients_are_as_near_to_those_of_fp32_as_the_plain_models() -> None:
    _naive(model := _model("llama"), ROWS).backward()
    exact = _gradients(model)
    plain = _model("llama", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _naive(plain, ROWS).backward()
    coarse = _gradients(plain)
    fast = fast_decoder(plain.get_base_model())
    assert fast is not None
    batch = pack(ROWS)
    assert batch.layout is not None
    logits = plain.get_base_model().lm_head(fast(batch.input_ids, batch.layout)[batch.positions]).float()
    F.cross_entropy(logits, batch.targets.ids, reduction="sum").backward()
    found = _gradients(plain)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    errors = [
        sum(float((gradients[name] - exact[name]).norm() / exact[name].norm()) for name in exact) / len(exact)
        for gradients in (found, coarse)
    ]
    assert errors[0] < 1.5 * errors[1]


def test_an_optimizer_step_reaches_the_fast_pass() -> None:
    model = _model("llama")
    fast = fast_decoder(model.get_base_model())
    assert fast is not None
    batch = pack(ROWS)
    assert batch.layout is not None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    fast(batch.input_ids, batch.layout).square().sum().backward()
    optimizer.step()
    found = fast(batch.input_ids, batch.layout)
    row = model.get_base_model().get_decoder()(input_ids=torch.tensor([ROWS[3].input_ids])).last_hidden_state[0]
    start = batch.input_ids[0].tolist().index(20)
    torch.testing.assert_close(found[start : start + 3], row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_what_the_fast_pass_does_not_compute_is_left_to_the_plain_one(lora: dict[str, Any]) -> None:
    assert fast_decoder(_model("llama", **lora).get_base_model()) is None


def test_rows_too_long_for_plain_products_take_the_fused_attention_to_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for longest in (512, 4):
        monkeypatch.setattr(attention, "LONGEST_PLAIN", longest)
        model = _model("llama")
        fast = fast_decoder(model.get_base_model())
        assert fast is not None
        batch = pack(ROWS)
        assert batch.layout is not None
        fast(batch.input_ids, batch.layout).square().sum().backward()
        found.append(_gradients(model))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_fast_pass_is_exact_too(dtype: torch.dtype) -> None:
    expected = _naive(_model("llama"), ROWS).item()
    model = _model("llama", dtype).to("cuda")
    fast = fast_decoder(model.get_base_model())
    assert fast is not None
    batch = pack(ROWS)
    assert batch.layout is not None
    hidden = fast(batch.input_ids.cuda(), batch.layout.to("cuda"))
    logits = model.get_base_model().lm_head(hidden[batch.positions.cuda()]).float()
    loss = F.cross_entropy(logits, batch.targets.ids.cuda(), reduction="sum")
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 2e-2)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_decoder_that_only_looks_alike_is_found_out() -> None:
    model = _model("llama")
    model.get_base_model().get_decoder().layers[1].mlp.register_forward_hook(lambda module, given, out: out * 1.5)
    assert fast_decoder(model.get_base_model()) is None


def test_the_norm_and_its_gradient_equal_autograds() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, dy = (torch.randn(*shape, generator=generator) for shape in ((7, 33), (33,), (7, 33)))
    x.requires_grad_()
    expected = F.rms_norm(x, (33,), weight, 1e-5)
    (wanted,) = torch.autograd.grad(expected, x, dy)
    y, r = rms_norm(x.detach(), weight, eps=1e-5)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(rms_norm_backward(dy, x.detach(), weight=weight, r=r), wanted)


def _chain_inputs(chain: str, n: int, device: str) -> dict[str, Any]:
    """Return what a chain takes, drawn anew from the same seed; outputs have gaps between their rows."""
    torch.manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device)

    buffer = draw(n, 80)
    d_gate, d_up = buffer[:, :64].chunk(2, dim=-1)
    inputs: dict[str, dict[str, Any]] = {
        "rms_norm": {"x": draw(n, 32), "weight": draw(32), "eps": 1e-5, "out": buffer[:, :32]},
        "rms_norm_backward": {
            "dy": draw(n, 32),
            "x": draw(n, 32),
            "weight": draw(32),
            "r": draw(n, 1),
            "residual": draw(n, 32),
        },
        "gated": {"gate": draw(n, 64)[:, :32], "up": draw(n, 64)[:, 32:], "out": buffer[:, :32]},
        "gated_backward": {name: draw(n, 32) for name in ("d_hidden", "gate", "up", "silu")}
        | {"d_gate": d_gate, "d_up": d_up},
        "rotate": {"heads": draw(n // 4, n, 5, 8)[:, :, :3], "cos": draw(n, 8), "sin": draw(n, 8)},
    }
    return inputs[chain]


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("chain", ["rms_norm", "rms_norm_backward", "gated", "gated_backward", "rotate"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_chain_as_one_kernel_computes_and_writes_what_its_operations_do(
    chain: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = getattr(blocks, chain)
    for n in (12, 20, 36):
        results = []
        for devices in ((), (device,)):
            monkeypatch.setattr(fused, "DEVICES", devices)
            inputs = _chain_inputs(chain, n, device)
            # the kernel that was compiled for the first number of tokens does for the others
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=n != 12):
                first, *others = inputs.values()
                options = dict(zip(list(inputs)[1:], others, strict=True))
                returned = run(first, **options)
            results.append([*(returned if isinstance(returned, tuple) else (returned,)), *inputs.values()])
        for plain, found in zip(*results, strict=True):
            is_overwritten = chain == "gated_backward" and plain is results[0][1]
            if isinstance(plain, Tensor) and not is_overwritten:
                torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_where_the_compiler_fails_the_operations_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    failure = torch._dynamo.exc.BackendCompilerFailed.__new__(torch._dynamo.exc.BackendCompilerFailed)
    tried = []

    def broken(*_: Any) -> Tensor:
        tried.append(1)
        raise failure

    monkeypatch.setattr(torch, "compile", lambda chain: broken)
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    twice = fused.on_gpu(lambda x: 2 * x)
    assert [twice(torch.ones(2, 2)).sum().item() for _ in range(3)] == [8.0, 8.0, 8.0]
    assert len(tried) == 1


@pytest.mark.slow
def test_the_demos_student_in_fp32_is_exact() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from deepdistill.distill.training.student import student_dir

    base = AutoModelForCausalLM.from_pretrained(student_dir("smollm2"), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = _naive(model, ROWS)
    fast = fast_decoder(model.get_base_model())
    assert fast is not None
    batch = pack(ROWS)
    assert batch.layout is not None
    logits = model.get_base_model().lm_head(fast(batch.input_ids, batch.layout)[batch.positions])
    assert F.cross_entropy(logits, batch.targets.ids, reduction="sum").item() == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_a_small_adapter_is_not_rounded_away_in_bf16() -> None:
    """Added to an output that is rounded already, a delta below half a step of bf16 would vanish."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False)).to(torch.bfloat16)
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
    module = model.base_model.model[0]
    linears = Linears([module])
    x = torch.randn(4096, 256).to(torch.bfloat16)
    with torch.no_grad():
        before, plain_before = _through(linears, x), module(x).float()
        a, b, _ = adapter_of(module)
        b.normal_(std=3e-4)
        delta = (x.float() @ a.T.bfloat16().float()) @ b.T.bfloat16().float()
        change, plain_change = _through(linears, x) - before, module(x).float() - plain_before
    kept, plainly_kept = ((each * delta).sum().item() / delta.square().sum().item() for each in (change, plain_change))
    assert delta.abs().mean() < 1e-3 * before.abs().mean()
    assert kept == pytest.approx(1.0, abs=0.1)
    assert plainly_kept < 0.7  # what peft's own forward keeps of it


def _through(linears: Linears, x: Tensor) -> Tensor:
    refresh(linears.adapters)
    buffer = linears.buffer(x)
    buffer[:, : x.shape[1]] = x
    return linears.forward(buffer)[0].float()


@pytest.mark.parametrize("n_inputs", [62, 80, 96])
def test_garbage_in_memory_reaches_no_result(n_inputs: int) -> None:
    """Some CPUs' bf16 kernels read past the end of a row that is no multiple of 32 long."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(n_inputs, 40, bias=False)).to(torch.bfloat16)
    model: Any = get_peft_model(plain, LoraConfig(r=12, target_modules=["0"]))
    linears = Linears([model.base_model.model[0]])
    for _ in range(20):
        x, dy = (torch.randn(320, n).to(torch.bfloat16) for n in (n_inputs, 40))
        for n in (n_inputs + 12, 52):
            torch.full((320, n), float("nan"), dtype=torch.bfloat16)  # freed at once: the buffers take its place
        buffer, d_buffer = linears.buffer(x), linears.grad_buffer(x)
        buffer[:, :n_inputs], d_buffer[:, :40] = x, dy
        y, inner = linears.forward(buffer)
        dx, gradients = linears.backward(d_buffer, x, inner)
        assert dx is not None
        assert all(result.isfinite().all() for result in (y, dx, *gradients))
