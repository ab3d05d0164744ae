"""Arguments of runs whose responses a model generates."""

from __future__ import annotations

import json
from pathlib import Path

import runs

ROWS = 48
SCHEDULE = ["--model.lr_scheduler.init_args.total_iters", "2000"]  # the same for runs of any length


def seqkd(root: Path, data: Path, *more: str, steps: int = 8) -> list[str]:
    words = [*runs.little(root, "seqkd", steps=steps), "--data.train", str(data), "--data.batch_size", "8"]
    words += SCHEDULE
    return [*words, "--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k=-1", *more]


def contrastive(root: Path, data: Path, *more: str, steps: int = 14) -> list[str]:
    """Two passes and a bit over 48 pairs, each with new words of the student."""
    config = root.parent / "contrastive.yaml"
    first = {"side": "teacher", "when": "once", "max_new_tokens": 8, "keep_unfinished": True}
    second = {"side": "student", "when": "every_pass", "max_new_tokens": 8, "keep_unfinished": True, "batch_size": 8}
    name = "kd_lightning.callbacks.regenerate.Regeneration"
    callbacks = [{"class_path": name, "init_args": arguments} for arguments in (first, second)]
    text = {
        "model": {"objective": {"class_path": "kd_lightning.objectives.Contrastive"}, "reduction": "sequence_mean"},
        "data": {"class_path": "ContrastiveDataModule", "init_args": {"train": str(data), "responses": "generate"}},
        "trainer": {"callbacks": callbacks},
    }
    config.write_text(json.dumps(text))
    words = runs.little(root, "quickstart", steps=steps)
    place = words.index("--config")
    del words[words.index("--data.batch_size") :][:2]
    words[place + 2 : place + 2] = ["--config", str(config)]
    words += [
        "--data.batch_size",
        "8",
        "--data.val",
        "asset:validation",
        "--trainer.limit_test_batches",
        "0",
        *SCHEDULE,
    ]
    return [*words, "--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k=-1", *more]
