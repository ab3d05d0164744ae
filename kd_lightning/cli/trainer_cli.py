"""LightningCLI with this program's arguments, defaults and callbacks.

Importing this module takes seconds, as it imports Lightning and transformers: `program.run` imports it when needed.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

import kd_lightning.assistants
import kd_lightning.divergences
import kd_lightning.label_losses
import kd_lightning.objectives
import kd_lightning.rollout
import kd_lightning.schedules
import kd_lightning.strategies
import kd_lightning.teachers
import kd_lightning.token_weights  # noqa: F401 - imported so that configs can use short class names
from kd_lightning.callbacks.baselines import Baselines
from kd_lightning.callbacks.checkpoint import RunCheckpoint
from kd_lightning.callbacks.export import HFExport
from kd_lightning.callbacks.generation_eval import GenerationQuality
from kd_lightning.callbacks.predictions import Predictions
from kd_lightning.callbacks.progress import progress
from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.callbacks.report import Report
from kd_lightning.callbacks.results import ResultsTable
from kd_lightning.callbacks.run_config import RunConfig
from kd_lightning.callbacks.samples import Samples
from kd_lightning.callbacks.tensorboard import Dashboard, RunLogger
from kd_lightning.cli.checks.arguments import check_arguments, check_sections
from kd_lightning.cli.checks.changed_classes import changed_class_notices
from kd_lightning.cli.checks.help_text import help_opening
from kd_lightning.cli.command_parser import OTHER_COMMANDS, TRAINER_COMMANDS
from kd_lightning.cli.configs import (
    FILES_READ,
    checkpoint_path,
    expand_paths,
    fill_save_dir,
    hide_contents,
    read_config,
    register_config_loader,
)
from kd_lightning.cli.error_messages import explain, unknown_argument
from kd_lightning.data import InstructionDataModule
from kd_lightning.distributed.checkpoint_io import AtomicCheckpointIO
from kd_lightning.distributed.trainer import is_fast_dev_run
from kd_lightning.folder_lock import folder_lock, remove_leftovers
from kd_lightning.module import DistillationModule
from kd_lightning.reporting.redaction import masked_names, redact_yaml

T = TypeVar("T")
C = TypeVar("C", bound=Callback)


class MaskingParser(LightningArgumentParser):
    """A parser whose saved and printed configurations (`--print_config`) have secrets masked."""

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """The configuration as text."""
        return redact_yaml(super().dump(*args, **kwargs), read_config)


class FitParser(MaskingParser):
    """Lightning's parser, whose help opens with the arguments of most runs and lists those of the data."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text; that of the program as a whole lists the commands only."""
        text: str = super().format_help(*args, **kwargs)
        begin, found, rest = text.partition("\noptions:\n")
        if "--data.help" not in text and "--data " not in text:
            return text
        return f"{begin}\n{help_opening(InstructionDataModule)}{found}{rest}" if found else text


