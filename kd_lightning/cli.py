"""The program `kd-lightning`: LightningCLI with defaults, and errors in one line."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

VERBS = {
    "fit": "Distil a student, measure it on the test rows, export it under --trainer.default_root_dir.",
    "validate": "Measure a student on the validation rows.",
    "test": "Measure a student on the test rows.",
    "predict": "Write a student's responses to the test rows.",
}


# Each is a file in `commands/` with `main(words) -> exit status or None`.
COMMANDS = {
    "generate": "let a model, or a server, respond to a file of prompts",
    "preflight": "find what would waste a run, before it",
    "compare": "put finished or running folders side by side",
    "cache": "write down once what the teacher says about the data",
    "plan": "what a run takes in memory on each of many ranks, without any",
}


def config_folder() -> Path:
    """Where the shipped configs lie: beside the modules in an installed package, one level up in the source tree."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def shipped_config(name: str) -> str:
    """The path of the shipped config called `name`; anything that is a path already comes back unchanged.

    Raises:
        ValueError: no file and no shipped config has this name.
    """
    if Path(name).is_file():
        return name
    folder = config_folder()
    path = folder / f"{name}.yaml"
    if path.is_file():
        return str(path)
    names = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
    raise ValueError(f"--config {name}: no such file, and the shipped configs are {', '.join(names)}")


def expand_configs(args: Sequence[str]) -> list[str]:
    """Replace the names after `--config` (and a file name after `--trainer`) by paths of shipped configs."""
    out: list[str] = []
    for word in args:
        flag, equals, value = word.partition("=")
        if equals and flag in ("--config", "-c"):
            word = f"{flag}={shipped_config(value)}"
        elif out and out[-1] in ("--config", "-c"):
            word = shipped_config(word)
        out.append(word)
    return out


