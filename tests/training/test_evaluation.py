"""Everything that evaluates the student computes in the precision of the run's validation."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

import runs
from kd_lightning.cli.prepared_run import PreparedFit
from kd_lightning.cli.program import run
from kd_lightning.training.evaluation import token_means
from tiny_fits import STILL, bundled, rows, split

BATCHES = split(rows(vocabulary=1000), 5, 4, 3)


class Baseline(L.Callback):
    """Means of the validation batches, measured before the first step, outside of Lightning's own steps."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.means = token_means(trainer, pl_module, BATCHES, len(BATCHES))
        self.alone = float(pl_module.evaluate_batch(BATCHES[0]).values["student_nll"].mean())


def measured(precision: str) -> tuple[dict[str, float], float, dict[str, float]]:
    """Means by the callback, those of the first batch alone, and by validation at step 0."""
    module, baseline = bundled(optimizer=STILL), Baseline()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_steps=1,
        precision=precision,  # type: ignore[arg-type]
        callbacks=[baseline],
    )
    loader = DataLoader(BATCHES, batch_size=None)
    trainer.fit(module, DataLoader(BATCHES[:1], batch_size=None), copy.deepcopy(loader))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.validate(module, DataLoader(BATCHES[:1], batch_size=None), verbose=False)
    return baseline.means, baseline.alone - float(trainer.callback_metrics["val/ce"]), logged


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_means_before_the_first_step_are_those_of_validation(precision: str) -> None:
    means, alone, logged = measured(precision)
    for name, key in (("student_nll", "ce"), ("teacher_nll", "teacher_nll"), ("forward_kl", "forward_kl")):
        assert means[name] == pytest.approx(logged[f"val/{key}"], rel=2e-6)  # fp64 sums against fp32 ones
    assert means["agreement"] == pytest.approx(logged["val/agreement"], abs=1e-6)
    assert abs(alone) < 1e-5


def test_the_precisions_differ() -> None:
    """The test above would see the wrong one."""
    mixed, full = measured("bf16-mixed")[0], measured("32-true")[0]
    assert max(abs(mixed[name] / full[name] - 1) for name in ("student_nll", "teacher_nll", "forward_kl")) > 1e-5


def test_preflight_evaluates_in_the_precision_of_the_run(tmp_path: Path) -> None:
    words = [*runs.little(tmp_path / "root"), "--data.train", str(runs.little_data(tmp_path)), "--trainer.precision"]
    means, logits = {}, {}
    for precision in ("bf16-mixed", "32-true"):
        fit = PreparedFit(run([*words, precision], start=False), "preflight")
        with fit.trainer.precision_plugin.forward_context():
            values = [fit.module.evaluate_batch(batch).values["student_nll"] for batch in fit.held_out]
        assert fit.means["student_nll"] == pytest.approx(float(torch.cat(values).double().mean()), rel=1e-9)
        means[precision], logits[precision] = fit.means["student_nll"], fit.student_log_probs
    assert means["bf16-mixed"] != means["32-true"]
    assert not torch.equal(*logits.values())
