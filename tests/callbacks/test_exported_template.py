"""The student is exported with the chat template it was trained with, and `predict` and `generate` use that one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import runs
from kd_lightning.cli.program import main
from kd_lightning.data.prompt import parse_question
from kd_lightning.generation import local_model
from kd_lightning.models import generate as generation
from kd_lightning.models.generate import Sampling

TEMPLATE = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.mark.slow
def test_the_exported_template_is_that_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, data = tmp_path / "root", str(runs.little_data(tmp_path, rows=8))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    chosen = ["--data.chat_template", str(tmp_path / "chat.jinja")]
    files = ["--data.train", data, "--data.val", data, "--data.test", data]
    assert main([*runs.little(root, steps=1), *files, *chosen]) == 0
    tokenizer = AutoTokenizer.from_pretrained(root / "student")
    assert tokenizer.chat_template == TEMPLATE
    row = json.loads(Path(data).read_text().splitlines()[0])
    question = "\n".join(row[name] for name in ("instruction", "input") if row.get(name))
    expected = tokenizer(f"Q: {question}<eos>A: ").input_ids

    prompts: list[list[int]] = []
    original = generation.generate

    def watched(model: Any, input_ids: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        prompts.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        return original(model, input_ids, attention_mask, *args, **kwargs)

    monkeypatch.setattr(generation, "generate", watched)
    words = ["predict", "--config", "quickstart", "--trainer.default_root_dir", str(root), *runs.CPU, *runs.QUIET]
    assert main([*words, *files, *chosen, "--predictions.max_new_tokens", "2", "--ckpt_path", "last"]) == 0
    assert expected in prompts
    local = local_model.LocalModel(str(root / "student"), Sampling(2), 0, None, "auto", "cpu")
    assert local.text.prompt(parse_question(row, "row"))[1] == expected
