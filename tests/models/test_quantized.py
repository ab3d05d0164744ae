"""Quantized teachers and students, with the CPU builds of bitsandbytes and torchao; no GPU has been seen."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import processes
from kd_lightning import (
    DistillationModule,
    ForwardKL,
    HFTeacher,
    LoRA,
    OffloadedTeacher,
    ReverseKL,
    distillation_loss,
    fused_distillation_loss,
)
from kd_lightning.cli.prune import prune
from kd_lightning.distributed.dtensor import full_state_dict
from kd_lightning.models.backbone import body_and_head, hidden_states, logits
from kd_lightning.models.loading import causal_lm_from_config, load_causal_lm
from kd_lightning.models.lora import add_adapters, merged_state_dict
from kd_lightning.models.quantized.layers import is_quantized, plain_parameters, plain_weight, quantized_layers
from tiny_fits import SGD, Run, fit, of_rank, rows, split

MISSING = [name for name in ("bitsandbytes", "torchao", "accelerate") if importlib.util.find_spec(name) is None]
INSTALL = 'pip install "kd_lightning[quantized]"'
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: {INSTALL}"),
    pytest.mark.filterwarnings("ignore"),  # those of the two packages
]
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["down_proj"]}
NESTED = {**NF4, "bnb_4bit_use_double_quant": True}
FP4 = {**NF4, "bnb_4bit_quant_type": "fp4"}
INT8 = {"load_in_8bit": True, "llm_int8_threshold": 0}
AO8 = {"quant_type": "int8_weight_only"}
DYNAMIC = {"quant_type": "int8_dynamic_activation_int8_weight"}
TRAINED = {"nf4": NF4, "nested": NESTED, "fp4": FP4, "int8": INT8, "torchao": AO8}
every_trained = pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED)


def load(settings: dict[str, Any], name: str = "asset:student", **kwargs: Any) -> Any:
    """A quantized model with weights in fp32 for the rest."""
    return load_causal_lm(name, kwargs={"dtype": "float32", "quantization_config": settings, **kwargs})


def stirred(model: nn.Module) -> Any:
    """The model with adapters that are not zero."""
    numbers = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=numbers)
    return model


# -------------------------------------------------------------------------------------------------------------- layers
@every_trained
def test_linear_layers_are_quantized_and_the_head_is_not(settings: dict[str, Any]) -> None:
    model = load(settings)
    plain = load_causal_lm("asset:student")
    left_out = ("lm_head", *settings.get("llm_int8_skip_modules", ["lm_head"]))
    linear = [name for name, part in plain.named_modules() if isinstance(part, nn.Linear)]
    names = {name for name in linear if not name.endswith(left_out)}
    assert quantized_layers(model).keys() == names
    found = dict(plain_parameters(model))
    for name, parameter in plain.named_parameters():
        error = (found[name] - parameter).norm() / parameter.norm()
        assert found[name].shape == parameter.shape and error < 0.15
        assert (error > 0) == (name.removesuffix(".weight") in names)


@every_trained
def test_a_layer_computes_with_its_plain_weight(settings: dict[str, Any]) -> None:
    model = load(settings).train()
    layer = next(iter(quantized_layers(model).values()))
    x = torch.randn(5, layer.in_features, requires_grad=True)  # type: ignore[arg-type]
    expected = F.linear(x, plain_weight(layer))
    torch.testing.assert_close(layer(x), expected, atol=2e-5, rtol=2e-5)
    weights = torch.randn(expected.shape)
    found = torch.autograd.grad((layer(x) * weights).sum(), x)[0]
    torch.testing.assert_close(found, weights @ plain_weight(layer), atol=2e-5, rtol=2e-5)


# ------------------------------------------------------------------------------------------------------------- teacher
@pytest.mark.parametrize("settings", [*TRAINED.values(), DYNAMIC], ids=[*TRAINED, "dynamic"])
def test_a_teacher_in_chunks_equals_its_whole_logits_and_is_near_the_plain_one(settings: dict[str, Any]) -> None:
    plain, model = load_causal_lm("asset:teacher", kwargs={"dtype": "float32"}), load(settings, "asset:teacher")
    student, batch = load_causal_lm("asset:student"), rows(4)
    inputs, labels = (batch["input_ids"], batch["attention_mask"]), batch["labels"][:, 1:]
    with torch.no_grad():
        ours = logits(student, *inputs)[:, :-1]
        theirs, exact = logits(model, *inputs)[:, :-1], logits(plain, *inputs)[:, :-1]
        (body, head), (own_body, own_head) = body_and_head(model), body_and_head(student)
        hidden = hidden_states(body, *inputs)[:, :-1], hidden_states(own_body, *inputs)[:, :-1]
        for objective in (ForwardKL(), ReverseKL()):
            whole = distillation_loss(ours, theirs, labels, objective=objective)
            fused = fused_distillation_loss(hidden[1], own_head, hidden[0], head, labels, objective=objective)
            torch.testing.assert_close(fused, whole, atol=2e-5, rtol=2e-5)
        reference = distillation_loss(ours, exact, labels, objective=ReverseKL())
    # reverse KL is linear in the teacher's log-probabilities, which move by no more than the range of the logits' error
    error = (theirs - exact)[labels != -100]
    bound = float((error.amax(-1) - error.amin(-1)).mean())
    assert 0 < abs(float(whole - reference)) <= bound
    assert float(error.norm() / exact[labels != -100].norm()) < 0.2


def test_the_fingerprint_of_a_teacher_holds_its_quantization() -> None:
    found = set()
    for settings in (None, NF4, NESTED, INT8, AO8):
        kwargs = {"dtype": "float32"} | ({} if settings is None else {"quantization_config": settings})
        teacher = HFTeacher("asset:teacher", kwargs)
        teacher.load()
        found.add(teacher.fingerprint())
    assert len(found) == 5


# ------------------------------------------------------------------------------------------------------------- student
@every_trained
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_merged_student_is_the_plain_model_of_the_same_logits(settings: dict[str, Any], dora: bool) -> None:
    targets: Any = ["q_proj", "down_proj"] if dora else "all-linear"
    student = stirred(add_adapters(load(settings), LoRA(r=3, dora=dora, targets=targets))).train()
    plain = load_causal_lm("asset:student")
    missing = plain.load_state_dict(merged_state_dict(student, student.state_dict()), strict=False)
    assert missing.unexpected_keys == [] and set(missing.missing_keys) <= {"lm_head.weight"}
    batch = rows(4)
    inputs = batch["input_ids"], batch["attention_mask"]
    torch.testing.assert_close(logits(plain, *inputs), logits(student, *inputs), atol=1e-4, rtol=1e-4)


@every_trained
def test_gradients_of_adapters_are_those_over_the_plain_weights(settings: dict[str, Any]) -> None:
    quantized = load(settings)
    plain = load_causal_lm("asset:student")
    plain.load_state_dict(dict(plain_parameters(quantized)), strict=False)
    batch, gradients = rows(4), []
    for model in (quantized, plain):
        model.eval()
        with torch.no_grad():
            logits(model, batch["input_ids"])  # a validation before training must change nothing
        torch.manual_seed(5)
        student = stirred(add_adapters(model, LoRA(r=3))).train()
        student(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        gradients.append({name: x.grad for name, x in student.named_parameters() if x.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, found in gradients[0].items():
        torch.testing.assert_close(found, gradients[1][name], atol=2e-5, rtol=1e-4, msg=name)


def module(settings: dict[str, Any], **kwargs: Any) -> Run:
    """A quantized student with adapters under the plain teacher."""
    torch.manual_seed(5)
    options = {"lora": LoRA(r=4), "optimizer": functools.partial(torch.optim.AdamW, lr=3e-3), **kwargs}
    return Run("asset:student", "asset:teacher", student_kwargs={"quantization_config": settings}, **options)


def train(of: Run, steps: int, root: Path, ckpt_path: str | None = None) -> list[float]:
    """Losses of the steps; the checkpoint is `root/STEPS.ckpt`."""
    import lightning.pytorch as L
    from torch.utils.data import DataLoader

    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False, log_every_n_steps=1,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
        default_root_dir=root,
    )  # fmt: skip
    trainer.fit(of, DataLoader([rows(4)] * 20, batch_size=None), ckpt_path=ckpt_path)
    trainer.save_checkpoint(root / f"{steps}.ckpt")
    return [found["train/loss"] for found in of.logged]


@pytest.mark.parametrize("settings", [NF4, INT8, AO8], ids=["nf4", "int8", "torchao"])
def test_a_quantized_student_learns_and_resumes_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = module(settings)
    losses = train(whole, 12, tmp_path)
    assert losses[-1] < 0.8 * losses[0]
    base = dict(plain_parameters(load(settings)))
    inside = {name.replace(".base_layer", "").removeprefix("base_model.model."): x for name, x in
              plain_parameters(whole.student) if "lora_" not in name}  # fmt: skip
    assert all(torch.equal(inside[name], tensor) for name, tensor in base.items())
    train(module(settings), 6, tmp_path)
    saved = torch.load(tmp_path / "6.ckpt", weights_only=True)["state_dict"]
    assert saved and all("lora_" in name for name in saved if name.startswith("model.student"))
    again = module(settings)
    assert train(again, 12, tmp_path, str(tmp_path / "6.ckpt")) == losses[6:]
    ends: list[dict[str, Tensor]] = [
        {name: x for name, x in run.student.named_parameters() if x.requires_grad} for run in (whole, again)
    ]
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())


@pytest.mark.parametrize("settings", [NF4, INT8, AO8], ids=["nf4", "int8", "torchao"])
def test_an_export_is_a_plain_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    from kd_lightning.callbacks.export import save_student

    student = stirred(add_adapters(load(settings), LoRA(r=3))).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_student(student, None, tmp_path / "student")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "quantization" not in (tmp_path / "student" / "config.json").read_text(encoding="utf-8")
    plain = load_causal_lm(str(tmp_path / "student"))
    assert (not is_quantized(plain) and plain.generation_config.eos_token_id == 0) or plain.generation_config
    batch = rows(4)
    torch.testing.assert_close(
        logits(plain, batch["input_ids"]), logits(student, batch["input_ids"]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("settings", [NF4, INT8, AO8], ids=["nf4", "int8", "torchao"])
def test_a_checkpoint_that_is_quantized_already_is_the_same_model(settings: dict[str, Any], tmp_path: Path) -> None:
    model = load(settings)
    model.save_pretrained(tmp_path)
    saved = load_causal_lm(str(tmp_path), kwargs={"dtype": "float32"})
    assert all(torch.equal(a, dict(plain_parameters(saved))[name]) for name, a in plain_parameters(model))
    with pytest.raises(ValueError, match=r"prune: .* is quantized: prune the model that it was made of"):
        prune(str(tmp_path), str(tmp_path / "cut"), layers=1)
    with pytest.raises(ValueError, match=r"is quantized already.*remove quantization_config"):
        load_causal_lm(str(tmp_path), kwargs={"quantization_config": NF4})
    with pytest.raises(ValueError, match=r"quantized weights cannot be trained: train adapters \(--model.lora.r 8\)"):
        DistillationModule(str(tmp_path), "asset:teacher").configure_model()


def on_a_rank(rank: int) -> list[dict[str, Tensor]]:
    warnings.simplefilter("ignore")
    found = []
    for settings in (NF4, AO8):
        run = fit(module(settings, optimizer=SGD), of_rank(rows(), rank), 
                  accumulate_grad_batches=2, devices=2, strategy="ddp")  # fmt: skip
        full_state_dict(run.student, keep=rank == 0)
        found.append({name: x.detach() for name, x in run.student.named_parameters() if x.requires_grad})
    return found


@pytest.mark.slow
def test_two_ranks_of_ddp_are_one_process() -> None:
    ranks = processes.run(on_a_rank)
    for i, settings in enumerate((NF4, AO8)):
        one = fit(module(settings, optimizer=SGD), split(rows(), 8, 4))
        for name, tensor in one.student.named_parameters():
            if tensor.requires_grad:
                for found in ranks:
                    torch.testing.assert_close(found[i][name], tensor, atol=2e-5, rtol=0, msg=name)


# ------------------------------------------------------------------------------------------------------------ refusals
def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantized weights cannot be trained: train adapters"):
        module(NF4, lora=None).configure_model()
    with pytest.raises(ValueError, match=r"also quantizes its inputs.*int8_weight_only"):
        module(DYNAMIC).configure_model()
    with pytest.raises(ValueError, match=r"multiple of 64, and 'model.layers.0.mlp.down_proj' has 176: leave it out"):
        load({"load_in_4bit": True})
    with pytest.raises(ValueError, match="must not contain 'quantization_config' with random weights"):
        module(NF4, student_init="random").configure_model()
    with pytest.raises(ValueError, match="a quantized model must be passed as a folder or name"):
        DistillationModule(load(NF4), "asset:teacher", lora=LoRA()).configure_model()


def test_what_would_copy_or_shard_quantized_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="OffloadedTeacher: the layers of a quantized model cannot be copied"):
        OffloadedTeacher("asset:teacher", {"quantization_config": AO8}).load()
    teacher = HFTeacher("asset:teacher", {"quantization_config": AO8})
    teacher.load()
    with pytest.raises(ValueError, match=r"teacher: a quantized model cannot be sharded by fsdp2.*ddp"):
        teacher.shard(lambda model: model)


# ---------------------------------------------------------------------------------------------------------------- plan
def tensors(layer: Any) -> int:
    """Bytes of all tensors of a quantized layer."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        state = weight.quant_state.as_dict(packed=False)
        return weight.nbytes + sum(x.nbytes for x in state.values() if isinstance(x, Tensor))
    if hasattr(weight, "qdata"):
        return int(weight.qdata.nbytes + weight.scale.nbytes)
    return int(weight.nbytes + layer.state.SCB.nbytes)


@every_trained
def test_a_plan_has_the_bytes_of_the_real_layers(settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        kwargs = {"dtype": "float32", "quantization_config": settings}
        shapes = causal_lm_from_config("asset:student", kwargs=kwargs)
    model = load(settings)
    planned, real = quantized_layers(shapes), quantized_layers(model)
    assert planned.keys() == real.keys()
    for name, layer in planned.items():
        found = sum(x.nbytes for x in (*layer.parameters(), *layer.buffers()))
        assert found == pytest.approx(tensors(real[name]), abs=16), name  # the offset of nested scales is a 0-d tensor


# ------------------------------------------------------------------------------------------- why a width is refused
def test_the_cpu_kernel_still_reads_rows_that_are_no_whole_blocks_wrongly() -> None:
    """Once this fails, `check_widths` can go."""
    from bitsandbytes import functional

    errors = []
    for width in (192, 176):
        weight = torch.randn(64, width, generator=torch.Generator().manual_seed(1))
        found = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
        errors.append(float((found - weight).norm() / weight.norm()))
    assert errors[0] < 0.1 and errors[1] > 0.2
