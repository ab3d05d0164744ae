r"""Base classes of divergences of the student q from the teacher p, one value per token.

A custom divergence is a class with one method:

    class Hellinger(Divergence):
        is_f_divergence = True  # optional: the class can then be used with a top-k teacher

        def forward(self, log_p, log_q):
            return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping

from torch import Size, Tensor, nn

from kd_lightning.schedules import numbers

LONGEST_VALUE = 120  # characters of a value in an error message


class Divergence(nn.Module, ABC):
    """Divergence of the student q from the teacher p: at least 0, and 0 if and only if they agree.

    Examples:
        >>> import torch
        >>> from kd_lightning import Divergence
        >>> class Hellinger(Divergence):
        ...     def forward(self, log_p, log_q):
        ...         return 1 - ((log_p + log_q) / 2).exp().sum(-1)
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> Hellinger()(log_p, log_q)
        tensor(0.0341)
    """

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence in nats.

        Args:
            log_p: the teacher's log-probabilities, [..., V].
            log_q: the student's log-probabilities, [..., V].

        Returns:
            One value per token, [...].
        """

    @property
    def is_f_divergence(self) -> bool:
        r"""Whether this is \(\sum_v q_v f(p_v / q_v)\) with f convex and f(1) = 0.

        Only f-divergences can be computed from a teacher's top-k log-probabilities, where they are lower bounds. The
        default is False; a custom f-divergence sets `is_f_divergence = True` in its class.

        Examples:
            >>> from kd_lightning import AlphaBeta, ForwardKL
            >>> ForwardKL().is_f_divergence, AlphaBeta(0.2, 0.7).is_f_divergence
            (True, False)
        """
        return False

    def not_f_divergence(self) -> str | None:
        """Name of the first component that is not an f-divergence of teacher and student, for error messages.

        Returns:
            None if `is_f_divergence` holds.
        """
        return None if self.is_f_divergence else type(self).__name__

    def not_mergeable(self) -> str | None:
        r"""Name of the first component that changes if tokens with equal p / q are merged into one, for error messages.

        Such a merge is how teachers with another vocabulary are compared. It changes no f-divergence, also not between
        mixtures of p and q of degree 1, \(r_v \propto q_v\,h(p_v / q_v)\).

        Returns:
            None if the value stays the same; by default `not_f_divergence`.
        """
        return self.not_f_divergence()

    def components(self) -> dict[str, Divergence]:
        """Divergences that this one is made of, by name and without their weights.

        The training logs show their means as `component/NAME`. A component that has components of its own shows those
        too, as `component/NAME_INNER`.

        Returns:
            Empty by default.
        """
        return {}

    def weighted(self) -> dict[str, WeightedTokens]:
        """The divergences inside this one that weight their tokens, by dotted path ("" for itself); by default none."""
        return {}

    def token_scores(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What each entry of `weighted` computes its weights from, by the same path, [...]; NaN where unused."""
        return {}

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return numbers(self)


class Composite(Divergence):
    """A divergence made of other divergences; it also receives `rows`, extra inputs per token.

    Its components are the divergences registered as its attributes. Override `components` to name others.

    `columns`: entries of `rows` that it reads and the loss computes: "teacher_log_prob" and "student_log_prob", the
    label's log-probability under each model at the temperature of the divergence.

    Examples:
        >>> from kd_lightning import Composite, SymmetricKL
        >>> class Damped(Composite):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kl = SymmetricKL()
        ...     def forward(self, log_p, log_q, rows=None):
        ...         return self.kl(log_p, log_q).log1p()
        >>> Damped().components()
        {'kl': SymmetricKL(forward_weight=0.5)}
    """

    columns: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence in nats.

        Args:
            log_p: the teacher's log-probabilities, [..., V].
            log_q: the student's log-probabilities, [..., V].
            rows: extra inputs per token by name, each [...].

        Returns:
            One value per token, [...].
        """

    def components(self) -> dict[str, Divergence]:
        """Every `Divergence` registered as an attribute, under the attribute's name.

        Examples:
            >>> from kd_lightning import ForwardKL, TotalVariation, WeightedSum
            >>> WeightedSum([ForwardKL(), TotalVariation()], [0.9, 0.1]).components()
            {'forward_kl': ForwardKL(), 'total_variation': TotalVariation()}
        """
        return {name: part for name, part in self.named_children() if isinstance(part, Divergence)}

    def weighted(self) -> dict[str, WeightedTokens]:
        """Those of every divergence that is an attribute, or an entry of a list of modules that is one."""
        return {_join(name, path): x for name, part in _inner(self) for path, x in part.weighted().items()}

    def token_scores(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The scores of the same divergences, compared on the same two distributions."""
        scores = ((name, part.token_scores(log_p, log_q, rows)) for name, part in _inner(self))
        return {_join(name, path): x for name, found in scores for path, x in found.items()}


class WeightedTokens(Composite):
    """A divergence that weights its tokens, with a state that follows the weights of each optimizer step."""

    @property
    @abstractmethod
    def moves(self) -> bool:
        """Whether `update` changes the weights, so that values at two steps are not comparable."""

    @abstractmethod
    def weight_sums(self, scores: Tensor) -> Tensor:
        """Sums over tokens that can be added over batches and ranks: [3 + bins].

        Args:
            scores: from `token_scores`, [N]; NaN: not measured.

        Returns:
            The sum of the weights, the number of tokens with a weight above 0, the number of tokens, and what else
            `update` needs.
        """

    @abstractmethod
    def update(self, sums: Tensor) -> None:
        """Update after an optimizer step.

        Args:
            sums: `weight_sums` of all tokens of the step, on all ranks.
        """


def _inner(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Divergence]]:
    """Divergences that are attributes of a module, or entries of its lists and dicts of modules, with their paths."""
    for name, part in module.named_children():
        if isinstance(part, Divergence):
            yield prefix + name, part
        elif isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            yield from _inner(part, f"{prefix}{name}.")


def _join(name: str, path: str) -> str:
    """A dotted path; the path may be empty."""
    return f"{name}.{path}" if path else name


def evaluate(divergence: Divergence, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
    """Value of any divergence, [...]; only a `Composite` receives the rows."""
    values = divergence(log_p, log_q, rows) if isinstance(divergence, Composite) else divergence(log_p, log_q)
    return check_one_per_token(divergence, values, log_q.shape[:-1])


def check_one_per_token(part: nn.Module, values: Tensor, shape: Size) -> Tensor:
    """The values, checked to be one per token.

    Raises:
        ValueError: they are no tensor, or the shape differs, for example because `forward` does not sum over the
            vocabulary.
    """
    if not isinstance(values, Tensor):
        raise ValueError(
            f"{type(part).__name__} must return a tensor with one value per token, got {described(values)}"
        )
    if values.shape != shape:
        raise ValueError(
            f"{type(part).__name__} must return one value per token, shape {list(shape)}, got {list(values.shape)}: "
            "sum over the vocabulary in forward"
        )
    return values


def first_not_f_divergence(parts: Iterable[Divergence]) -> str | None:
    """Name of the first component that is not an f-divergence; None if all are."""
    return next((name for part in parts if (name := part.not_f_divergence()) is not None), None)


def first_not_mergeable(parts: Iterable[Divergence]) -> str | None:
    """Name of the first component that changes if tokens with equal p / q are merged; None if none does."""
    return next((name for part in parts if (name := part.not_mergeable()) is not None), None)


def check_divergence(name: str, divergence: object) -> Divergence:
    """The divergence.

    Raises:
        ValueError: with the argument's name and value: it is no `Divergence`, or not one that was made whole.
    """
    if not isinstance(divergence, Divergence):
        raise ValueError(f"{name} must be a Divergence, got {described(divergence)}")
    if "_parameters" not in vars(divergence):  # `nn.Module.__init__` makes it
        kind = type(divergence).__name__
        raise ValueError(f"{name}: {kind}.__init__ must call super().__init__() before anything else")
    return divergence


def described(value: object) -> str:
    """A value that is refused, on one line of bounded length: a class by its name, anything else by its repr."""
    if isinstance(value, type):
        return f"the class {value.__name__} (pass an instance of it, {value.__name__}(...))"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
