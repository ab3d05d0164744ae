"""The model card of an exported student, `ROOT/student/README.md`."""

from __future__ import annotations

import re

import yaml

import kd_lightning
from kd_lightning.reporting.markdown import code_block, code_span, markdown_table
from kd_lightning.reporting.run_dir import RunFolder, results_table

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SHOWN: tuple[str, ...] = ("model.", "data.", "trainer.max_steps", "trainer.max_epochs", "trainer.precision")
SHOWN += ("trainer.strategy", "trainer.devices", "trainer.accumulate_grad_batches", "trainer.gradient_clip_val")
SHOWN += ("seed_everything",)


def model_card(run: RunFolder) -> str:
    """The text of the card: models, loss, figures on the test rows, digests of the data, and arguments.

    Args:
        run: the run's folder; secrets in its arguments are masked already.
    """
    student, teacher = (_name(run, role) for role in ("student", "teacher"))
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "kd-lightning"],
        **({"base_model": student} if HUB_NAME.fullmatch(student) else {}),
    }
    loss = {"objective": run.config.get("model.objective.class_path") or run.config.get("model.objective")}
    loss |= {name: run.config.get(f"model.{name}") for name in ("ce_weight", "temperature", "reduction")}
    rows = [["student before training", code_span(student)], ["teacher", code_span(teacher)]]
    rows += [[name.replace("_", " "), code_span(value)] for name, value in loss.items() if value is not None]
    out = [f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---", f"# {code_span(run.root.name)}"]
    out += ["A causal language model, distilled with `kd_lightning` " + kd_lightning.__version__ + "."]
    out += [markdown_table(["", ""], rows)]
    if run.results is not None:
        out += ["## Test rows", results_table(run.results)]
        out += [
            "NLL and forward KL in nats per token; exact match: the share of greedy responses that equal the answer."
        ]
    if run.rows:
        digests = [[split, code_span(line)] for split, line in run.rows.items()]
        out += ["## Data", "Each line changes if the rows change.", markdown_table(["split", "rows"], digests)]
    shown = {name: value for name, value in run.config.items() if value is not None and name.startswith(SHOWN)}
    cells = [[code_span(name), code_span(value)] for name, value in shown.items()]
    out += ["## Arguments", code_block("kd-lightning fit --config config.yaml", "sh")]
    out += ["with, in `config.yaml`:", markdown_table(["argument", "value"], cells)]
    return "\n\n".join(out) + "\n"


def _name(run: RunFolder, role: str) -> str:
    """A model as the configuration names it: a folder, hub or `asset:` name, or the class of a teacher."""
    value = run.config.get(f"model.{role}")
    value = run.config.get(f"model.{role}.class_path") if value is None else value
    return "none" if value is None else str(value).rpartition(".")[2] if str(value).startswith("kd_") else str(value)
