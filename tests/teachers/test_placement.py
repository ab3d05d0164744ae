"""Where a teacher lies changes nothing of what it says: the student with its adapters off, layers in host memory."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import processes
import runs
from adapters import stirred
from architectures import VOCABULARY, tiny
from kd_lightning import DistillationModule
from kd_lightning.cli.program import main
from kd_lightning.distributed.fsdp2 import transformer_layers
from kd_lightning.models.lora import LoRA, add_adapters
from kd_lightning.teachers.adapter_off import AdapterOffTeacher
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.teachers.offloaded import OffloadedTeacher
from teacher_batches import batch
from tiny_fits import assert_same_student, bundled, fit, of_rank, rows, split

SGD = functools.partial(torch.optim.SGD, lr=1.0)


# ---------------------------------------------------------------------------------------------------------- adapter off
def with_itself(student: nn.Module, **kwargs: Any) -> DistillationModule:
    return DistillationModule(student, AdapterOffTeacher(), optimizer=SGD, **kwargs)


def test_adapter_off_is_the_model_as_it_was() -> None:
    plain = tiny("gpt2").train()  # with dropout, which a teacher has not
    original = copy.deepcopy(plain).eval()
    module = with_itself(stirred(add_adapters(plain, LoRA(r=2, dropout=0.5))))
    module.configure_model()
    teacher, tokens = module.teacher, batch()
    assert teacher is not None and teacher.head is not None
    with torch.no_grad():
        expected = original(**tokens)
        torch.testing.assert_close(teacher.logits(tokens), expected.logits)
        torch.testing.assert_close(teacher.hidden(tokens), original.transformer(**tokens).last_hidden_state)
        assert (module.student.eval()(**tokens).logits - expected.logits).abs().max() > 0.01
    assert sum(p.requires_grad for p in module.student.parameters()) > 0


def test_it_is_no_second_copy() -> None:
    module = with_itself(tiny("llama"), lora=LoRA(r=2))
    module.configure_model()
    assert module.teacher is not None and module.teacher.head is not None
    own = {p.data_ptr() for p in module.student.parameters()}
    assert module.teacher.head.weight.data_ptr() in own
    assert not any(
        isinstance(value, (Tensor, nn.Module)) for value in vars(module.teacher).values() if value is not module.model
    )
    assert "teacher" not in " ".join(module.state_dict())


def test_a_step_beside_itself_is_one_beside_a_copy() -> None:
    student = stirred(add_adapters(tiny("llama"), LoRA(r=2)))
    original = tiny("llama")
    original.load_state_dict(
        {
            name.replace("base_model.model.", "").replace(".base_layer", ""): tensor
            for name, tensor in student.state_dict().items()
            if "lora_" not in name
        }
    )
    twin, before, one = copy.deepcopy(student), copy.deepcopy(student.state_dict()), rows(vocabulary=VOCABULARY)
    alone = fit(with_itself(student), split(one, 6, 6), accumulate_grad_batches=2)
    pair = fit(DistillationModule(twin, original, optimizer=SGD), split(one, 6, 6), accumulate_grad_batches=2)
    states = [{k: v.clone() for k, v in module.student.state_dict().items()} for module in (alone, pair)]
    assert_same_student(*states, atol=1e-6)
    assert any((states[0][name] - tensor).norm() > 0.01 for name, tensor in before.items())


def test_its_fingerprint_is_the_frozen_models() -> None:
    module = with_itself(add_adapters(tiny("llama"), LoRA(r=2)))
    module.configure_model()
    assert module.teacher is not None
    first = module.teacher.fingerprint()
    stirred(module.student)
    assert module.teacher.fingerprint() == first
    with torch.no_grad():
        next(p for p in module.student.parameters() if not p.requires_grad)[0, 0] += 1
    assert module.teacher.fingerprint() != first


def test_before_it_has_met_a_student_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"not attached to a student yet: call `attach"):
        AdapterOffTeacher().hidden(batch())


def adapter_off_on_a_rank(rank: int) -> dict[str, Tensor]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.manual_seed(0)
    module = bundled(teacher=AdapterOffTeacher(), lora=LoRA(r=2))
    module.configure_model()
    stirred(module.student)
    fit(module, of_rank(rows(), rank), accumulate_grad_batches=2, devices=2, strategy="ddp")
    return {name: tensor.clone() for name, tensor in module.student.state_dict().items()}


@pytest.mark.slow
def test_two_ranks_with_the_adapter_off_are_one_process() -> None:
    torch.manual_seed(0)
    module = bundled(teacher=AdapterOffTeacher(), lora=LoRA(r=2))
    module.configure_model()
    stirred(module.student)
    before = copy.deepcopy(module.student.state_dict())
    fit(module, split(rows(), 8, 4))
    after = module.student.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for found in processes.run(adapter_off_on_a_rank):
        assert_same_student(found, after)


# ------------------------------------------------------------------------------------------------------------ offloaded
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "cohere"])
def test_an_offloaded_teacher_says_the_same(model_type: str) -> None:
    model = tiny(model_type)
    here, away = HFTeacher(copy.deepcopy(model)), OffloadedTeacher(model)  # type: ignore[arg-type]
    here.load()
    away.load("cpu")
    assert here.fingerprint() == away.fingerprint()
    tokens = batch()
    assert torch.equal(here.hidden(tokens), away.hidden(tokens))
    assert torch.equal(here.logits(tokens), away.logits(tokens))


def test_layers_visit_the_device_one_at_a_time() -> None:
    model = tiny("llama", attn_implementation="eager")  # the others look at numbers of the mask
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    teacher = OffloadedTeacher(model)  # type: ignore[arg-type]
    teacher.load("meta")  # a device like any other, but for its numbers
    parts, there = transformer_layers(model), []

    def look(*_: Any) -> None:
        there.append([{p.device.type for p in part.parameters()} for part in parts])

    for part in parts:
        part.register_forward_pre_hook(look)
    tokens = {name: column.to("meta") for name, column in batch().items()}
    assert teacher.hidden(tokens).device.type == "meta"
    assert there == [[{"meta"}, {"cpu"}], [{"cpu"}, {"meta"}]]
    assert teacher.head is not None and teacher.head.weight.device.type == "meta"
    for part in parts:
        assert {p.device.type for p in part.parameters()} == {"cpu"}
    inside = {id(p) for part in parts for p in part.parameters()}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in inside) == (parameter.device.type == "cpu")
        if id(parameter) in inside:
            assert torch.equal(parameter, before[name])
    teacher.to("meta")
    assert all(len(part._forward_hooks) == 1 for part in parts)


def test_a_layer_goes_home_when_its_forward_fails() -> None:
    model = tiny("llama")
    teacher = OffloadedTeacher(model)  # type: ignore[arg-type]
    teacher.load("meta")
    with pytest.raises(RuntimeError):
        teacher.hidden(batch())  # tokens on another device
    with pytest.raises(RuntimeError):
        model.model.layers[0](torch.ones(1, 2, 32))
    assert {p.device.type for p in model.model.layers[0].parameters()} == {"cpu"}


def test_a_tied_weight_stays_one() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    teacher = OffloadedTeacher(model)  # type: ignore[arg-type]
    teacher.load("meta")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_placements_of_a_run(tmp_path: Path) -> None:
    """One argument says where the teacher lies; the run is the same."""
    where = {"here": [], "away": ["--model.teacher", "OffloadedTeacher", "--model.teacher.path", "asset:teacher"]}
    for name, words in where.items():
        assert main([*runs.little(tmp_path / name, steps=2), *words]) == 0
    here, away = runs.student(tmp_path / "here"), runs.student(tmp_path / "away")
    assert all(torch.equal(here[name], away[name]) for name in here)
    assert "OffloadedTeacher" in (tmp_path / "away" / "config.yaml").read_text()
