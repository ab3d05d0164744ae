"""The teacher role, and what a teacher is given of the run it takes part in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd_lightning.divergences import Divergence
from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK, check_lower_bound
from kd_lightning.engine.vocabulary_map import VocabularyMap
from kd_lightning.losses import DistillationLoss
from kd_lightning.teachers.planning.sources import CachedOutputs, ConfigSource
from kd_lightning.teachers.routing.share import rows_of, with_student_input


class StudentModel(Protocol):
    """The student of a run; `training.student.StudentWithLoss` implements it."""

    student: nn.Module
    packed: bool  # whether the models of the run read rows without padding

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the student has logits for."""

    @property
    def body(self) -> nn.Module | None:
        """The module that returns the student's hidden states; None if the model cannot be split there."""

    def head(self) -> Head | None:
        """The student's LM head with its current weights; None if the model cannot be split there."""

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, with sharded parameters gathered."""


class TokenizedText(Protocol):
    """What the models of a run read; `data.alignment.two_tokenizers.TwoTokenizers` implements it."""

    @property
    def text_tokenizer(self) -> Any:
        """The `TextTokenizer` that turned the rows into tokens."""

    @property
    def teacher_text_tokenizer(self) -> Any:
        """The same for the teacher's input."""

    @property
    def teacher_has_own_input(self) -> bool:
        """Whether the teacher reads something else than the student."""

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """The tokens that student and teacher share; None: they have one tokenizer."""

    def longest(self, role: str = "student") -> int:
        """Number of tokens of the longest row, as a role reads it."""


