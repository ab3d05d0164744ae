"""The contract of the data modules: what is known of the data module of a run, and the defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from kd_lightning.data import (
    ContrastiveDataModule,
    DistillationDataModule,
    InstructionDataModule,
    PromptDataModule,
    datamodule_of,
)
from kd_lightning.data.base import max_length_of, tokenizer_of


class Custom(L.LightningDataModule):
    """A data module of a user's own class."""

    max_length = 7


def trainer_of(datamodule: Any) -> L.Trainer:
    """A trainer with a data module."""
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    return trainer


@pytest.fixture
def data(tmp_path: Path) -> InstructionDataModule:
    rows = [{"instruction": f"say {n}", "output": f"yes {n}"} for n in range(5)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return InstructionDataModule(str(path), batch_size=3)


def test_the_data_module_of_a_run(data: InstructionDataModule) -> None:
    assert datamodule_of(trainer_of(data)) is data
    assert max_length_of(trainer_of(data)) == 512
    assert datamodule_of(None) is tokenizer_of(None) is max_length_of(None) is None
    assert datamodule_of(trainer_of(None)) is None


def test_of_a_custom_data_module_only_tokenizer_and_length_are_read() -> None:
    custom = Custom()
    assert datamodule_of(trainer_of(custom)) is None
    assert tokenizer_of(trainer_of(custom)) is None and max_length_of(trainer_of(custom)) == 7
    custom.tokenizer = object()  # type: ignore[attr-defined]
    assert tokenizer_of(trainer_of(custom)) is custom.tokenizer  # type: ignore[attr-defined]


def test_the_tokenizer_of_the_student_is_a_default(data: InstructionDataModule) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer is not loaded yet: call InstructionDataModule.setup"):
        _ = data.tokenizer
    data.use_tokenizer_of(None)
    data.use_tokenizer_of("asset:student")
    data.use_tokenizer_of("/nowhere")
    data.setup("fit")
    assert tokenizer_of(trainer_of(data)) is data.tokenizer


def test_by_default_no_responses_are_accepted(data: InstructionDataModule) -> None:
    assert not data.accepts_responses and data.missing_responses() == []
    with pytest.raises(ValueError, match="InstructionDataModule accepts no generated responses: use PromptDataModule"):
        data.replace_responses({0: "a"})


def test_what_the_data_modules_declare() -> None:
    assert PromptDataModule.accepts_responses and not PromptDataModule.responses_can_change
    assert ContrastiveDataModule.accepts_responses and ContrastiveDataModule.responses_can_change
    assert InstructionDataModule("a").rows_per_batch == 8 and ContrastiveDataModule("a").rows_per_batch == 16
    with pytest.raises(TypeError, match="abstract"):
        DistillationDataModule()  # type: ignore[abstract]


def test_callbacks_before_a_pass_are_called_in_their_order(data: InstructionDataModule) -> None:
    calls: list[tuple[str, int]] = []
    data.add_before_pass(lambda number: calls.append(("first", number)))
    data.add_before_pass(lambda number: calls.append(("second", number)))
    data.run_before_pass(3)
    assert calls == [("first", 3), ("second", 3)]


@pytest.mark.parametrize("first", [None, 0, 2, 5, 9])
def test_only_the_generation_rows_asked_for(data: InstructionDataModule, first: int | None) -> None:
    data.use_tokenizer_of("asset:student")
    data.setup("fit")
    rows = data.generation_rows("train")
    assert len(rows) == 5 and data.generation_rows("train", first) == rows[:first]
