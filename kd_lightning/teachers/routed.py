"""Several teachers, each of which teaches the rows that name it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kd_lightning.constants import TEACHER_INDEX
from kd_lightning.teachers.base import RunContext, Teacher, TeacherShare, TokenizedData
from kd_lightning.teachers.hf import as_teacher
from kd_lightning.teachers.routing.rows import RowsOfMember


class RoutedTeacher(Teacher):
    """Several teachers: each row of the data is taught by the one that it names.

    The teachers may differ in width, LM head, vocabulary padding and dtype; each is loaded, offloaded or cached as its
    own class says. Each may have the student's tokenizer or another one. A step equals the sum of the steps of the
    single teachers on their rows, under one divisor. Validation logs every value over all rows and for each teacher, as
    `val/forward_kl/NAME`.

    Reduces to a single teacher if every row names it.

    Args:
        teachers: by name: a `Teacher`, or a folder, hub name or `asset:` name; in Python also a loaded model.
        column: field of a row that holds the name of its teacher.
        default: name of the teacher of rows without that field, or with a name that is none of `teachers`; None: such
            rows are refused.

    Raises:
        ValueError: there are no teachers, a name is empty, or the default is none of them; when the run starts: a row
            names no teacher (the message has file and line), or a tokenizer cannot be compared with the student's.

    Examples:
        >>> from kd_lightning import CachedTeacher, RoutedTeacher
        >>> teacher = RoutedTeacher({"text": "asset:teacher", "math": CachedTeacher("runs/math")}, default="text")
        >>> {name: type(member).__name__ for name, member in teacher.members.items()}
        {'text': 'HFTeacher', 'math': 'CachedTeacher'}
    """

    def __init__(
        self, teachers: dict[str, Teacher | str], column: str = "teacher_id", default: str | None = None
    ) -> None:
        if not teachers:
            raise ValueError("teachers must name at least one teacher, got none")
        if wrong := [name for name in teachers if not isinstance(name, str) or not name.strip()]:
            raise ValueError(f"teachers must have names that are not empty, got {wrong[0]!r}")
        if not isinstance(column, str) or not column:
            raise ValueError(f"column must be the name of a field of the rows, got {column!r}")
        if default is not None and default not in teachers:
            raise ValueError(f"default must be one of {', '.join(teachers)} or None, got {default!r}")
        self.teachers: dict[str, Teacher] = {}
        for name, teacher in teachers.items():
            found = as_teacher(teacher)
            if found is None or len(found.members) > 1 or found.members.get("") is not found:
                raise ValueError(
                    f"teachers[{name!r}] must be a teacher, the name of a model or a loaded model, got "
                    f"{'None' if found is None else type(found).__name__}"
                )
            self.teachers[name] = found
        self.column: str = column
        self.default = default
        self._readers_of_student: frozenset[str] = frozenset()
        self._translated: frozenset[str] = frozenset()  # those that read other tokens than the student
        self.shares_student = all(teacher.shares_student for teacher in self.teachers.values())
        self.starts_as_student = all(teacher.starts_as_student for teacher in self.teachers.values())
        self._states: nn.ModuleList | None = None

    # ------------------------------------------------------------------------------------------------------ the members
    @property
    def members(self) -> Mapping[str, Teacher]:
        """The teachers by name."""
        return self.teachers

    @property
    def name(self) -> None:
        """None: each teacher has a name of its own."""
        return None

    @property
    def head(self) -> None:
        """None: each teacher has an LM head of its own."""
        return None

    @property
    def vocabulary(self) -> int | None:
        """Number of the student's tokens that all teachers which read them have logits for; None: not known of one."""
        known = [teacher.vocabulary for name, teacher in self.teachers.items() if name not in self._translated]
        return None if None in known else min((size for size in known if size is not None), default=None)

    @property
    def can_generate(self) -> bool:
        """False: one model generates all responses of a batch; run `kd-lightning generate` with each teacher."""
        return False

    @property
    def state(self) -> nn.Module | None:
        """The states of all teachers, in their order; None if no teacher has one."""
        if self._states is None:
            states = [teacher.state for teacher in self.teachers.values()]
            if all(state is None for state in states):
                return None
            self._states = nn.ModuleList(nn.Module() if state is None else state for state in states)
        return self._states

    @property
    def knows_all_tokens(self) -> bool:
        """Whether all teachers give full distributions."""
        return all(teacher.knows_all_tokens for teacher in self.teachers.values())

    @property
    def is_collective(self) -> bool:
        """Whether one of the teachers computes with sharded parameters."""
        return any(teacher.is_collective for teacher in self.teachers.values())

    def check_data(self, data: TokenizedData) -> None:
        """Check that every row names a teacher, and number the teachers of the rows in a column of the batches.

        Raises:
            ValueError: a row names none; the message has file and line.
        """
        data.add_index_column(TEACHER_INDEX, self.column, list(self.teachers), self.default)
        for name, teacher in self.teachers.items():
            teacher.check_data(self._rows_of(data, name))

    def _rows_of(self, data: TokenizedData, name: str) -> RowsOfMember:
        return RowsOfMember(data, list(self.teachers).index(name), name)

    def check_cacheable(self) -> None:
        """Refuse: one cache belongs to one teacher.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "RoutedTeacher cannot be in one cache: run `kd-lightning cache` with each of its teachers as "
            "model.teacher, and pass a CachedTeacher for it in `teachers`"
        )

    def attach(self, run: RunContext) -> None:
        """Number the teachers of the rows, and attach every teacher with its own rows."""
        rows: dict[str, RowsOfMember] = {}
        if run.data is not None:
            self.check_data(run.data)
            rows = {name: self._rows_of(run.data, name) for name in self.teachers}
        self._readers_of_student = frozenset(name for name, own in rows.items() if own.reads_student_input)
        self._translated = frozenset(name for name, own in rows.items() if own.vocabulary_map is not None)
        for name, teacher in self.teachers.items():
            teacher.attach(dataclasses.replace(run, data=rows.get(name)))

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load every teacher."""
        for teacher in self.teachers.values():
            teacher.load(device)

    def to(self, device: torch.device | str) -> None:
        """Move every teacher."""
        for teacher in self.teachers.values():
            teacher.to(device)

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let a strategy shard every teacher."""
        for teacher in self.teachers.values():
            teacher.shard(wrap)

    def after_step(self) -> None:
        """Let every teacher follow the student."""
        for teacher in self.teachers.values():
            teacher.after_step()

    def map_members(self, function: Callable[[Teacher], Teacher]) -> Teacher:
        """The same routing with other teachers."""
        mapped: dict[str, Teacher | str] = {name: function(teacher) for name, teacher in self.teachers.items()}
        return RoutedTeacher(mapped, self.column, self.default)

    def fingerprint(self) -> str:
        """SHA-256 over the names and fingerprints of all teachers."""
        found = [f"{name} {teacher.fingerprint()}" for name, teacher in self.teachers.items()]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------------ the routing
    def member_indices(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The number of each row's teacher, [B].

        Raises:
            ValueError: the batch has no such column and there is no default, or a number is that of no teacher.
        """
        index = batch.get(TEACHER_INDEX)
        if index is None:
            if self.default is None:
                raise ValueError(
                    f"the batch has no column {TEACHER_INDEX!r}, the number of each row's teacher among "
                    f"{', '.join(self.teachers)}: use a data module of this package and rows with a field "
                    f"{self.column!r}, or pass default"
                )
            return batch["labels"].new_full(batch["labels"].shape[:1], list(self.teachers).index(self.default))
        return index

    def shares(self, batch: Mapping[str, Tensor]) -> list[TeacherShare]:
        """The teachers with rows in this batch, and those that other ranks may be waiting for."""
        index = self.member_indices(batch)
        numbers: list[int] = index.tolist()
        if wrong := set(numbers) - set(range(len(self.teachers))):
            raise ValueError(f"{TEACHER_INDEX} must be in [0, {len(self.teachers) - 1}], got {min(wrong)}")
        found = []
        for number, (name, teacher) in enumerate(self.teachers.items()):
            rows = [row for row, own in enumerate(numbers) if own == number]
            if rows or teacher.is_collective:
                tensor = torch.tensor(rows, dtype=torch.long, device=index.device)
                found.append(TeacherShare(teacher, tensor, name, name in self._readers_of_student))
        return [dataclasses.replace(found[0], rows=None)] if len(found) == 1 else found

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Refuse: the widths of the teachers differ.

        Raises:
            ValueError: always.
        """
        raise ValueError("the teachers of RoutedTeacher have LM heads of their own: ask for logits, or use `shares`")

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V] with the largest vocabulary; −inf for tokens that the teacher of a row does not have.

        Raises:
            ValueError: only the top k are known of one of them, or one has another tokenizer than the student.
        """
        if self._translated:
            raise ValueError("the teachers of RoutedTeacher have several tokenizers, and no logits in common")
        parts: list[tuple[Tensor | slice, Tensor]] = []
        for share in self.shares(batch):
            rows = slice(None) if share.rows is None else share.rows
            known = share.teacher.logits(share.rows_of(batch))
            if not isinstance(known, Tensor):
                raise ValueError(f"{type(share.teacher).__name__} gives the top k tokens only, and no full logits")
            parts.append((rows, known if share.rows is None else known[: len(share.rows)]))
        width = max(known.shape[-1] for _, known in parts)
        dtype = parts[0][1].dtype
        for _, known in parts:
            dtype = torch.promote_types(dtype, known.dtype)
        found = parts[0][1].new_full((*batch["labels"].shape, width), -torch.inf, dtype=dtype)
        for rows, known in parts:
            padded = known.new_full((*known.shape[:-1], width), -torch.inf, dtype=dtype)
            padded[..., : known.shape[-1]] = known
            found[rows] = padded
        return found
