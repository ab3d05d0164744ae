r"""The loss of every token of a block and its gradient, from the products of both models.

A block is some tokens of a chunk: the student's products \(a = h W^\top + b\) and the teacher's. The LM head turns them
into logits \(x = \mathrm{cap}(\mathrm{scale} \cdot a)\). The objective is a function of
\(\log q = \log\mathrm{softmax}(x / T)\) and \(\log p\); with its gradient \(u = \partial \ell / \partial \log q\)

.. math:: \frac{\partial \ell}{\partial x} = \frac1T \Big(u - q \sum_v u_v\Big) .

The label loss is a function of one number per token, \(\log q_y\), with derivative g; it adds \(g\,(e_y - q) / T\).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kd_lightning.divergences import CHUNK_LOG_Q, Divergence, check_one_per_token, evaluate
from kd_lightning.engine.block_logits import (
    SHARED_MASS,
    BlockLogits,
    BlockPair,
    label_columns_of,
    with_label_log_probs,
)
from kd_lightning.engine.compile import BREAK_EVEN, Compiled
from kd_lightning.engine.head import Transform
from kd_lightning.functional import FLOOR, reverse_kl
from kd_lightning.label_losses import LabelLoss
from kd_lightning.schedules import Weight, value
from kd_lightning.token_weights import OF_TOKEN

# Entries (tokens × vocabulary) of one block on a CPU, so that its temporaries stay in the cache. A compiled block has
# at least 32 tokens: with fewer, inductor parallelizes inside a token, and its threads fork and join once per token and
# pass. A small vocabulary is little work between two joins: V 4099 takes 9.5 ns per entry in blocks of 32 tokens, 7.2
# of 64, 5.4 of 128 (JSD 12.7, 9.9, 8.1), but at 128 the temporaries become noticeable next to two chunks of 512 tokens.
EAGER_ENTRIES = 200_000
COMPILED_ROWS, MOST_ROWS, COMPILED_ENTRIES = 32, 64, 270_000
GPU_ENTRIES = 64_000_000


class TokenLoss(nn.Module):
    r"""\(\ell = (1 - c)\,T^2 D(p, q) + c\,L(\log q_y)\) per token, and its gradient.

    Args:
        objective: D, any `Divergence`.
        label_loss: L, evaluated at its own temperature.
        ce_weight: c, in [0, 1].
        temperature: T > 0.
        square_temperature: whether D is multiplied by T².
        monitors: divergences evaluated in addition to the loss, at temperature 1, without gradient.
        diagnostics: whether to report "student_nll", "teacher_nll" and "agreement", at temperature 1, and with two
            vocabularies `SHARED_MASS`.
        compile: True or False to force; None: chosen by the size of the first call with a gradient.
    """

    compile_chosen: Tensor

    def __init__(
        self,
        objective: Divergence,
        label_loss: LabelLoss,
        ce_weight: Weight,
        temperature: float,
        square_temperature: bool,
        monitors: Mapping[str, Divergence],
        diagnostics: bool,
        compile: bool | None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.label_loss = label_loss
        self.ce_weight = ce_weight
        self.temperature = temperature
        self.factor = temperature**2 if square_temperature else 1.0
        self.monitors = nn.ModuleDict(monitors)
        self.diagnostics = diagnostics
        self._reads = label_columns_of((objective,)), label_columns_of(monitors.values())
        self._chunk_monitors = {name for name, x in monitors.items() if CHUNK_LOG_Q in label_columns_of((x,))}
        if self._chunk_monitors and temperature != 1:  # its likelihoods are computed at the loss's temperature
            raise ValueError(f"a monitor with ChunkLikelihood needs temperature 1, got {temperature}")
        self.compiled = Compiled(self.block, compile)
        # 1, 0, or −1 before the choice: a resumed run keeps the choice of the interrupted one.
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written to later
            self.register_buffer("compile_chosen", torch.tensor(-1, dtype=torch.int8))

    def names(self, teacher: bool) -> tuple[str, ...]:
        """Names of the values, with or without a teacher."""
        names: tuple[str, ...] = ("loss", "kd", "ce", *self.monitors) if teacher else ("loss", "ce")
        if self.diagnostics:
            names += ("student_nll", "teacher_nll", "agreement") if teacher else ("student_nll",)
        return names

    def outputs(self, teacher: bool, shares: bool = False) -> tuple[str, ...]:
        """Names of all that a block computes: the values, the scores of the tokens' weights, and the shared masses.

        Args:
            teacher: whether there is a teacher.
            shares: whether the probability of the tokens that both models have is measured.
        """
        names = self.names(teacher) + (SHARED_MASS if shares else ())
        return names + (tuple(map(score_name, self.objective.weighted())) if teacher else ())

    @property
    def temperatures(self) -> tuple[float, float]:
        """Those at which the models are compared: in the objective, and in monitors and diagnostics."""
        return self.temperature, 1.0

    @property
    def reads_chunks(self) -> bool:
        """Whether the objective or a monitor contains `ChunkLikelihood`."""
        return any(CHUNK_LOG_Q in reads for reads in self._reads)

    def run_blocks_with(self, runner: Compiled) -> None:
        """Replace what computes the blocks, for example by one that computes a block of each size once."""
        self.compiled = runner

    @property
    def is_compiled(self) -> bool:
        """Whether blocks are compiled, so that all must have the same number of tokens."""
        return bool(self.compiled.chosen)

    def choose_compilation(self, tokens: int, vocabulary: int) -> None:
        """Choose once whether blocks are compiled; call it before the first pass with a gradient.

        Without a choice blocks run eagerly, so that evaluation alone never starts a compiler.

        Args:
            tokens: tokens of the pass.
            vocabulary: V.
        """
        if self.compiled.chosen is None:
            restored = int(self.compile_chosen)
            compiled = tokens * vocabulary >= BREAK_EVEN if restored < 0 else restored == 1
            self.compiled.choose(compiled)
            self.compile_chosen.fill_(compiled)

    def block_size(self, tokens: int, vocabulary: int, device: torch.device) -> int:
        """Tokens of one block in a pass over so many tokens."""
        if device.type != "cpu":
            size = max(1, GPU_ENTRIES // vocabulary)
            if self.is_compiled:  # powers of two: a handful of graphs for any number of tokens
                size = _round_up(min(1 << (tokens - 1).bit_length(), size), COMPILED_ROWS)
            return size
        if self.is_compiled:
            size = max(vocabulary // 2400, min(COMPILED_ENTRIES // vocabulary, MOST_ROWS), 1)
            return _round_up(size, COMPILED_ROWS)
        return max(8, EAGER_ENTRIES // vocabulary)

    def forward(
        self,
        z: Tensor,
        y: Tensor | None,
        transforms: tuple[Transform, Transform],
        vectors: Mapping[str, Tensor],
        block_size: int,
        gradient: bool,
        values: Mapping[str, Tensor],
        others: Tensor | None = None,
    ) -> None:
        """Write the values of n tokens; z becomes the gradient of their weighted sum with respect to z.

        Args:
            z: the student's products, [m, V] with m ≥ n; if compiled, m is a multiple of `block_size`.
            y: the teacher's products, like z; None: no teacher.
            transforms: scale and soft-cap of the student's LM head and of the teacher's.
            vectors: "labels" [n], inside the vocabulary, "weights" [n], and extra inputs of the objective [n].
            block_size: tokens of one block.
            gradient: whether the gradient is computed; otherwise z is not changed.
            values: written: [n] for each of `names`.
            others: columns of tokens that the teacher has not, ids; None: it has all.
        """
        labels = vectors["labels"].unsqueeze(1)
        n = len(labels)
        rows = {name: column for name, column in vectors.items() if name != "labels"}
        # The label's entry is gathered before the blocks and its gradient added after them: no gather in a block.
        rows["student_label"] = z[:n].gather(1, labels).squeeze(1)
        if y is not None:
            rows["teacher_label"] = y[:n].gather(1, labels).squeeze(1)
        out = dict(values, label_gradient=torch.empty_like(rows["student_label"]))
        for a in range(0, n, block_size):
            b = a + block_size if self.is_compiled else min(a + block_size, n)
            block = {name: pad(column[a:b], (0, b - a - len(column[a:b]))) for name, column in rows.items()}
            results = self.compiled(z[a:b], None if y is None else y[a:b], transforms, block, gradient, others)
            for name, result in results.items():  # into one buffer: small tensors between large ones fragment the heap
                out[name][a:b] = result[: n - a]
        if gradient:
            z[:n].scatter_add_(1, labels, out["label_gradient"].unsqueeze(1))

    def block(
        self,
        z: Tensor,
        y: Tensor | None,
        transforms: tuple[Transform, Transform],
        rows: dict[str, Tensor],
        gradient: bool,
        others: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Values of one block by name, [tokens]; z is overwritten by its gradient. Compiled as one graph."""
        columns = dict(rows)
        weights = columns.pop("weights")
        student = BlockLogits(z, columns.pop("student_label"), transforms[0])
        pair = None if y is None else BlockPair(student, y, transforms[1], columns, others)
        ce_weight = value(self.ce_weight, columns)
        label_t = self.label_loss.temperature or self.temperature

        values: dict[str, Tensor] = {}
        label_rows = self._label_rows(columns, pair, label_t)
        values["ce"], g = _differentiate(
            lambda log_q: check_one_per_token(
                self.label_loss, self.label_loss(log_q.clamp_min(FLOOR), label_rows), log_q.shape
            ),
            (student.label_log_prob(label_t),),
            weights * ce_weight if gradient else None,
        )
        u: tuple[Tensor, ...] = ()
        if pair is None:
            values["loss"] = values["ce"]
        else:
            kd_weights = weights * (1 - ce_weight) if gradient and not _is_number(ce_weight, 1) else None
            compared, u = self._compare(pair, columns, kd_weights)
            values |= compared
            values["loss"] = _mix(values["kd"], values["ce"], ce_weight)
        if self.diagnostics:
            values["student_nll"] = -student.label_log_prob(1.0).clamp_min(FLOOR)
            values |= {} if pair is None else pair.diagnostics()
        if g:
            slope_z, slope_label = student.slopes()
            values["label_gradient"] = g[0] / label_t * slope_label
            if len(u) > 1:
                values["label_gradient"] = values["label_gradient"] + u[1] / self.temperature * slope_label
            model = student if pair is None else pair.compared
            z.copy_(model.gradient(u, self.temperature, g[0], label_t) * slope_z)
        return values

    def _compare(
        self, pair: BlockPair, columns: dict[str, Tensor], weights: Tensor | None
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Values of the objective, its token weights and the monitors, and the gradient of the objective.

        Returns:
            The values by name, and the gradients with respect to log q and, if the objective reads chunks, to log q of
            the label; empty without weights.
        """
        t, chunks = self.temperature, CHUNK_LOG_Q in self._reads[0]
        log_p, log_q = pair.log_probs(t)
        rows = with_label_log_probs(columns, self._reads[0], pair, t)

        def objective(log_q: Tensor, *label: Tensor) -> Tensor:
            read = {**rows, CHUNK_LOG_Q: label[0]} if label else rows
            return self.factor * evaluate(self.objective, log_p, log_q, read)

        inputs = (log_q, pair.student.label_log_prob(t)) if chunks else (log_q,)
        kd, u = _differentiate(objective, inputs, weights)
        values = {"kd": kd if chunks else pair.where_paired(kd)}
        for path, score in self.objective.token_scores(log_p, log_q, rows).items():
            values[score_name(path)] = pair.where_paired(score, torch.nan)
        log_p, log_q = pair.log_probs(1.0)
        rows = with_label_log_probs(columns, self._reads[1], pair, 1.0)
        if self._chunk_monitors:
            rows[CHUNK_LOG_Q] = pair.student.label_log_prob(1.0)
        for name, monitor in self.monitors.items():
            found = evaluate(monitor, log_p, log_q, rows)  # type: ignore[arg-type]
            values[name] = found if name in self._chunk_monitors else pair.where_paired(found)
        return values, (pair.where_paired(u[0]), *u[1:]) if u else ()

    def _label_rows(self, columns: dict[str, Tensor], pair: BlockPair | None, t: float) -> dict[str, Tensor]:
        """What the label loss reads: the extra inputs, and what it declares to read of the teacher."""
        if pair is None:
            return columns
        reads = self.label_loss.columns
        found = with_label_log_probs(columns, reads, pair, t)
        found |= {name: found[OF_TOKEN + name] for name in reads if OF_TOKEN + name in found}
        if "reverse_kl" in reads and "reverse_kl" not in columns:
            found["reverse_kl"] = reverse_kl(*pair.log_probs(t))
        return found


def score_name(path: str) -> str:
    """Name among the values of a block of what the weights at this path of the objective are computed from."""
    return f"score {path}"


def _differentiate(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], weights: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values of a function, one per token, and the gradients of their weighted sum (none without weights)."""
    if weights is None:
        return function(*inputs), ()
    if torch.compiler.is_compiling():
        values, pull = torch.func.vjp(function, *inputs)[:2]
        return values, pull(weights)
    with torch.enable_grad():
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        values = function(*inputs)
    if not values.requires_grad:  # it does not depend on them
        return values, tuple(torch.zeros_like(x) for x in inputs)
    gradients = torch.autograd.grad(values, inputs, weights, allow_unused=True, materialize_grads=True)
    return values.detach(), gradients


def _is_number(weight: float | Tensor, number: float) -> bool:
    return not isinstance(weight, Tensor) and weight == number


def _mix(kd: Tensor, ce: Tensor, ce_weight: float | Tensor) -> Tensor:
    """(1 − c)·KD + c·CE; a term with weight 0 is left out, even if it is not finite."""
    if _is_number(ce_weight, 0):
        return kd
    return ce if _is_number(ce_weight, 1) else (1 - ce_weight) * kd + ce_weight * ce


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
