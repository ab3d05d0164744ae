"""Acceptance and accepted length: slow loops, limits, and what transformers' assisted generation really accepts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import runs
from kd_lightning import DistillationModule, ForwardKL, InstructionDataModule, TotalVariation
from kd_lightning.cli.program import main
from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.data.tokenization import load_tokenizer
from kd_lightning.metrics.drafting import accepted_length
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.reporting.run_dir import RunFolder


def slowly(acceptance: Tensor, labels: Tensor, draft: int) -> list[float]:
    found, position = [], {}
    for number, (row, column) in enumerate((labels != IGNORE_INDEX).nonzero().tolist()):
        position[row, column] = number
    for row, column in position:
        total = 1.0
        for count in range(1, draft + 1):
            tokens = [(row, column + m) for m in range(count)]
            if any(token not in position for token in tokens):
                break
            total += math.prod(float(acceptance[position[token]]) for token in tokens)
        found.append(total)
    return found


@pytest.mark.parametrize("draft", [1, 2, 4, 9])
def test_the_accepted_length_is_that_of_a_slow_loop(draft: int) -> None:
    torch.manual_seed(draft)
    labels = torch.where(torch.rand(5, 12) < 0.7, torch.ones(5, 12, dtype=torch.long), IGNORE_INDEX)
    labels[2] = IGNORE_INDEX
    acceptance = torch.rand(int((labels != IGNORE_INDEX).sum()), dtype=torch.float64)
    found = accepted_length(acceptance, labels, draft)
    torch.testing.assert_close(found, torch.tensor(slowly(acceptance, labels, draft), dtype=torch.float64))
    parts = [accepted_length(a, rows, draft) for a, rows in zip(
        acceptance.split((labels != IGNORE_INDEX).sum(1).tolist()), labels.unsqueeze(1), strict=True
    )]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), found)


def test_limits() -> None:
    labels = torch.ones(2, 6, dtype=torch.long)
    assert accepted_length(torch.zeros(12), labels).tolist() == [1.0] * 12
    assert accepted_length(torch.ones(12), labels).tolist() == [5.0, 5.0, 5.0, 4.0, 3.0, 2.0] * 2
    with pytest.raises(ValueError, match="draft must be at least 1, got 0"):
        accepted_length(torch.ones(12), labels, 0)


def test_acceptance_is_one_minus_total_variation() -> None:
    torch.manual_seed(0)
    log_p, log_q = torch.randn(2, 40, 30, dtype=torch.float64).log_softmax(-1)
    expected = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
    torch.testing.assert_close(1 - TotalVariation()(log_p, log_q), expected)


def test_what_validation_logs(tmp_path: Path) -> None:
    data = str(runs.little_data(tmp_path, rows=12))
    words = [
        *runs.little(tmp_path / "run"),
        "--data.train",
        data,
        "--data.val",
        data,
        "--trainer.val_check_interval",
        "4",
    ]
    assert main(words) == 0
    run = RunFolder.read(tmp_path / "run")
    acceptance, variation = run.last("val/acceptance"), run.last("val/total_variation")
    assert acceptance == pytest.approx(1 - (variation or 0), abs=1e-6)
    assert 1 < (run.last("val/accepted_length") or 0) < 5


def test_the_logged_values_are_those_of_both_models(tmp_path: Path) -> None:
    module = DistillationModule("asset:student", teacher="asset:teacher", monitors={"tv": TotalVariation()})
    assert {"acceptance", "accepted_length"} <= set(module.measured)
    without = DistillationModule("asset:student", teacher="asset:teacher", monitors={"forward_kl": ForwardKL()})
    assert not {"acceptance", "accepted_length"} & set(without.measured)
    with pytest.raises(ValueError, match="acceptance"):
        DistillationModule("asset:student", teacher="asset:teacher", monitors={"acceptance": TotalVariation()})


class Verifications(BaseStreamer):
    """Numbers of tokens that each verification gave."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, value: Tensor) -> None:
        self.sizes.append(value.numel())

    def end(self) -> None:
        """Nothing is left over."""


def test_assisted_generation_accepts_what_is_predicted() -> None:
    """Given its prefix, a proposed token is accepted with probability Σ min(p, q): deviations cancel."""
    models: dict[str, Any] = {
        name: load_causal_lm(f"asset:{name}", kwargs={"dtype": "float32"}, role="model").eval()
        for name in ("teacher", "student")
    }
    for model in models.values():
        model.generation_config.eos_token_id = None
    draft = models["student"].generation_config
    draft.num_assistant_tokens, draft.num_assistant_tokens_schedule = 4, "constant"
    draft.assistant_confidence_threshold = 0.0
    prompts = load_tokenizer("asset:teacher")
    torch.manual_seed(3)
    deviation, variance, attempts = 0.0, 0.0, 0
    for word in ("dog", "to run", "oak", "a river", "music", "cold"):
        ids = prompts(f"Define the noun '{word}'.", return_tensors="pt").input_ids
        watch = Verifications()
        written = models["teacher"].generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=models["student"], do_sample=True, top_k=0,
            top_p=1.0, temperature=1.0, max_new_tokens=60, streamer=watch,
        )  # fmt: skip
        with torch.no_grad():
            p, q = (models[name](written).logits.softmax(-1)[0] for name in ("teacher", "student"))
        acceptance = torch.minimum(p, q).sum(-1).double()
        start = ids.shape[1] - 1  # the position whose distributions are of the next token
        for size in watch.sizes[1:]:  # the first is the prompt
            if start + 6 > written.shape[1]:
                break  # fewer than four are proposed
            known = acceptance[start : start + min(size, 4)]  # all before the last one were accepted
            deviation += size - 1 - float(known.sum())
            variance += float((known * (1 - known)).sum())
            attempts += len(known)
            start += size
    assert attempts > 200
    assert abs(deviation) < 4 * math.sqrt(variance), (deviation, variance, attempts)
    assert variance > 20


def test_it_is_not_logged_where_the_student_cannot_draft(tmp_path: Path) -> None:
    module = DistillationModule("asset:student_byte_fallback", teacher="asset:teacher")
    data = InstructionDataModule(
        str(runs.little_data(tmp_path, rows=8)), tokenizer="asset:student_byte_fallback", batch_size=4
    )
    data.use_teacher_tokenizer_of("asset:teacher")
    data.setup("fit")
    module.reporter.use_two_tokenizers()
    assert not {"acceptance", "accepted_length"} & set(module.measured)
