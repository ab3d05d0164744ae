"""Which responses a step is trained on: the role, and the student as an author of them."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.distributed.dtensor import is_sharded
from kd_lightning.divergences import ForwardKL
from kd_lightning.engine.head import Head
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.engine.sequence_stats import Mean
from kd_lightning.label_losses import LabelLoss
from kd_lightning.losses import DistillationLoss
from kd_lightning.models.backbone import hidden_states, logits
from kd_lightning.models.generate import (
    RestrictVocabulary,
    Sampling,
    TeacherMixture,
    generate,
    require_eos_token_ids,
)
from kd_lightning.models.hf_adapter import max_positions, text_config
from kd_lightning.rollout.batches import Batch, append, prompts
from kd_lightning.seeding import derive_seed
from kd_lightning.teachers.base import StudentModel, Teacher, generating_model


class ResponseSource(nn.Module, ABC):
    """What a step is trained on, given what the data would train it on.

    Randomness comes from the author's (seed, step) alone, and all state is tensors of the `state_dict`, the same on all
    ranks. One step is one decision: its micro-batches, on all ranks, get responses of one kind.
    """

    sampling: Sampling | None = None  # where it lets the student write

    @abstractmethod
    def forward(self, batch: Batch, author: RolloutContext) -> Batch:
        """The batch to train on: the data's own, or another one, possibly with more columns.

        Args:
            batch: of the data.
            author: what writes responses.
        """

    def check(self, student: Any, teacher: Teacher | None, max_length: int | None) -> None:
        """Refuse models that it cannot work with, before step 0.

        Args:
            student: the model that will write.
            teacher: beside it; None where there is none.
            max_length: longest row of the data, in tokens; None: not known.

        Raises:
            ValueError: it names what does not fit.
        """
        if self.sampling is not None:
            self.sampling.check(student, max_length)

    def validated(self, loss: float, step: int = 0) -> None:
        """Hear how the student does.

        Args:
            loss: cross entropy of the validation rows, over all ranks.
            step: optimizer steps done.
        """

    def waits(self, step: int) -> bool:
        """Whether it wants to hear how the student does after so many steps, and has not yet."""
        return False


@dataclass
class RolloutContext:
    """The student as a writer, at one micro-batch of a run.

    Args:
        model: student and loss.
        teacher: beside it; None where there is none.
        seed: of the run.
        step: optimizer steps done.
        batch: micro-batches done.
        micro: micro-batches of this step done.
        accumulate: micro-batches a step has.
        rank: this process among those that read different rows.
        ranks: how many those are.
        max_length: longest row of the data, in tokens; what a response has beyond it is cut off.

    Attributes:
        notes: per name the sum and the number of what was noted, to be logged as their quotient.
        seconds: spent writing.
    """

    model: StudentModel
    teacher: Teacher | None = None
    seed: int = 0
    step: int = 0
    batch: int = 0
    micro: int = 0
    accumulate: int = 1
    rank: int = 0
    ranks: int = 1
    max_length: int | None = None
    notes: dict[str, Mean] = field(default_factory=dict)
    seconds: float = 0.0

    def number(self, *what: Any) -> int:
        """A number in [0, 2⁵⁶) that follows from the seed and `what`."""
        return derive_seed(self.seed, *what)

    def coin(self) -> float:
        """A number in [0, 1): one per step, the same on all ranks and for all micro-batches of the step."""
        return self.number("coin", self.step) / 2.0**56

    def order(self, count: int, *what: Any) -> Tensor:
        """A permutation of `count` things, the same on all ranks."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.number("order", *what)))

    def note(self, name: str, values: Tensor) -> None:
        """Remember values whose mean is to be logged; without waiting for the device."""
        count = torch.full((), float(values.numel()), device=values.device)
        self.notes[name] = Mean(values.sum(dtype=torch.float32), count)

    def respond(self, batch: Batch, sampling: Sampling, teacher_share: float = 0.0) -> Batch:
        """The student's own responses to the batch's prompts, which are all that stands before the first counted label.

        Args:
            batch: `input_ids`, `attention_mask`, `labels`; a row without a counted label gets no response.
            sampling: how.
            teacher_share: weight of the teacher in the distribution that is sampled from, in [0, 1].

        Returns:
            A batch like those of the data, padded on the right: a label for every token of the response, its end
            included, and `source` "student".
        """
        began = time.perf_counter()
        student: Any = self.model.student
        counted = next_token_mask(batch["labels"]).any(1)
        ids, mask = prompts(batch)
        room = (max_positions(student) or ids.shape[1] + sampling.max_new_tokens) - ids.shape[1]
        tokens = self.model.call(
            generate,
            student,
            ids,
            mask,
            dataclasses.replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, room))),
            seed=self.number("write", self.batch, self.rank),
            processors=self._processors(mask, sampling, teacher_share),
            together=teacher_share > 0 and self.ranks > 1,
        )
        ends = torch.tensor(require_eos_token_ids(student), device=tokens.device)
        written = append(batch, (ids, mask), tokens, ends, counted, self.max_length)
        labels = written["labels"][counted]
        lengths = labels.ne(IGNORE_INDEX).sum(1)
        finished = torch.isin(labels, ends).any(1)
        self.note("response_length", lengths)
        self.note("finished", finished)
        self.note("empty", finished & (lengths == 1))
        self.seconds += time.perf_counter() - began
        return written

    def _processors(self, mask: Tensor, sampling: Sampling, teacher_share: float) -> list[Any]:
        if teacher_share > 0:
            return [TeacherMixture(whole_model(self.teacher), teacher_share, sampling.temperature or 1.0, mask)]
        head = None if self.teacher is None else self.teacher.head
        return [RestrictVocabulary(head.vocabulary)] if head is not None and head.vocabulary < self.vocabulary else []

    @property
    def vocabulary(self) -> int:
        """How many tokens the student has a logit for."""
        student: Any = self.model.student
        return int(text_config(student).vocab_size)

    def label_log_probs(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the counted labels under student and teacher, without dropout and gradient.

        Args:
            batch: with `labels`.
            temperature: of both models, > 0.

        Returns:
            The student's and the teacher's, [B, T], each at its label's place, 0 where no label is counted.
        """
        began = time.perf_counter()
        read = DistillationLoss(
            ForwardKL(), ce_weight=1.0, temperature=temperature, label_loss=_LogProb(), compile=False
        )
        labels = batch["labels"][:, 1:]
        counted = labels != IGNORE_INDEX
        found = []
        for hidden, head in (self.model.call(self._student_states, batch), self._teacher_states(batch)):
            if head is None:
                values = read.from_logits(hidden, None, labels).values["ce"]
            else:
                values = read.from_hidden(hidden, head, None, None, labels).values["ce"]
            full = values.new_zeros(batch["labels"].shape)
            full[:, 1:][counted] = values
            found.append(full)
        self.seconds += time.perf_counter() - began
        return found[0], found[1]

    @torch.no_grad()
    def _student_states(self, batch: Batch) -> tuple[Tensor, Head | None]:
        """The student's hidden states and head (or its logits), in eval mode, its vocabulary cut to the common one."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        student, head, training = self.model.student, self.model.head(), self.model.student.training
        teacher_head = None if self.teacher is None else self.teacher.head
        width = None if teacher_head is None else teacher_head.vocabulary
        student.eval()
        try:
            if head is None or self.model.body is None:
                return logits(student, **inputs)[:, :-1, :width], None
            return hidden_states(self.model.body, **inputs)[:, :-1], _cut(head, width)
        finally:
            student.train(training)

    def _teacher_states(self, batch: Batch) -> tuple[Tensor, Head | None]:
        if self.teacher is None:
            raise ValueError("the reward is the teacher's log-probability, and there is no teacher")
        width, head = self.vocabulary, self.teacher.head
        if head is not None:
            return self.teacher.hidden(batch)[:, :-1], _cut(head, width)
        told = self.teacher.logits(batch)
        if not isinstance(told, Tensor):
            raise ValueError("the reward needs the teacher's whole distribution, and this teacher gives its top only")
        return told[:, :-1, :width], None


def whole_model(teacher: Teacher | None) -> Any:
    """The teacher's model, where one can write with it.

    Raises:
        ValueError: there is none in this process.
    """
    model = generating_model(teacher)
    if model is None:
        kind = "no teacher" if teacher is None else type(teacher).__name__
        raise ValueError(f"teacher_share must be 0 unless the teacher can generate: it must be a model, got {kind}")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        # generation keeps running the sharded student on ranks that are done, but not the teacher
        raise ValueError("teacher_share must be 0 if the strategy shards the teacher (fsdp2): use ddp")
    return model


def _cut(head: Head, vocabulary: int | None) -> Head:
    if vocabulary is None or head.vocabulary <= vocabulary or head.group is not None:
        return head  # of a head that is spread over ranks the padding stays: next to no mass
    bias = None if head.bias is None else head.bias[:vocabulary]
    return dataclasses.replace(head, weight=head.weight[:vocabulary], bias=bias)


@final
class _LogProb(LabelLoss):
    """The label's log-probability itself, at the loss's temperature."""

    temperature = None

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        return log_q_label
