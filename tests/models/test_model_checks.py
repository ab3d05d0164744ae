"""A multimodal model as a student of text: what text does not reach is frozen, alone and on two ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multimodal
import processes
from architectures import tiny
from kd_lightning import DistillationModule
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.models.lora import LoRA
from kd_lightning.models.model_checks import freeze_unreached
from kd_lightning.strategies import FSDP2Strategy
from sharded_fits import joined
from tiny_fits import fit, rows, split

TOWERS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen2_vl": ("model.visual",),
    "mllama": ("model.language_model.layers.1", "model.vision_model", "model.multi_modal_projector"),
}
DECAYING = functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.5)


def module(name: str, **kwargs: Any) -> DistillationModule:
    settings = {"ce_weight": 0.5, "optimizer": DECAYING, **kwargs}
    return DistillationModule(multimodal.seeded(name), multimodal.seeded(name, 1), **settings)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", TOWERS)
def test_the_parameters_that_text_does_not_reach_stay_as_they_are(name: str, caplog: pytest.LogCaptureFixture) -> None:
    before = parameters(multimodal.seeded(name))
    trained = fit(module(name), split(rows(6, vocabulary=60), 3, 3))
    (notice,) = (record.getMessage() for record in caplog.records if "frozen" in record.getMessage())
    assert "\n" not in notice and all(tower in notice for tower in TOWERS[name])
    after = parameters(trained.student)
    for key, value in before.items():
        assert torch.equal(value, after[key]) == key.startswith(TOWERS[name]), key


def on_ranks(rank: int) -> dict[str, dict[str, Tensor]]:
    """Weights after a fit by ddp; a fit by fsdp2 ends as well."""
    joined(rank, 2)
    batches = split(rows(8, vocabulary=60), 2, 2, 2, 2)[rank::2]
    found = {name: parameters(fit(module(name), batches, devices=2, strategy="ddp").student) for name in TOWERS}
    for name in TOWERS:
        assert fit(module(name), batches, devices=2, strategy=FSDP2Strategy()).trainer.global_step == 2
    return found


@pytest.mark.slow
def test_on_two_ranks() -> None:
    one, two = processes.run(on_ranks)
    for name, towers in TOWERS.items():
        before = parameters(multimodal.seeded(name))
        for key, value in one[name].items():
            assert torch.equal(value, two[name][key])
            assert torch.equal(value, before[key]) == key.startswith(towers)


def test_adapters_of_the_tower_are_frozen_too() -> None:
    adapted = module("gemma3", lora=LoRA(r=2))
    adapted.configure_model()
    trainable = [name for name, parameter in adapted.student.named_parameters() if parameter.requires_grad]
    assert trainable and all("language_model" in name for name in trainable)


def test_what_the_user_has_frozen_stays_frozen() -> None:
    student = multimodal.seeded("llava")
    student.model.requires_grad_(False)  # type: ignore[operator]
    assert freeze_unreached(student) is None
    assert [name for name, parameter in student.named_parameters() if parameter.requires_grad] == ["lm_head.weight"]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v2", "gpt2", "mamba2"])
def test_models_of_text_alone_train_in_full(kind: str) -> None:
    model = tiny(kind)
    assert freeze_unreached(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_that_no_token_is_routed_to_are_trained() -> None:
    class Routed(nn.Module):
        """Two experts, of which the probe uses one."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.unused = tiny("llama"), nn.Linear(2, 2)
            self.experts = nn.ModuleList([nn.Linear(80, 80), nn.Linear(80, 80)])

        def forward(self, **inputs: Any) -> Any:
            found = self.model(**inputs)
            found.logits = self.experts[0](found.logits)
            return found

    model = Routed()
    assert freeze_unreached(model) == "6 parameters are frozen, because text does not reach them: unused"
    assert all(parameter.requires_grad for parameter in model.experts.parameters())


def test_a_folder_that_is_refused_names_its_text_model(tmp_path: Path) -> None:
    multimodal.seeded("llava").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'llava', which is not a causal .*: save its text model alone .LlamaForCausal"
    ):
        load_causal_lm(str(tmp_path))
    multimodal.seeded("gemma3").save_pretrained(tmp_path / "gemma3")
    assert type(load_causal_lm(str(tmp_path / "gemma3"))).__name__ == "Gemma3ForConditionalGeneration"