class TokenizedData(TokenizedText, Protocol):
    """The data of a run, tokenized; `data.base.DistillationDataModule` implements it."""

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits that are loaded."""

    def for_member(self, name: str) -> TokenizedText:
        """What one of several teachers reads."""

    def every_row(self, split: str) -> Iterable[dict[str, Tensor]]:
        """Batches that together hold every row of a split once (this rank's share of them)."""

    def row_locations(self, split: str, row_ids: list[int]) -> list[str]:
        """File and line of each of these rows."""

    def look_ahead(self, callback: Callable[[dict[str, Tensor]], None]) -> None:
        """Call `callback(batch)` with each batch before the one in front of it is trained on."""

    def add_index_column(self, name: str, field: str, values: Sequence[str], default: str | None = None) -> None:
        """Give every batch a column [B]: the index of each row's field among these values."""

    def index_column(self, name: str, split: str) -> Mapping[int, int]:
        """The index of every row of a split, by `row_ids`, in a column of `add_index_column`."""


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class RunContext:
    """The run that a teacher takes part in.

    Args:
        student: the student, loaded.
        loss: the training loss.
        monitors: divergences measured in validation and test, by name.
        data: the tokenized data; None if nothing is known of it (no Trainer yet, or a custom data module).
        generates_responses: whether responses are generated during the run.
        sum_over_ranks: sums a tensor over all ranks; every rank must call it.
    """

    student: StudentModel
    loss: DistillationLoss
    monitors: Mapping[str, Divergence] = field(default_factory=dict)
    data: TokenizedData | None = None
    generates_responses: bool = False
    sum_over_ranks: Callable[[Tensor], Tensor] = _same

    def check_top_k_loss(self) -> None:
        """Check that loss and monitors can be computed from the teacher's top k.

        Raises:
            ValueError: one of them is not a lower bound there, or the temperature is not 1.
        """
        check_lower_bound(self.loss.objective, self.monitors)
        temperature = self.loss.token_loss.temperature
        if temperature != 1:
            raise ValueError(
                f"temperature must be 1 with a top-k teacher (the probabilities of its other tokens are unknown), got "
                f"{temperature}"
            )


@dataclass(frozen=True)
class TeacherShare:
    """A teacher and the rows of a batch that it teaches.

    Args:
        teacher: not made of others.
        rows: indices of the rows, [n]; None: all rows. Without any, the teacher must be run all the same, as other
            ranks wait for it; the results are not used.
        member: its name among the teachers of a run; "": there is one.
        reads_student_input: whether it reads what the student reads in a batch in which other teachers do not.
    """

    teacher: Teacher
    rows: Tensor | None = None
    member: str = ""
    reads_student_input: bool = False

    def rows_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its rows of a batch, as it reads them; the first row, without labels, if there are none."""
        found = rows_of(batch, self.rows)
        return with_student_input(found) if self.reads_student_input else found


class Teacher(ABC):
    """The source of the teacher's distribution. A plain object: never in a `state_dict`, a summary, or under DDP.

    The constructor checks arguments and reads nothing; `load` reads; `hidden` and `logits` answer for one batch. A
    batch is a mapping with `input_ids`, `attention_mask` and `labels` of shape [B, T]. Results carry no gradient, and
    need to be correct only at positions whose next token has a label.

    Attributes:
        model: the Hugging Face causal LM in this process, once loaded; None if there is none. A custom teacher may
            set it: the model is then also checked against the data and used for generation.
        shares_student: whether it computes with the student's own weights.
        starts_as_student: whether it is made from the student when it is attached, and equal to it then.
        column: the field with which a row names its teacher; None: it is not made of others.
        default: the teacher of rows that name none; None: there is none.

    Examples:
        >>> from kd_lightning import HFTeacher, Teacher
        >>> teacher: Teacher = HFTeacher("asset:teacher")
        >>> teacher.vocabulary is None  # nothing is loaded yet
        True
        >>> teacher.load()
        >>> teacher.vocabulary, teacher.can_generate
        (2048, True)
    """

    model: nn.Module | None = None
    shares_student: bool = False
    starts_as_student: bool = False
    column: str | None = None
    default: str | None = None

    @property
    @abstractmethod
    def name(self) -> str | None:
        """Folder or hub name of its tokenizer; None if it has none of its own."""

    @property
    @abstractmethod
    def head(self) -> Head | None:
        """The LM head that turns `hidden` into logits; None if only `logits` is available."""

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that its LM head has logits for; None without a head."""
        head = self.head
        return None if head is None else head.vocabulary

    @property
    def can_generate(self) -> bool:
        """Whether `model` can generate responses (after `load`)."""
        return self.model is not None

    @property
    def members(self) -> Mapping[str, Teacher]:
        """The teachers that it is made of, by name; a teacher that is not made of others is its own only member."""
        return {"": self}

    @property
    def state(self) -> nn.Module | None:
        """Tensors that belong into the checkpoint of the run; None if there are none. Available once attached."""
        return None

    @property
    def knows_all_tokens(self) -> bool:
        """Whether it gives full distributions; False: only their top k tokens."""
        return True

    @property
    def is_collective(self) -> bool:
        """Whether all ranks must run it equally often, as parameters that it computes with are sharded."""
        return False

    @property
    def config_source(self) -> ConfigSource | None:
        """Where its model's configuration is; None if `plan` has nothing to build it from."""
        return None

    @property
    def cached_outputs(self) -> CachedOutputs | None:
        """Shapes of what it reads instead of computing; None if it computes, or there is no cache yet."""
        return None

    @abstractmethod
    def load(self, device: torch.device | str = "cpu") -> None:
        """Read everything that is needed and move it to a device; a second call only moves."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move to a device; does nothing if it is there already."""

    def attach(self, run: RunContext) -> None:  # noqa: B027 - most teachers do not depend on the run
        """Take part in a run; called after the student is loaded and before `load`.

        Args:
            run: the student, the loss and the data.

        Raises:
            ValueError: the teacher does not fit the run.
        """

    def check_data(self, data: TokenizedData) -> None:  # noqa: B027 - most teachers read any rows
        """Check the rows before the first step, and ask for the columns that it reads; `attach` calls it.

        Raises:
            ValueError: a row cannot be used.
        """

    def check_cacheable(self) -> None:  # noqa: B027 - most teachers can be cached
        """Check that its outputs can be cached before the run.

        Raises:
            ValueError: they change during the run, or cannot be in one cache.
        """

    def after_step(self) -> None:  # noqa: B027 - most teachers do not change
        """Follow the student, which has taken an optimizer step."""

    def shares(self, batch: Mapping[str, Tensor]) -> list[TeacherShare]:
        """The teachers of the rows of a batch: this one for all rows, unless it is made of others."""
        return [TeacherShare(self)]

    def member_indices(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The number of each row's teacher among `members`, [B]; None if it is not made of others."""
        return None

    def map_members(self, function: Callable[[Teacher], Teacher]) -> Teacher:
        """The same teacher with `function(member)` for every member; for one that is not made of others, of itself."""
        return function(self)

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:  # noqa: B027 - most teachers have nothing to shard
        """Let a strategy shard the parameters over ranks; a second call does nothing.

        Args:
            wrap: shards a model in place and returns a module that gathers its parameters: `wrap(model)(f, *args)`
                is `f(*args)` with full parameters.
        """

    def prefetch(self, batch: Mapping[str, Tensor]) -> None:  # noqa: B027 - most teachers compute
        """Begin to ask for the outputs of a batch that is read later; does not wait."""

    @abstractmethod
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H]."""

    @abstractmethod
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor | TopK:
        """Logits [B, T, V]; `TopK` of shape [B, T] if only the top k are known."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes with any weight: teachers with equal fingerprints give equal results."""


def generating_model(teacher: Teacher | None) -> nn.Module | None:
    """The teacher's model if it can generate responses, else None."""
    return teacher.model if teacher is not None and teacher.can_generate else None
