"""Which responses a step is trained on: the role, and what a source is given to generate them."""

from __future__ import annotations

import copy
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.divergences import ForwardKL
from kd_lightning.engine.head import Head
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.engine.sequence_stats import Mean
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
from kd_lightning.rollout.batches import Batch, Translate, append, append_for_teacher, live_tokens, prompts
from kd_lightning.rollout.log_probs import LogProb, cut_head
from kd_lightning.rollout.served import Request, ServedWriter, Upcoming, as_tokens, numbered_prompts
from kd_lightning.rollout.teacher_mixture import unsharded_model
from kd_lightning.seeding import derive_seed
from kd_lightning.teachers.base import StudentModel, Teacher, generating_model
from kd_lightning.teachers.batches import teacher_batch


class ResponseSource(nn.Module, ABC):
    """Chooses the batch to train on, given a batch of the data.

    All randomness follows from (seed, step) of the context, and all state is tensors of the `state_dict`, the same on
    all ranks. There is one decision per step: its micro-batches, on all ranks, get responses of the same kind.

    Attributes:
        sampling: how the student generates; None: it does not.
        served: lets a server generate; None: the model in this process does.
        columns: names of the columns that it adds to the batch for the losses; None: not declared.

    Examples:
        >>> from kd_lightning import OnPolicy, ResponseSource
        >>> isinstance(OnPolicy(share=0.5), ResponseSource), OnPolicy(share=0.5).uses_data
        (True, True)
    """

    sampling: Sampling | None = None
    served: ServedWriter | None = None
    columns: tuple[str, ...] | None = None

    @property
    def uses_data(self) -> bool:
        """Whether some steps train on the responses of the data; by default not."""
        return False

    @property
    def replays(self) -> bool:
        """Whether responses are trained on again in later steps; by default not."""
        return False

    @abstractmethod
    def forward(self, batch: Batch, context: RolloutContext) -> Batch:
        """The batch to train on: that of the data, or another one, possibly with more columns.

        Args:
            batch: of the data.
            context: the models, the position in the run, and `respond`, which generates responses.
        """

    def check(self, student: nn.Module, teacher: Teacher | None, max_length: int | None) -> None:
        """Check the models before step 0; ValueError if this source cannot use one of them.

        Args:
            student: the model that will generate.
            teacher: None: there is none.
            max_length: longest row of the data in tokens; None: unknown.
        """
        model: Any = student  # a Hugging Face model, or one wrapped by PEFT
        if self.sampling is not None:
            self.sampling.check(model, max_length)
            if self.served is not None:
                self.served.check(model, teacher, self.sampling)

    def in_process(self) -> ResponseSource:
        """A copy whose responses are generated in this process."""
        twin = copy.deepcopy(self)
        twin.served = None
        return twin

    def validated(self, loss: float, step: int = 0) -> None:
        """Receive the result of a validation.

        Args:
            loss: cross entropy of the validation rows, over all ranks.
            step: number of optimizer steps done.
        """

    def waits(self, step: int) -> bool:
        """Whether it needs the result of the validation at this step and has not received it; by default False."""
        return False


