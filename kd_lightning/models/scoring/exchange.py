"""One prompt, one request: asks a server for its log-probabilities and checks which model has answered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kd_lightning.models.openai_client import OpenAIClient, ServerError
from kd_lightning.models.scoring.dialects import DIALECTS, Dialect, NamedTokens, WrongAnswerError

T = TypeVar("T")


@dataclass(frozen=True)
class PromptRequest:
    """What a server is asked.

    Args:
        model: name of the served model.
        names: names that the server may answer with.
        top_k: number of tokens asked for at each position.
        ids: token ids of the prompt, at least two.
        what: the prompt in error messages, such as `row 3`.
        dialect: name of the form of the request.
    """

    model: str
    names: Collection[str]
    top_k: int
    ids: Sequence[int]
    what: str
    dialect: str

    @property
    def form(self) -> Dialect:
        """The form of the request."""
        return next(dialect for dialect in DIALECTS if dialect.name == self.dialect)

    def named_tokens(self, client: OpenAIClient, id_of: Callable[[str], int]) -> NamedTokens:
        """The tokens that the server names.

        Args:
            client: of the server.
            id_of: the id of a token that is named by text.

        Raises:
            RequestRefusedError: the server has refused the request.
            ServerError: it does not answer, or with other tokens or another model than was asked for.
        """

        def parse(answer: Any) -> NamedTokens:
            self._check_model(answer, client)
            return self.form.parse(answer, self.ids, id_of)

        return self.ask(client, parse)

    def ask(self, client: OpenAIClient, parse: Callable[[Any], T]) -> T:
        """What is taken from the decoded answer.

        Raises:
            ServerError: as `named_tokens`.
        """
        try:
            return client.request(self.form.path, self.form.body(self.model, self.ids, self.top_k), parse, self.what)
        except WrongAnswerError as error:
            raise self.wrong(client, error) from None

    def wrong(self, client: OpenAIClient, error: WrongAnswerError) -> ServerError:
        """The error of an answer that would be as wrong again."""
        return ServerError(f"server {client.url} (model {self.model}), {self.what}: it {error}")

    def _check_model(self, answer: Any, client: OpenAIClient) -> None:
        """Refuse the answer of a model that was not asked for; not every server names its model."""
        name = answer.get("model")
        if isinstance(name, str) and name not in (self.names or {self.model}):
            raise WrongAnswerError(
                f"answers with model {client.key.one_line(name)}, where {self.model} was asked for: serve that "
                "model, or pass the other name as the teacher's model"
            )