def quiet() -> None:
    """Silence what a user can do nothing about; each line says why."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # calls that Lightning makes, not the user
    for pattern in (
        r".*does not have many workers.*",  # the bundled data is tokenised once and needs none
        r".*module\(s\) in eval mode at the start of training.*",  # dropout-free parts of Hugging Face models
        r".*Checkpoint directory .* exists and is not empty.*",  # a resume writes where it wrote
        r".*LightningCLI's args parameter is intended to run from within Python.*",  # names of configs are expanded
        r".*You have overridden `.*` in .* but have passed.*",
        r".*is smaller than the logging interval.*",  # short runs and tests
        r".*callbacks used to create the checkpoint need to be provided.*",  # those of `fit` do nothing in `test`
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: (
            not any(word in record.getMessage() for word in ("TPU available", "HPU available", "💡", "GPU available"))
        )
    )


def build_cli() -> type:
    """The LightningCLI subclass; built in a function so that importing this module stays cheap."""
    import lightning.pytorch as L
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger

    import kd_lightning.assistants
    import kd_lightning.divergences
    import kd_lightning.label_losses
    import kd_lightning.objectives
    import kd_lightning.regeneration
    import kd_lightning.rollout
    import kd_lightning.schedules
    import kd_lightning.strategies
    import kd_lightning.teachers  # noqa: F401 - imported so that class names can be written short in YAML
    from kd_lightning.baselines import Baselines
    from kd_lightning.callbacks import HFExport, Predictions, RunCheckpoint, RunConfig, is_dry
    from kd_lightning.dashboard import Dashboard
    from kd_lightning.generation_quality import GenerationQuality
    from kd_lightning.report import Report
    from kd_lightning.results import ResultsTable
    from kd_lightning.storage import WholeCheckpointIO

    class KDCLI(LightningCLI):
        """Defaults, groups of callbacks, and nothing else."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            """Add `checkpoint`, `export`, `results`, `generation` and `baseline`."""
            parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
            parser.add_lightning_class_args(HFExport, "export")
            parser.add_lightning_class_args(ResultsTable, "results")
            parser.add_lightning_class_args(GenerationQuality, "generation")
            text = "folder of another run, a supervised one say, drawn as a constant line beside this one"
            parser.add_argument("--baseline", type=str | None, default=None, help=text)

        def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
            super()._add_subcommands(parser, **kwargs)
            actions: Any = parser._subcommands_action
            for choice in actions._choices_actions:
                choice.help = VERBS[choice.dest]  # Lightning takes the first lines of Trainer's documentation

        def change_parsed(self, config: Any) -> None:
            """Nothing; for a command that takes the arguments of `fit` to another end."""

        def before_instantiate_classes(self) -> None:
            """Refuse what does not fit two models, and find the checkpoint that `last` means."""
            config = self.config[self.subcommand]
            self.change_parsed(config)
            strategy = config.trainer.strategy
            name = strategy if isinstance(strategy, str) else strategy.get("class_path", "")
            if name.split(".")[-1].lower() in ("fsdp", "fsdp_cpu_offload", "fsdpstrategy"):
                raise ValueError(
                    f"trainer.strategy {name} wraps one root and cannot hold a sharded teacher beside the student: "
                    "use fsdp2"
                )
            if config.get("ckpt_path"):
                root = config.trainer.default_root_dir or os.getcwd()
                config.ckpt_path = checkpoint_path(config.ckpt_path, root)

        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            """Put logger and checkpoint files under ROOT."""
            config = self.config_init[self.subcommand]["trainer"]
            root = config.default_root_dir or os.getcwd()
            if config.logger in (None, True):
                kwargs["logger"] = TensorBoardLogger(root, name="", version="tensorboard")
            kwargs["plugins"] = [*_as_list(config.plugins), WholeCheckpointIO()]
            kwargs["callbacks"] = [*_as_list(config.callbacks)]
            if self.subcommand == "fit":
                parser, parsed = self._parser(self.subcommand), self.config[self.subcommand].clone()
                parsed.ckpt_path = None
                text = parser.dump(parsed, skip_none=False)
                kwargs["callbacks"] += [RunConfig(text), Baselines(parsed.baseline), Dashboard(text), Report()]
            if self.subcommand == "predict":
                kwargs["callbacks"].append(Predictions())
            return super().instantiate_trainer(**kwargs)

        def _parse_ckpt_path(self) -> None:
            """Nothing: checkpoints hold no hyper-parameters, and what is typed at a resume is honoured."""

        def before_fit(self) -> None:
            """Refuse a taken or unwritable ROOT before anything is written into it."""
            export: HFExport = self._get(self.config_init, "export")
            export.resuming = bool(self.config["fit"].ckpt_path)
            if not is_dry(self.trainer):
                export.check(self.trainer.default_root_dir)

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    return KDCLI


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def checkpoint_path(name: str, root: str | Path) -> str:
    """The file that `--ckpt_path` means: a path, or `last` under ROOT.

    Raises:
        ValueError: there is none.
    """
    if name != "last":
        if not Path(name).exists():
            raise ValueError(f"--ckpt_path {name}: there is no such checkpoint (or write 'last' to go on from ROOT)")
        return name
    folder = Path(root) / "checkpoints"
    found = sorted(folder.glob("last*.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"--ckpt_path last: {folder} holds no last*.ckpt to go on from")
    return str(found[-1])


def parser_words() -> dict[str, Any]:
    """What `--help` says around the arguments, in place of a usage of ninety lines."""
    usage = "kd-lightning {} --config NAME_OR_FILE [--GROUP.ARGUMENT VALUE ...]"
    verbs = {verb: {"description": text, "usage": usage.format(verb)} for verb, text in VERBS.items()}
    about = "Distil a causal language model. `kd-lightning VERB --help` lists the arguments of a verb."
    about += " `--data.help` and `--data.help ContrastiveDataModule` list those of the data."
    beside = "Commands beside these verbs: " + "; ".join(f"{name}: {text}" for name, text in COMMANDS.items()) + "."
    return {"exit_on_error": False, "prog": "kd-lightning", "description": about, "epilog": beside, **verbs}


def run(args: Sequence[str], start: bool = True, change: Callable[[Any], None] | None = None) -> Any:
    """Parse one of the trainer's verbs and run it.

    Args:
        args: words of the command line.
        start: False: only build `model`, `datamodule` and `trainer`, for a command that takes every argument of `fit`.
        change: sees what was parsed, and may change it, before anything is built of it.

    Returns:
        The LightningCLI with these three.
    """
    from kd_lightning.data import InstructionDataModule
    from kd_lightning.module import DistillationModule

    quiet()
    program = build_cli()
    if not start:
        program = type("Prepared", (program,), {"_run_subcommand": lambda self, subcommand: None})
    if change is not None:
        program = type("Changed", (program,), {"change_parsed": lambda self, config: change(config)})
    return program(
        DistillationModule,
        InstructionDataModule,
        subclass_mode_data=True,  # `--data ContrastiveDataModule`; without a class it is this one
        save_config_callback=None,
        seed_everything_default=42,
        trainer_defaults={"use_distributed_sampler": False, "max_epochs": 1},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs=parser_words(),
        args=expand_configs(args),
    )


def main(args: Sequence[str] | None = None) -> int:
    """Entry point: 0 where all went well; 1 and one line on stderr where the user can mend something.

    Args:
        args: words of the command line; None: the process's own. `--debug` (or KD_LIGHTNING_DEBUG=1) shows tracebacks.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words or os.environ.get("KD_LIGHTNING_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    try:
        if words and words[0] in COMMANDS:
            return importlib.import_module(f"kd_lightning.commands.{words[0]}").main(words[1:]) or 0
        run(words)
    except Exception as error:
        if debug or not expected(error):
            raise
        print(f"kd-lightning: error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def explain(error: BaseException) -> str:
    """The error in one line; where a class name was misspelt, with the names there are."""
    text = " ".join(str(error).split())
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - ", "", text)
    text = re.sub(r" - Expected a <class 'NoneType'> Given value type: .*$", "", text)
    found = re.search(r'Parser key "([\w.]+)".*Expected a dot import path string: (\w+)$', text)
    if found is None or found[1].split(".")[-1] in ("optimizer", "lr_scheduler"):  # torch's own classes
        return text
    from lightning.pytorch import LightningDataModule

    from kd_lightning.assistants import Assistant
    from kd_lightning.divergences import Divergence
    from kd_lightning.label_losses import LabelLoss
    from kd_lightning.rollout import ResponseSource
    from kd_lightning.schedules import Schedule

    key, name = found.groups()
    last = key.split(".")[-1]
    bases: dict[str, type] = {"assistant": Assistant, "label_loss": LabelLoss, "responses": ResponseSource}
    bases["data"] = LightningDataModule
    base = bases.get(last, Divergence)
    if last.endswith(("weight", "alpha", "share")):
        base = Schedule
    ours = base is LightningDataModule  # Lightning has some of its own, for demonstrations
    below = [leaf for leaf in _leaves(base) if not ours or leaf.__module__.startswith("kd_lightning.")]
    leaves = sorted(leaf.__name__ for leaf in below if not leaf.__name__.startswith("_"))
    return f"{key}: there is no class {name}; the classes are {', '.join(leaves)} (or the dotted path of your own)"


def _leaves(base: type) -> set[type]:
    """Every class below `base` that can be built."""
    below: set[type] = set()
    child: type
    for child in type.__subclasses__(base):
        below |= {child, *_leaves(child)}
    return {leaf for leaf in below if not getattr(leaf, "__abstractmethods__", None)}


def expected(error: BaseException) -> bool:
    """Whether the error speaks of the user's input or machine rather than of a fault of ours."""
    import jsonargparse
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, (ValueError, OSError, MisconfigurationException, jsonargparse.ArgumentError))