@dataclass
class RolloutContext:
    """Models and position in the run at one micro-batch.

    Args:
        model: the student.
        teacher: None: there is none.
        seed: of the run.
        step: number of optimizer steps done.
        batch: number of micro-batches done.
        micro: number of micro-batches done in this step.
        accumulate: micro-batches per step.
        rank: this process among those that read different rows.
        ranks: number of those processes.
        max_length: longest row of the data in tokens; longer responses are truncated.
        translate: turns responses into the tokens of each row's teacher; None: student and teacher have one tokenizer.
        upcoming: the next batch of the data; None: there is none, or it is not read ahead.

    Attributes:
        notes: values to log, each as a sum and a count.
        seconds: time spent generating.
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
    translate: Translate | None = None
    upcoming: Upcoming | None = None
    notes: dict[str, Mean] = field(default_factory=dict)
    seconds: float = 0.0

    def number(self, *parts: int | str) -> int:
        """A pseudo-random number in [0, 2⁵⁶) that is a function of the seed and `parts`."""
        return derive_seed(self.seed, *parts)

    def coin(self, step: int | None = None) -> float:
        """A pseudo-random number in [0, 1): one per step (None: the present one), the same on all ranks."""
        return self.number("coin", self.step if step is None else step) / 2.0**56

    def order(self, count: int, *parts: int | str) -> Tensor:
        """A permutation of `count` elements that is a function of `parts`, the same on all ranks."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.number("order", *parts)))

    def note(self, name: str, values: Tensor) -> None:
        """Log the mean of these values; does not wait for the device."""
        count = torch.full((), float(values.numel()), device=values.device)
        self.notes[name] = Mean(values.sum(dtype=torch.float32), count)

    def respond(
        self, batch: Batch, sampling: Sampling, teacher_share: float = 0.0, served: ServedWriter | None = None
    ) -> Batch:
        """Responses of the student to the prompts of a batch: the tokens before the first label of each row.

        Args:
            batch: `input_ids`, `attention_mask`, `labels`; a row without labels gets no response.
            sampling: how responses are sampled.
            teacher_share: weight of the teacher in the distribution that is sampled from, in [0, 1]; 0 with `served`.
            served: lets a server generate; None: the model in this process does.

        Returns:
            A batch like those of the data, padded on the right, with a label for every token of the response including
            its end, and `source` "student".
        """
        began = time.perf_counter()
        student: Any = self.model.student
        labeled = next_token_mask(batch["labels"]).any(1)
        ids, mask = prompts(batch)
        if served is None:
            tokens = self.model.call(
                generate,
                student,
                ids,
                mask,
                self._with_room(sampling, batch),
                seed=self.number("write", self.batch, self.rank),
                processors=self._processors(batch, sampling, teacher_share),
                together=teacher_share > 0 and self.ranks > 1,
            )
            complete = torch.ones_like(tokens, dtype=torch.bool)
        else:
            responses, ages = served.take(self._requests(batch, self.step, sampling, served), self.step)
            tokens, complete = as_tokens(responses, labeled)
            self.note("staleness", torch.tensor(ages, dtype=torch.float32, device=tokens.device))
        ends = torch.tensor(require_eos_token_ids(student), device=tokens.device)
        live = live_tokens(tokens, ends, labeled) & complete
        generated = append(batch, (ids, mask), tokens, live, self.max_length)
        generated |= append_for_teacher(batch, generated, tokens, live, self.translate)
        labels = generated["labels"][labeled]
        lengths = labels.ne(IGNORE_INDEX).sum(1)
        finished = torch.isin(labels, ends).any(1)
        self.note("response_length", lengths)
        self.note("finished", finished)
        self.note("empty", finished & (lengths == 1))
        self.seconds += time.perf_counter() - began
        return generated

    def respond_ahead(self, sampling: Sampling, served: ServedWriter) -> None:
        """Let a server write the responses to the next batch of the data, if the bound on their age allows it."""
        following, began = self.upcoming, time.perf_counter()
        if following is not None and served.publish(self.step, following.step) and following.batch is not None:
            served.ask_ahead(self._requests(following.batch, following.step, sampling, served))
        self.seconds += time.perf_counter() - began

    def _requests(self, batch: Batch, step: int, sampling: Sampling, served: ServedWriter) -> list[Request]:
        """What a server is asked for a batch of a step; the randomness follows from (seed, row, step)."""
        sampling = self._with_room(sampling, batch, served.server.max_length)
        numbered = numbered_prompts(batch)
        return [Request(step, row, ids, sampling, self.number("write", row, step)) for row, ids in numbered]

    def _with_room(self, sampling: Sampling, batch: Batch, limit: int | None = None) -> Sampling:
        """The sampling, cut to what student, teacher, and a server with this limit can read after the prompts."""
        width, own_width = (prompts(dict(view))[0].shape[1] for view in (batch, teacher_batch(batch)))
        limits = [(limit, width), (max_positions(self.model.student), width)]  # type: ignore[arg-type]
        if (teacher := generating_model(self.teacher)) is not None:
            limits.append((max_positions(teacher), own_width))  # type: ignore[arg-type]
        room = min(most - read for most, read in [*limits, (sampling.max_new_tokens, 0)] if most is not None)
        return dataclasses.replace(sampling, max_new_tokens=max(1, room))

    def _processors(self, batch: Batch, sampling: Sampling, teacher_share: float) -> list[Any]:
        if self.translate is not None and teacher_share > 0:
            raise self._one_tokenizer("a mixture of student and teacher that is sampled from")
        if teacher_share > 0:
            teacher, prompt = unsharded_model(self.teacher), prompts(dict(teacher_batch(batch)))
            return [TeacherMixture(teacher, teacher_share, sampling.temperature or 1.0, *prompt)]
        if self.teacher is None or (self.translate is not None and self.teacher.column is None):
            return []  # a response is translated
        known = self.teacher.vocabulary
        return [RestrictVocabulary(known)] if known is not None and known < self.vocabulary else []

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the student has logits for."""
        return int(text_config(self.model.student).vocab_size)  # type: ignore[arg-type]

    def label_log_probs(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the labels under student and teacher, without dropout and gradient.

        Args:
            batch: with `labels`.
            temperature: of both models, > 0.

        Returns:
            The student's and the teacher's, [B, T], each at the position of its label, 0 at positions without a label.
        """
        if self.translate is not None:
            raise self._one_tokenizer("a reward from the teacher's log-probability of each token")
        began = time.perf_counter()
        loss = DistillationLoss(
            ForwardKL(), ce_weight=1.0, temperature=temperature, label_loss=LogProb(), compile=False
        )
        labeled = batch["labels"][:, 1:] != IGNORE_INDEX
        found, own = [], teacher_batch(batch)
        students = self.model.call(self._student_states, batch)
        for (hidden, head), view in ((students, batch), (self._teacher_states(own), own)):
            labels = view["labels"][:, 1:]  # the k-th label of a row is the same token on both sides
            if head is None:
                values = loss.from_logits(hidden, None, labels).values["ce"]
            else:
                values = loss.from_hidden(hidden, head, None, None, labels).values["ce"]
            full = values.new_zeros(batch["labels"].shape)
            full[:, 1:][labeled] = values
            found.append(full)
        self.seconds += time.perf_counter() - began
        return found[0], found[1]

    @staticmethod
    def _one_tokenizer(what: str) -> ValueError:
        return ValueError(
            f"{what} needs one tokenizer, and teacher and student have two: use another source of responses, such as "
            "OnPolicy, or a teacher with the student's tokenizer"
        )

    @torch.no_grad()
    def _student_states(self, batch: Batch) -> tuple[Tensor, Head | None]:
        """The student's hidden states and LM head (or its logits) in eval mode, cut to the teacher's vocabulary."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        student, head, training = self.model.student, self.model.head(), self.model.student.training
        teacher_head = None if self.teacher is None else self.teacher.head
        width = None if teacher_head is None else teacher_head.vocabulary
        student.eval()
        try:
            if head is None or self.model.body is None:
                return logits(student, **inputs, packed=self.model.packed)[:, :-1, :width], None
            return hidden_states(self.model.body, **inputs, packed=self.model.packed)[:, :-1], cut_head(head, width)
        finally:
            student.train(training)

    def _teacher_states(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Head | None]:
        if self.teacher is None:
            raise ValueError("the reward is the teacher's log-probability, and there is no teacher: pass one")
        width, head = self.vocabulary, self.teacher.head
        if head is not None:
            return self.teacher.hidden(batch)[:, :-1], cut_head(head, width)
        known = self.teacher.logits(batch)
        if not isinstance(known, Tensor):
            raise ValueError(
                f"the reward needs the teacher's full distribution, and {type(self.teacher).__name__} gives the top k "
                "only: use a teacher that is loaded"
            )
        return known[:, :-1, :width], None
