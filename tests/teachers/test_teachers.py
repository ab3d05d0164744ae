"""Body and head say what the model says, for every kind of model; the teacher is frozen and outside every tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from architectures import BIASED, CUT, SCALE, SOFTCAP, UNCUT, VOCABULARY, tiny
from kd_lightning import ReverseKL, distillation_loss, fused_distillation_loss
from kd_lightning.models.backbone import body_and_head, hidden_states
from kd_lightning.teachers import hf as teachers
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.teachers.offloaded import OffloadedTeacher
from teacher_batches import assert_same, batch, said


# ------------------------------------------------------------------------------------------------------ body and head
@pytest.mark.parametrize("model_type", CUT)
def test_body_and_head_give_the_models_own_logits(model_type: str) -> None:
    model = tiny(model_type)
    numbers = torch.get_rng_state()
    body, head = body_and_head(model)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert head.scale == pytest.approx(SCALE.get(model_type, 1.0), rel=1e-12)
    assert head.softcap == SOFTCAP.get(model_type)
    assert (head.bias is not None) == (model_type in BIASED)
    assert_same(model, body, head)


@pytest.mark.parametrize("model_type", UNCUT)
def test_what_cannot_be_cut_is_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(ValueError, match=UNCUT[model_type][1]) as error:
        body_and_head(tiny(model_type))
    assert "\n" not in str(error.value)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot be split"):
        body_and_head(T5ForConditionalGeneration(config))


@pytest.mark.parametrize("model_type", ["cohere", "gemma2", "granite", "mpt", "minicpm3"])
@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_factors_are_found_where_the_logits_are_near_zero(model_type: str, size: float) -> None:
    model = tiny(model_type, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(size)
    head = body_and_head(model)[1]
    assert head.scale == pytest.approx(SCALE.get(model_type, 1.0))
    assert head.softcap == SOFTCAP.get(model_type)


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "phi", "llama"])
def test_a_model_in_bf16_reads_the_same(model_type: str) -> None:
    head = body_and_head(tiny(model_type).to(torch.bfloat16))[1]
    assert head.scale == pytest.approx(SCALE.get(model_type, 1.0))
    assert head.softcap == SOFTCAP.get(model_type)
    assert head.weight.dtype == torch.bfloat16


def test_autocast_around_it_changes_nothing() -> None:
    model = tiny("gemma2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        body, head = body_and_head(model)
    assert head.softcap == 1.5
    assert_same(model, body, head)


def test_modes_stay_as_they_were() -> None:
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    body_and_head(model)
    assert [module.training for module in model.modules()] == before
    assert not model.lm_head._forward_hooks


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gptj"])
def test_gradients_reach_the_models_own_parameters(model_type: str, tied: bool) -> None:
    model = tiny(model_type, tie_word_embeddings=tied)
    body, head = body_and_head(model)
    tokens = batch()
    teachers.logits(model, **tokens).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    said(head, hidden_states(body, **tokens)).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["cohere", "gemma2", "gptj", "minicpm3"])
def test_the_loss_of_hidden_states_is_the_loss_of_whole_logits(model_type: str) -> None:
    student, teacher = tiny(model_type), tiny("recurrent_gemma")
    (body, head), (teacher_body, teacher_head) = body_and_head(student), body_and_head(teacher)
    tokens = batch()
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    settings = {"objective": ReverseKL(), "ce_weight": 0.3, "temperature": 2.0}
    with torch.no_grad():
        hidden, whole = hidden_states(teacher_body, **tokens), teachers.logits(teacher, **tokens)
    expected = distillation_loss(teachers.logits(student, **tokens), whole, labels, **settings)
    found = fused_distillation_loss(hidden_states(body, **tokens), head, hidden, teacher_head, labels, **settings)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    parameters = [p for p in student.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


class Wrapped(nn.Module):
    """What PEFT puts around a model, as far as it is asked here; virtual tokens are what prompt tuning adds."""

    def __init__(self, model: PreTrainedModel, virtual: int = 0) -> None:
        super().__init__()
        self.base_model, self.virtual = model, virtual

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> object:
        front = (len(input_ids), self.virtual)
        ids = torch.cat([input_ids.new_full(front, 5), input_ids], dim=1)
        mask = torch.cat([attention_mask.new_ones(front), attention_mask], dim=1)
        return self.base_model(input_ids=ids, attention_mask=mask, use_cache=use_cache)


def test_a_wrapped_model_is_cut_where_its_base_is() -> None:
    model = tiny("llama")
    body, head = body_and_head(Wrapped(model))
    assert body is model.model
    assert head.weight is model.lm_head.weight


def test_tokens_that_only_the_wrapper_adds_are_noticed() -> None:
    with pytest.raises(ValueError, match="Wrapped cannot be split"):
        body_and_head(Wrapped(tiny("llama"), virtual=2))


@pytest.mark.parametrize("name", ["base_layer", "original_module"])
def test_an_adapter_on_the_head_is_refused(name: str) -> None:
    model = tiny("llama")
    layer = nn.Linear(32, VOCABULARY, bias=False)
    layer.add_module(name, model.lm_head)
    model.lm_head = layer
    with pytest.raises(ValueError, match="its LM head has an adapter"):
        body_and_head(model)


class CappedBehind(nn.Module):
    """A model that does to its logits what its configuration does not say."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner, self.config = model, model.config
        self.get_decoder, self.get_output_embeddings = model.get_decoder, model.get_output_embeddings

    def forward(self, **inputs: Tensor) -> object:
        output = self.inner(**inputs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


def test_a_factor_that_the_configuration_does_not_name_is_noticed() -> None:
    with pytest.raises(ValueError, match="more than a matrix"):
        body_and_head(CappedBehind(tiny("llama")))


# ----------------------------------------------------------------------------------------------------------- teachers
@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny("gemma2").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_teacher_is_made_without_reading_anything() -> None:
    teacher = HFTeacher("/nowhere/teacher")
    assert teacher.name == "/nowhere/teacher"
    assert not isinstance(teacher, nn.Module)
    with pytest.raises(ValueError, match="not loaded"):
        teacher.logits(batch())


def test_arguments_are_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        HFTeacher("x", {"trust_remote_code": True})
    with pytest.raises(ValueError, match="float33"):
        HFTeacher("x", {"dtype": "float33"})
    with pytest.raises(ValueError, match="loaded already"):
        HFTeacher(tiny("llama"), {"dtype": "float32"})  # type: ignore[arg-type]


def test_a_teacher_is_frozen_and_its_parts_say_what_it_says(folder: str) -> None:
    teacher = HFTeacher(folder, {"dtype": "float32"})
    teacher.load()
    model = teacher.model
    teacher.load("cpu")
    assert teacher.model is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = batch()
    hidden, whole = teacher.hidden(tokens), teacher.logits(tokens)
    assert not hidden.requires_grad
    assert not hidden.is_inference()  # it meets tensors that want a gradient
    counted = tokens["attention_mask"].bool()
    assert teacher.head is not None
    torch.testing.assert_close(said(teacher.head, hidden)[counted], whole[counted], atol=1e-4, rtol=0)


def test_a_teacher_keeps_the_type_it_was_saved_in(folder: str) -> None:
    teacher = HFTeacher(folder)
    teacher.load()
    assert teacher.hidden(batch()).dtype == torch.bfloat16


def test_a_loaded_model_is_a_teacher_too() -> None:
    model = tiny("llama").train()
    teacher = HFTeacher(model)  # type: ignore[arg-type]
    assert teacher.name is None
    teacher.load()
    assert teacher.model is model
    assert not model.training
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        HFTeacher(model).load()  # type: ignore[arg-type]


def test_a_teacher_that_cannot_be_cut_gives_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    monkeypatch.setattr(teachers, "rank_zero_info", notices.append)
    model = tiny("roberta")
    teacher = HFTeacher(model)  # type: ignore[arg-type]
    teacher.load()
    assert teacher.head is None
    assert len(notices) == 1
    tokens = batch()
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(tokens), model(**tokens).logits)
    with pytest.raises(ValueError, match="ask for its logits"):
        teacher.hidden(tokens)


def test_a_misspelt_class_is_answered_with_the_classes() -> None:
    with pytest.raises(ValueError, match=r"HFTeachr.*no class of that name.*HFTeacher\b") as error:
        HFTeacher("HFTeachr").load()
    assert "\n" not in str(error.value)


def test_a_fingerprint_changes_with_any_weight(folder: str) -> None:
    first, second = HFTeacher(folder), HFTeacher(folder)
    first.load()
    second.load()
    assert first.fingerprint() == second.fingerprint()
    with torch.no_grad():
        second.model.model.layers[0].mlp.up_proj.weight[1, 2] *= 1.01
    assert first.fingerprint() != second.fingerprint()


def test_every_leaf_is_final_and_complete() -> None:
    classes = [Teacher]
    for one in classes:  # grows
        classes += one.__subclasses__()
    assert {HFTeacher, OffloadedTeacher} < set(classes)
    for one in classes:
        assert bool(one.__subclasses__()) == bool(one.__abstractmethods__)
