"""Data modules: files of instructions and conversations in, batches of tokens out."""

from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.data.alignment.vocabulary import vocabulary_map
from kd_lightning.data.base import DistillationDataModule, datamodule_of
from kd_lightning.data.collate import Collator, PromptCollator, left_pad
from kd_lightning.data.contrastive import ContrastiveDataModule
from kd_lightning.data.instruction import InstructionDataModule
from kd_lightning.data.prompt import PromptDataModule

__all__ = [
    "IGNORE_INDEX",
    "Collator",
    "ContrastiveDataModule",
    "DistillationDataModule",
    "InstructionDataModule",
    "PromptCollator",
    "PromptDataModule",
    "datamodule_of",
    "left_pad",
    "vocabulary_map",
]