class TrainerCLI(LightningCLI):
    """Parses one of `fit`, `validate`, `test` and `predict`, builds its objects, and runs it.

    Args:
        args: arguments of the command line.
        start: False: build `model`, `datamodule` and `trainer`, and run nothing.
        change: is called with the parsed configuration of the command before objects are built from it.
    """

    model: DistillationModule
    datamodule: LightningDataModule
    trainer: Trainer
    subcommand: str

    def __init__(
        self, args: Sequence[str], *, start: bool = True, change: Callable[[Namespace], None] | None = None
    ) -> None:
        self._words, self._start, self._change = list(args), start, change
        self._lock = ExitStack()  # of the folder that is written to
        super().__init__(
            DistillationModule,
            InstructionDataModule,
            subclass_mode_data=True,  # `--data ContrastiveDataModule`; InstructionDataModule by default
            save_config_callback=None,  # `RunConfig` saves it
            seed_everything_default=42,
            trainer_defaults={"use_distributed_sampler": False, "max_epochs": 1, "enable_model_summary": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs=_parser_kwargs(),
            parser_class=FitParser,
            args=list(args),
        )

    # ------------------------------------------------------------------------------------------------------ arguments
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups `checkpoint` to `predictions`, and `baseline`."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(HFExport, "export")
        parser.add_lightning_class_args(ResultsTable, "results")
        parser.add_lightning_class_args(GenerationQuality, "generation")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(Predictions, "predictions")
        text = "folder of another run, for example a supervised one, to draw as a constant line in this run's charts"
        parser.add_argument("--baseline", type=str | None, default=None, help=text)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        actions: Any = parser._subcommands_action  # jsonargparse has no public way to list the subcommands
        for choice in actions._choices_actions:
            choice.help = TRAINER_COMMANDS[choice.dest]  # Lightning takes the first lines of Trainer's documentation

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse as Lightning does; the message on an unknown argument names the nearest known one.

        Raises:
            ValueError: an argument is unknown or invalid.
        """
        FILES_READ.clear()
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            text = hide_contents(str(error), self._words)
            raise ValueError(unknown_argument(explain(ValueError(text)), self._known_arguments())) from None

    def _known_arguments(self) -> list[str]:
        """Dotted names of the arguments of `fit`, those of the default data module included."""
        options = self._parser("fit")._option_string_actions  # argparse has no public list of a parser's options
        names = [option.lstrip("-") for option in options if not option.endswith(".help")]
        return [*names, *(f"data.{name}" for name in inspect.signature(InstructionDataModule).parameters)]

    def _parse_ckpt_path(self) -> None:
        """Skip Lightning's step: checkpoints hold no hyperparameters, and a resumed run uses the given arguments."""

    @property
    def parsed(self) -> Namespace:
        """The parsed configuration of the command."""
        found: Namespace = self.config[self.subcommand]
        return found

    @property
    def built(self) -> Namespace:
        """The configuration of the command with its objects built."""
        found: Namespace = self.config_init[self.subcommand]
        return found

    # -------------------------------------------------------------------------------------------------------- objects
    def before_instantiate_classes(self) -> None:
        """Check the arguments, apply `change`, expand paths, and resolve `--ckpt_path last`.

        Raises:
            ValueError: an argument is out of its range or a masked secret, the strategy cannot hold two models, or
                there is no such checkpoint.
        """
        config = self.parsed
        check_sections(config)
        if masked := next(masked_names(config.as_dict()), None):
            raise ValueError(
                f"{masked.replace('init_args.', '')} holds a secret that was masked when this configuration was saved: "
                "pass its value again, or remove it and set the environment variable of that service (such as HF_TOKEN)"
            )
        if self._change is not None:
            self._change(config)
        check_arguments(config, started=self._start)
        for line in changed_class_notices(self._words, config):
            rank_zero_info(line)
        fill_save_dir(config.trainer, self.root)
        expand_paths(config)
        strategy = config.trainer.strategy
        name = strategy if isinstance(strategy, str) else strategy.get("class_path", "")
        if name.split(".")[-1].lower() in ("fsdp", "fsdp_cpu_offload", "fsdpstrategy"):
            raise ValueError(
                f"trainer.strategy {name} is not supported: it wraps one model and cannot hold a sharded teacher next "
                "to the student: use fsdp2"
            )
        if config.ckpt_path:
            config.ckpt_path = checkpoint_path(config.ckpt_path, self.checkpoints, resume=self.subcommand == "fit")

    @property
    def root(self) -> str:
        """The run's folder."""
        return self.parsed.trainer.default_root_dir or os.getcwd()

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return Path(self.parsed.checkpoint.dirpath or Path(self.root) / "checkpoints")

    @property
    def locked_folders(self) -> list[Path]:
        """The folders that one run at a time may write to: ROOT, and that of the checkpoints if it is elsewhere."""
        root, checkpoints = Path(self.root).resolve(), self.checkpoints
        outside = "://" not in str(checkpoints) and not checkpoints.resolve().is_relative_to(root)
        return [root, checkpoints] if outside else [root]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, with the program's logger, checkpoint IO and callbacks."""
        config = self.built.trainer
        if config.logger in (None, True):
            kwargs["logger"] = RunLogger(self.root, name="", version="tensorboard")
        kwargs["plugins"] = [*_as_list(config.plugins), AtomicCheckpointIO()]
        kwargs["callbacks"] = self._callbacks(config)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ImportError) as error:
            raise ValueError(f"trainer: {error}") from error
        # `RunConfig` is the first to write: after the others have checked the run
        trainer.callbacks.sort(key=lambda one: isinstance(one, RunConfig))  # type: ignore[attr-defined]
        return trainer

    def _callbacks(self, config: Namespace) -> list[Callback]:
        """The user's callbacks and those of the program that have no group of arguments."""
        callbacks: list[Callback] = _as_list(config.callbacks)
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(progress())
        if self.subcommand == "fit":
            saved = self.parsed.clone()
            saved.ckpt_path = None
            text = self._parser("fit").dump(saved, skip_none=False)
            callbacks += [RunConfig(text), Baselines(saved.baseline), Dashboard(text), Report()]
        return callbacks

    def callbacks_of(self, kind: type[C]) -> list[C]:
        """The Trainer's callbacks of a class."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a helper of Lightning
        return [callback for callback in callbacks if isinstance(callback, kind)]

    # ------------------------------------------------------------------------------------------------------------ run
    def before_fit(self) -> None:
        """Refuse what callbacks cannot work with, and a ROOT that is taken or not writable, before anything is written.

        Raises:
            ValueError: it names what must change.
        """
        for regeneration in self.callbacks_of(Regeneration):
            regeneration.check(self.model)
        self.model.check_optimizer()
        if is_fast_dev_run(self.trainer):
            return
        export: HFExport = self.built.export
        resuming = bool(self.parsed.ckpt_path)
        export.check(self.trainer.default_root_dir, resuming)
        if self.trainer.is_global_zero:
            for folder in self.locked_folders:
                self._lock.enter_context(folder_lock(folder, rank_zero_info))
            root = Path(self.trainer.default_root_dir)
            remove_leftovers({root, root / "checkpoints", root / "responses", root / "served", self.checkpoints})
        if not resuming:
            for run_config in self.callbacks_of(RunConfig):
                run_config.find_earlier_files(self.trainer.default_root_dir)

    def _run_subcommand(self, subcommand: str) -> None:
        if self._start:
            with self._lock:
                super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


def _as_list(value: T | Sequence[T] | None) -> list[T]:
    """The plugins or callbacks of a configuration, which may be one, several or none, as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]  # type: ignore[list-item]


def _parser_kwargs() -> dict[str, Any]:
    """Arguments of the parsers: `--help` with a short usage line instead of one that lists every argument."""
    usage = "kd-lightning {} --config NAME_OR_FILE [--GROUP.ARGUMENT VALUE ...]"
    commands = {name: {"description": text, "usage": usage.format(name)} for name, text in TRAINER_COMMANDS.items()}
    description = "Distill a causal language model. `kd-lightning COMMAND --help` lists the arguments of a command."
    description += " `--data.help` and `--data.help ContrastiveDataModule` list those of the data."
    others = "; ".join(f"{name}: {text}" for name, text in OTHER_COMMANDS.items())
    return {
        "exit_on_error": False,
        "allow_abbrev": False,
        "prog": "kd-lightning",
        "parser_mode": register_config_loader(),
        "usage": f"kd-lightning {{{','.join([*TRAINER_COMMANDS, *OTHER_COMMANDS])}}} ...",
        "description": description,
        "epilog": f"Other commands: {others}.",
        **commands,
    }
