"""MiniLLM's rollouts: sampled from a mixture with the teacher, with the inputs of its policy gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kd_lightning.constants import IGNORE_INDEX, TEACHER_FIELDS
from kd_lightning.engine.validation import check_count, check_temperature
from kd_lightning.models.generate import Sampling
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.batches import Batch, gather_rows
from kd_lightning.rollout.replay import ReplayBuffer
from kd_lightning.rollout.teacher_mixture import unsharded_model
from kd_lightning.schedules import Weight, check_flag, check_number, check_weight, value
from kd_lightning.teachers.base import Teacher


class MiniLLM(ResponseSource):
    r"""Rollouts of student and teacher together, with the columns that `ClippedPolicyGradient` reads.

    Tokens are sampled from \(\tilde p = a\,p + (1-a)\,q\). The columns are "old_log_prob" (log q of the token when
    sampled), "importance" \(w_t = q / \tilde p\), and "advantage": with rewards \(r_t = \log p_t - \log q_t\) the mean
    reward of the tokens that follow, \(\frac{1}{T-t}\sum_{t'=t+1}^{T} r_{t'}\). The method is this source with
    `objective=ReverseKL()` (the single-step term, with its exact expectation), `label_loss=ClippedPolicyGradient()` and
    `ce_weight=0.5`. Reduces to on-policy responses with a = 0.

    Rollouts are generated in `rollout_steps` steps, and each is trained on when it is generated. All of them are then
    trained on again in random order, `inner_epochs` − 1 times, before new ones are generated; batches of the data are
    skipped meanwhile. All ranks keep the rollouts of all ranks.

    Args:
        teacher_share: a in [0, 1), or a schedule.
        rollout_steps: number of steps whose rollouts are kept together, at least 1.
        inner_epochs: number of times each rollout is trained on, at least 1.
        length_norm: whether a return is divided by the number of tokens it sums over.
        discount: factor of a reward per token between, in [0, 1].
        include_current: whether a return starts with the token's own reward (as in the authors' code), although the
            single-step term accounts for it.
        whiten: "no"; "counted": the advantages of the labeled tokens of a micro-batch get mean 0 and variance 1;
            "padded": the same over positions that include the padding of shorter responses with 0 (the authors' code).
        reward_scale: rewards are divided by it (the authors' code: 0.5), > 0.
        reward_clip: bound of the absolute reward after that (the authors' code: 100), > 0; None: none.
        max_new_tokens: longest response, at least 1.
        temperature: of sampling and of rewards, in [0.001, 1000]; the loss's `temperature` should be the same.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Gu et al., arXiv 2306.08543.

    Examples:
        >>> import torch
        >>> from kd_lightning import MiniLLM
        >>> rewards = torch.tensor([[1.0, 2.0, 4.0]])
        >>> MiniLLM().advantages(rewards, labeled=torch.ones(1, 3, dtype=torch.bool))  # mean reward of what follows
        tensor([[3., 4., 0.]])
    """

    sampling: Sampling
    columns = ("advantage", "old_log_prob", "importance")

    def __init__(
        self,
        teacher_share: Weight = 0.2,
        rollout_steps: int = 1,
        inner_epochs: int = 4,
        length_norm: bool = True,
        discount: float = 1.0,
        include_current: bool = False,
        whiten: Literal["no", "counted", "padded"] = "no",
        reward_scale: float = 1.0,
        reward_clip: float | None = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_weight("teacher_share", teacher_share, "[)", per_row=False)
        for name, number in (("rollout_steps", rollout_steps), ("inner_epochs", inner_epochs)):
            check_count(name, number)
        for name, flag in (("length_norm", length_norm), ("include_current", include_current)):
            check_flag(name, flag)
        check_number("discount", discount, 0, 1)
        check_number("reward_scale", reward_scale, 0, ends="(]")
        if reward_clip is not None:
            check_number("reward_clip", reward_clip, 0, ends="(]")
        check_temperature("temperature", temperature)
        if not isinstance(whiten, str) or whiten not in ("no", "counted", "padded"):
            raise ValueError(f"whiten must be 'no', 'counted' or 'padded', got {whiten!r}")
        self.teacher_share = teacher_share
        self.rollout_steps, self.inner_epochs = rollout_steps, inner_epochs
        self.length_norm, self.discount, self.include_current = length_norm, discount, include_current
        self.whiten = whiten
        self.reward_scale, self.reward_clip = reward_scale, reward_clip
        self.sampling = Sampling(max_new_tokens, temperature)
        self.memory = ReplayBuffer(None)

    @property
    def replays(self) -> bool:
        """Whether rollouts are trained on more than once."""
        return self.inner_epochs > 1

    def check(self, student: nn.Module, teacher: Teacher | None, max_length: int | None) -> None:
        """Check the models before step 0."""
        super().check(student, teacher, max_length)
        if self.teacher_share != 0:
            unsharded_model(teacher)

    def forward(self, batch: Batch, context: RolloutContext) -> Batch:
        """New rollouts, or stored ones."""
        epoch, turn = divmod(context.step % (self.rollout_steps * self.inner_epochs), self.rollout_steps)
        if epoch == 0:
            if turn == 0 and context.micro == 0:
                self.memory.clear()
            batch = self.write(batch, context)
            if self.inner_epochs > 1:
                self.memory.push(gather_rows(batch, context.ranks))
            return batch
        if self.memory.filled == 0:  # no row had a prompt to respond to
            names = [name for name in ("labels", TEACHER_FIELDS["labels"]) if name in batch]
            empty = {name: torch.full_like(batch[name], IGNORE_INDEX) for name in names}
            return {**batch, **empty, **self._columns(batch)}
        order = context.order(self.memory.filled, context.step - turn)
        size = len(batch["labels"])
        first = (turn * context.accumulate + context.micro) * size * context.ranks
        return self.memory.rows(order[(first + context.rank + context.ranks * torch.arange(size)) % len(order)])

    def write(self, batch: Batch, context: RolloutContext) -> Batch:
        """Rollouts with their columns."""
        share = float(value(self.teacher_share))
        batch = context.respond(batch, self.sampling, share)
        log_q, log_p = context.label_log_probs(batch, self.sampling.temperature)
        labeled = batch["labels"] != IGNORE_INDEX
        labeled[:, 0] = False
        rewards, importance = self.rewards(log_q, log_p) * labeled, self.importance(log_q, log_p, share)
        context.note("reward", rewards[labeled])
        context.note("importance", importance[labeled])
        columns = {"advantage": self.advantages(rewards, labeled), "old_log_prob": log_q, "importance": importance}
        return {**batch, **columns}

    def rewards(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        r"""\(\log p - \log q\) of each token, scaled and clipped."""
        rewards = (log_p - log_q) / self.reward_scale
        return rewards if self.reward_clip is None else rewards.clamp(-self.reward_clip, self.reward_clip)

    @staticmethod
    def importance(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
        r"""\(q / (a p + (1-a) q)\) of each token."""
        return 1 / (share * (log_p - log_q).exp() + (1 - share))

    def advantages(self, rewards: Tensor, labeled: Tensor) -> Tensor:
        """Returns of each token.

        Args:
            rewards: [B, T], 0 without a label.
            labeled: label mask [B, T]; the labeled tokens of a row are adjacent.

        Returns:
            [B, T], 0 without a label.
        """
        position = torch.arange(rewards.shape[1], device=rewards.device)
        ahead = position - position.unsqueeze(1) - (0 if self.include_current else 1)  # row t: the distance to each t'
        decay = torch.where(ahead >= 0, self.discount ** ahead.clamp_min(0).to(rewards), 0)
        returns = rewards @ decay.T
        if self.length_norm:
            returns = returns / (labeled.to(rewards) @ (ahead >= 0).to(rewards).T).clamp_min(1)
        returns = returns * labeled
        if self.whiten == "no":
            return returns
        numbers = labeled.sum() if self.whiten == "counted" else labeled.sum(1).max() * len(labeled)
        mean = returns.sum() / numbers.clamp_min(1)
        spread = (returns * returns).sum() - numbers * mean * mean
        return (returns - mean) / (spread / (numbers - 1).clamp_min(1) + 1e-8).sqrt() * labeled

    @staticmethod
    def _columns(batch: Batch) -> Batch:
        zeros = torch.zeros(batch["labels"].shape, device=batch["labels"].device)
        return {name: zeros for name in ("advantage", "old_log_prob", "importance")}
