"""LoRA students: only adapters train, the loss is that of full logits, and the export is a plain model."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import runs
from adapters import stirred
from architectures import VOCABULARY, tiny
from kd_lightning import TAID, DistillationModule, ForwardKL, distillation_loss
from kd_lightning.callbacks.export import save_student
from kd_lightning.cli.program import main, run
from kd_lightning.engine.logit_source import ProjectedLogits
from kd_lightning.models.backbone import body_and_head, eval_mode, hidden_states, logits
from kd_lightning.models.lora import LoRA, adapters_disabled, add_adapters, merged_state_dict
from refusals import refused
from teacher_batches import assert_same
from tiny_fits import fit, rows, split

SGD = functools.partial(torch.optim.SGD, lr=1.0)
UNTIED = {"tie_word_embeddings": False}


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------------------------------------------ learning
def test_only_adapters_and_schedules_change() -> None:
    student = tiny("llama")
    module = DistillationModule(student, tiny("gpt2"), TAID(), optimizer=SGD, lora=LoRA(r=4))
    module.configure_model()
    before = {name: parameter.detach().clone() for name, parameter in module.student.named_parameters()}
    fit(module, split(rows(vocabulary=VOCABULARY), 6, 6))
    adapters = learning(module.student)
    assert adapters and all("lora_" in name for name in adapters)
    (group,) = module.trainer.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.student.parameters() if p.requires_grad}
    for name, parameter in module.student.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same == (name not in adapters), name
    assert float(module.schedules()["assistant.teacher_weight"]()) > 0.4


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_do_not_change_the_logits(dora: bool) -> None:
    model, ids = tiny("llama"), tokens()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        torch.testing.assert_close(
            add_adapters(model, LoRA(dora=dora))(input_ids=ids).logits, before, atol=2e-5, rtol=0
        )


def full_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss from the full logits of both models."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        target = logits(teacher, **inputs)[:, :-1]
    return distillation_loss(logits(student, **inputs)[:, :-1], target, batch["labels"][:, 1:], objective=ForwardKL())


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(r=3),
        LoRA(r=3, dora=True),
        LoRA(r=3, targets=["q_proj", "lm_head"]),
        LoRA(r=3, targets=["lm_head"], dora=True),
    ],
    ids=["linear", "dora", "also on the head", "dora on the head"],
)
def test_a_step_equals_a_step_on_full_logits(lora: LoRA) -> None:
    teacher, batch = tiny("gpt2").eval(), rows(vocabulary=VOCABULARY)
    student = stirred(add_adapters(tiny("llama", **UNTIED), lora))
    twin = copy.deepcopy(student)
    before = copy.deepcopy(student.state_dict())
    module = fit(DistillationModule(student, teacher, optimizer=SGD), [batch])
    full_loss(twin, teacher, batch).backward()
    SGD([p for p in twin.parameters() if p.requires_grad]).step()
    moved = 0.0
    for name, found in module.student.state_dict().items():
        torch.testing.assert_close(found, twin.state_dict()[name], atol=1e-5, rtol=0, msg=name)
        moved += float((found - before[name]).norm()) if "lora_A" in name else 0.0
    assert moved > 1e-4


def test_a_frozen_head_costs_no_head_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bool]] = []
    add_gradients = ProjectedLogits.add_gradients

    def spy(self: ProjectedLogits, dz: Tensor, gradients: Any, a: int, b: int) -> None:
        seen.append([gradient is not None for gradient in gradients])
        add_gradients(self, dz, gradients, a, b)

    monkeypatch.setattr(ProjectedLogits, "add_gradients", spy)
    for lora in (LoRA(r=2), None):
        fit(DistillationModule(tiny("llama"), tiny("llama"), lora=lora), [rows(vocabulary=VOCABULARY)])
    assert seen == [[True, False, False], [True, True, False]]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "cohere", "gptj", "qwen2"])
def test_a_student_with_adapters_is_split_like_a_plain_one(model_type: str) -> None:
    student = stirred(add_adapters(tiny(model_type), LoRA(r=2))).eval()
    body, head = body_and_head(student)
    assert not head.weight.requires_grad
    assert_same(student, body, head)  # type: ignore[arg-type]


def test_an_adapter_on_the_lm_head_is_refused() -> None:
    student = add_adapters(tiny("llama", **UNTIED), LoRA(targets=["lm_head"]))
    with pytest.raises(ValueError, match="its LM head has an adapter"):
        body_and_head(student)


# ------------------------------------------------------------------------------------------------------------- export
@pytest.mark.parametrize(
    ("model_type", "lora"),
    [
        ("llama", LoRA(r=3)),
        ("llama", LoRA(r=3, alpha=50, dropout=0.2, dora=True)),
        ("llama", LoRA(r=3, targets=["lm_head", "embed_tokens", "0.mlp.up_proj"])),
        ("gpt2", LoRA(r=3)),
    ],
    ids=["llama", "dora", "head and embedding", "gpt2, whose matrices are transposed"],
)
def test_the_export_is_a_plain_model_with_the_same_logits(model_type: str, lora: LoRA, tmp_path: Path) -> None:
    model = tiny(model_type, **(UNTIED if "lm_head" in lora.targets else {}))
    pristine = copy.deepcopy(model)
    names = set(pristine.state_dict())
    student = stirred(add_adapters(model, lora)).eval()
    before, ids = copy.deepcopy(student.state_dict()), tokens()
    save_student(student, None, tmp_path / "student")  # type: ignore[arg-type]

    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert type(plain) is type(model)
    assert set(plain.state_dict()) == names
    assert not any("lora" in path.read_text() for path in (tmp_path / "student").glob("*.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own call
        again = PeftModel.from_pretrained(pristine, tmp_path / "adapter").eval()
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with torch.no_grad():
        expected = student(input_ids=ids).logits
        with adapters_disabled(student):
            assert (student(input_ids=ids).logits - expected).abs().max() > 0.05
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=2e-5, rtol=2e-5)
        assert torch.equal(again(input_ids=ids).logits, expected)


def test_merging_uses_the_given_tensors() -> None:
    student = stirred(add_adapters(tiny("llama"), LoRA(r=2)))
    state = {name: tensor.double() for name, tensor in student.state_dict().items()}
    merged = merged_state_dict(student, state)
    name = "model.layers.1.mlp.up_proj"
    inside = f"base_model.model.{name}"
    low = state[f"{inside}.lora_B.default.weight"] @ state[f"{inside}.lora_A.default.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], state[f"{inside}.base_layer.weight"] + 2 * low)


def test_a_run_exports_a_plain_student_and_its_adapter(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert main([*runs.little(root, "lora", steps=3), "--model.lora.dropout", "0.1"]) == 0
    start = load_file(Path(runs.resolve("asset:student")) / "model.safetensors")
    found = runs.student(root)
    assert found.keys() == start.keys()
    changed = {name for name in start if not torch.equal(start[name], found[name])}
    assert changed == {name for name in start if ".self_attn." in name or ".mlp." in name}
    assert (root / "adapter" / "adapter_model.safetensors").exists()


# ------------------------------------------------------------------------------------------------------- command line
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=29)
    common = ["--data.train", str(data), "--data.batch_size", "4", "--checkpoint.every_n_train_steps", "3"]
    common += ["--model.lora.dropout", "0.1"]
    assert main([*runs.little(tmp_path / "complete", "lora", steps=12), *common]) == 0
    cut = [*runs.little(tmp_path / "cut", "lora", steps=12), *common]
    assert main([*cut, "--checkpoint.save_top_k", "-1"]) == 0
    kept = next((tmp_path / "cut" / "checkpoints").glob("*step=6.ckpt")).rename(tmp_path / "kept.ckpt")
    names = torch.load(kept, weights_only=True)["state_dict"].keys()
    assert all(".lora_" in name for name in names if name.startswith("model.student."))
    assert main([*cut, "--ckpt_path", str(kept)]) == 0
    for folder in ("student/model.safetensors", "adapter/adapter_model.safetensors"):
        complete, resumed = (load_file(tmp_path / name / folder) for name in ("complete", "cut"))
        assert all(torch.equal(complete[name], resumed[name]) for name in complete)


@pytest.mark.parametrize("config", sorted(path.stem for path in runs.CONFIGS.glob("*.yaml")))
def test_every_config_accepts_a_lora_rank(config: str, tmp_path: Path) -> None:
    module = run([*runs.little(tmp_path, config), "--model.lora.r", "6"], start=False).model
    assert module.lora == (LoRA(r=6, alpha=32) if config == "lora" else LoRA(r=6))


BAD: dict[str, tuple[list[str], list[str]]] = {
    "rank": (["--model.lora.r", "0"], ["lora.r", "0"]),
    "alpha": (["--model.lora.alpha", "0"], ["lora.alpha", "0"]),
    "dropout": (["--model.lora.dropout", "1"], ["lora.dropout", "1"]),
    "no targets": (["--model.lora.targets", "[]"], ["lora.targets", "all-linear"]),
    "a target that is not there": (
        ["--model.lora.targets", "[q_prj]"],
        ["q_prj", "LlamaForCausalLM", "q_proj", "up_proj"],
    ),
    "a tied head": (["--model.lora.targets", "[lm_head]"], ["lm_head", "shares its weight", "embed_tokens"]),
    "an adapter off where there is none": (
        ["--model.teacher", "AdapterOffTeacher"],
        ["AdapterOffTeacher", "model.lora.r"],
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_a_bad_argument(case: tuple[list[str], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused([*runs.little(tmp_path / "root"), *case[0]], case[1], capfd)
    assert not (tmp_path / "root" / "student").exists()


def test_adapters_on_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(add_adapters(tiny("llama"), LoRA()), LoRA())


def test_targets_match_suffixes_of_layer_names() -> None:
    student = add_adapters(tiny("llama"), LoRA(targets="1.self_attn.v_proj"))
    inside = "base_model.model.model.layers.1.self_attn.v_proj"
    assert learning(student) == {f"{inside}.lora_A.default.weight", f"{inside}.lora_B.default.weight"}


def test_modes_are_restored() -> None:
    student = add_adapters(tiny("gpt2"), LoRA()).train()
    student.base_model.model.transformer.h[0].eval()
    before = [module.training for module in student.modules()]
    with eval_mode(student), torch.no_grad():
        hidden_states(student.base_model.model.transformer, tokens())
        assert not any(module.training for module in student.modules())
    assert [module.training for module in student.modules()] == before
