"""Checks of `preflight` that run the models: teacher, temperature, objective, and a few training steps."""

from __future__ import annotations

import copy
import math
import time

import torch
from torch import Tensor

from kd_lightning.cli.checks.preflight_checks import Check
from kd_lightning.cli.prepared_run import Findings, Level, PreparedFit
from kd_lightning.distributed.trainer import forward_context
from kd_lightning.engine.block_logits import SHARED_MASS
from kd_lightning.functional import entropy, forward_kl, log_softmax
from kd_lightning.losses import DistillationLoss
from kd_lightning.rollout.base import RolloutContext
from kd_lightning.training.evaluation import evaluated_batches
from kd_lightning.training.finite_check import OTHER_DTYPE, TEACHER
from kd_lightning.training.learning_rate.run_length import steps_of_run
from kd_lightning.training.student import StudentWithLoss

STEPS = 24  # at most, on one batch: Adam's first steps have the size of the learning rate and may raise a good loss
SAME = 1e-4  # nats of forward KL: one model, in two precisions
NEARLY_UNIFORM = 0.98  # entropy of the softened teacher, as a share of log V
# The objective's gradient at this student as a share of that at the geometric middle between it and the teacher. Of the
# shipped configs: 0.93 to 1.65 from a supervised student; from random weights 1.0 to 1.8 with forward KL, TAID, AMiD
# and 0.06 to 0.13 with the skewed, JSD, reverse KL, α and α-β, whose gradient needs mass where the teacher has it.
LITTLE_GRADIENT = 0.25
LITTLE_SHARED = 0.3  # of the teacher's probability: the divergence sees little more than one outcome


def check_finite_loss(fit: PreparedFit) -> Findings:
    """The loss of a batch is finite; otherwise, which of its terms is not."""
    batch = fit.batches[0]
    values = next(evaluated_batches(fit.trainer, fit.module, [batch], range(1)))
    if not torch.isfinite(values["loss"]).all():
        with forward_context(fit.trainer):
            terms = fit.module.non_finite_terms(batch, values)
        what = OTHER_DTYPE if terms.startswith(TEACHER) else "check the models' weights and these rows"
        yield "error", f"the loss of a batch is not finite: {terms}: {what}"


def check_vocabulary(fit: PreparedFit) -> Findings:
    """Neither model assigns probability to ids that the tokenizer does not have."""
    known = len(fit.datamodule.tokenizer)
    for role, log_p in (("student", fit.student_log_probs), ("teacher", fit.teacher_log_probs)):
        if log_p is None:
            continue
        mass = float(log_p[:, known:].exp().sum(-1).mean()) if log_p.shape[-1] > known else 0.0
        if mass > 0.01:
            text = f"the {role} assigns {mass:.1%} of its probability to ids from {known} on, which the tokenizer does "
            yield "error" if role == "teacher" else "warning", f"{text}not have: use the tokenizer that belongs to it"


def check_teacher(fit: PreparedFit) -> Findings:
    """The teacher is better on this data than the student, and than chance."""
    teacher = fit.module.teacher
    if teacher is None:
        return
    for name, means in fit.means_by_teacher.items():
        same_input = teacher.members[name].starts_as_student and not fit.datamodule.teacher_has_own_input
        yield from _compare_models(fit, f"teacher {name!r}: " if name else "", means, same_input)


def _compare_models(fit: PreparedFit, prefix: str, means: dict[str, float], same_input: bool) -> Findings:
    """Findings on a teacher with these means; `same_input`: it starts as the student and reads the same."""
    theirs, ours = means["teacher_nll"], means["student_nll"]
    level: Level = "error" if fit.trains_on_teacher else "warning"
    chance = math.log(len(fit.datamodule.tokenizer))
    if same_input:
        if fit.module.loss.ce_weight == 0 and means.get("forward_kl", math.inf) < SAME:
            yield (
                level,
                f"{prefix}it starts as the student and reads the same input, so the divergence and its gradient are "
                "zero: set data.teacher_prompt or data.teacher_chat_template, or model.ce_weight above 0",
            )
    elif theirs >= 0.9 * chance:
        yield (
            level,
            f"{prefix}its NLL on the held-out rows is {theirs:.2f}, about chance ({chance:.2f}): use a teacher that "
            "was trained on such data",
        )
    elif means.get("forward_kl", math.inf) < SAME:
        yield level, f"{prefix}student and teacher give the same probabilities: there is nothing to learn from it"
    elif theirs >= ours:
        yield level, f"{prefix}its NLL on the held-out rows is {theirs:.2f}, no better than the student's {ours:.2f}"


def check_temperature(fit: PreparedFit) -> Findings:
    """The softened teacher is not uniform."""
    if not fit.trains_on_teacher or fit.teacher_log_probs is None:
        return
    t = fit.model.loss.token_loss.temperature
    log_p = log_softmax(fit.teacher_log_probs / t)
    share = float(entropy(log_p).mean()) / math.log(log_p.shape[-1])
    if share > NEARLY_UNIFORM:
        yield (
            "error",
            f"at temperature {t:g} the teacher is nearly uniform (entropy {share:.1%} of the maximum): lower "
            "model.temperature",
        )


def check_objective(fit: PreparedFit) -> Findings:
    """The objective is zero where the models agree, and its gradient can move this student."""
    if not fit.trains_on_teacher or fit.teacher_log_probs is None:
        return
    pair, loss = (fit.teacher_log_probs, fit.student_log_probs), fit.model.loss
    width = min(log_p.shape[-1] for log_p in pair)
    p, q = (log_p[:, :width].unsqueeze(0) for log_p in pair)
    labels = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)  # every token has a label
    source = {"source": torch.zeros(1, dtype=torch.long, device=q.device)}
    alone = DistillationLoss(loss.objective, temperature=loss.token_loss.temperature, compile=False)

    def mean(student: Tensor, teacher: Tensor) -> Tensor:
        parts = alone.from_logits(student, teacher, labels, rows=source)
        return parts.loss / parts.divisor

    def gradient(student: Tensor) -> float:
        student = student.detach().clone().requires_grad_()
        torch.autograd.backward(mean(student, p))
        assert student.grad is not None
        return float(student.grad.norm())

    if float(forward_kl(p, q).mean()) < SAME:
        return  # a finding of `check_teacher`
    at_zero = float(mean(q, q))
    if abs(at_zero) > 1e-4:
        yield "error", f"it is {at_zero:.2g} where teacher and student agree, but a divergence must be 0 there"
    share = gradient(q) / max(gradient((p + q) / 2), 1e-30)
    if share < LITTLE_GRADIENT:
        yield (
            "warning",
            f"its gradient at this student is {share:.1%} of the gradient halfway to the teacher: it hardly moves a "
            "student without probability where the teacher has it; start from supervised fine-tuning",
        )


def check_steps(fit: PreparedFit) -> Findings:
    """A few steps on one batch stay finite and lower the loss; reports memory and time."""
    batch, model = fit.batches[0], copy.deepcopy(fit.model)
    begin = time.perf_counter()
    if fit.module.responses is not None:
        batch = fit.module.responses.in_process()(batch, RolloutContext(model, fit.module.teacher))
    generating = time.perf_counter() - begin
    optimizer = fit.module.optimizer_callable([p for p in model.parameters() if p.requires_grad])
    losses, norm, seconds = _train(fit, model, optimizer, batch)
    if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
        yield (
            "error",
            f"loss {losses[-1]:.4g}, gradient norm {norm:.4g} after {len(losses) - 1} steps: they must be finite; "
            "check the models' weights and lower model.optimizer.lr",
        )
        return
    if not losses[-1] < losses[0]:
        rate = optimizer.param_groups[0]["lr"]
        yield (
            "error",
            f"{STEPS} steps on one batch with learning rate {rate:g} change its loss from {losses[0]:.3f} to "
            f"{losses[-1]:.3f}: it must fall",
        )
    text = _memory(model, optimizer)
    if fit.module.responses is not None:
        text += f", {generating:.2f} s to generate a batch of responses"
        seconds += generating
    seconds *= fit.trainer.accumulate_grad_batches
    yield "note", f"memory and time: {text}, {seconds:.2f} s per step{_duration(fit, seconds)}"


def _train(
    fit: PreparedFit, model: StudentWithLoss, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> tuple[list[float], float, float]:
    """Up to `STEPS` steps on one batch, fewer once its loss has fallen.

    Returns:
        The loss before each step and after the last one, the last gradient norm, and the seconds of the last step.
    """
    teacher = None if fit.module.labels_only else fit.module.teacher
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses: list[float] = []
    norm, seconds = 0.0, 0.0
    for _ in range(STEPS + 1):
        begin = time.perf_counter()
        with forward_context(fit.trainer):
            parts = model(batch, teacher)
        loss = parts.loss / parts.divisor.clamp_min(1)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, fit.trainer.gradient_clip_val or math.inf))
        finite = math.isfinite(losses[-1]) and math.isfinite(norm)
        if not finite or (len(losses) > 4 and losses[-1] < losses[0]):
            break
        optimizer.step()
        seconds = time.perf_counter() - begin
    return losses, norm, seconds


def _memory(model: StudentWithLoss, optimizer: torch.optim.Optimizer) -> str:
    """Size of the student and of the optimizer's state."""
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    student, moments = (
        sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
        for tensors in (model.student.parameters(), state)
    )
    return f"student {student:.1f} MB, optimizer {moments:.1f} MB"


def _duration(fit: PreparedFit, seconds: float) -> str:
    """Time of the run's steps, and how many passes over the rows they are; empty if their number is not known."""
    steps = steps_of_run(fit.trainer, fit.datamodule)
    if not steps:
        return ""
    rows = fit.datamodule.report["train"]["rows"]
    batches = fit.datamodule.batches_per_pass(fit.trainer)
    if not batches or fit.datamodule.batch_tokens is None:
        batches = math.ceil(rows / fit.datamodule.batch_size / fit.trainer.world_size)
    passes = steps * fit.trainer.accumulate_grad_batches / batches
    return f", {steps} steps about {steps * seconds / 60:.1f} min: {passes:.3g} passes over {rows} rows"


def check_shared_tokens(fit: PreparedFit) -> Findings:
    """With two tokenizers, the probability that each model gives to the tokens of both."""
    if fit.module.teacher is None or not fit.datamodule.has_two_tokenizers:
        return
    teacher, student = (fit.means.get(name) for name in SHARED_MASS)
    if teacher is None or student is None:
        return  # one vocabulary, or only the top k of the teacher are known
    text = (
        f"the teacher gives {teacher:.0%} of its probability to tokens of both vocabularies, the student {student:.0%} "
        "(held-out rows, where the two are compared); all other tokens are compared as one"
    )
    yield "warning" if teacher < LITTLE_SHARED else "note", text


MODEL_CHECKS: dict[str, Check] = {
    "loss": check_finite_loss,
    "shared_tokens": check_shared_tokens,
    "vocabulary": check_vocabulary,
    "teacher": check_teacher,
    "temperature": check_temperature,
    "objective": check_objective,
    "step": check_steps,
}
