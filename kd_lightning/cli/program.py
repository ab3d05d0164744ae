"""The program `kd-lightning`: LightningCLI with defaults, and errors in one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kd_lightning.cli.configs import checkpoint_path, expand_configs, register_config_loader
from kd_lightning.cli.error_messages import did_you_mean, expected, explain, unknown_argument
from kd_lightning.console import silence_known_warnings, use_plain_progress_bars

VERBS = {
    "fit": "Distil a student, measure it on the test rows, export it under --trainer.default_root_dir.",
    "validate": "Measure a student on the validation rows.",
    "test": "Measure a student on the test rows.",
    "predict": "Write a student's responses to the test rows.",
}


# Each is a module of `kd_lightning.cli` with `main(words) -> exit status or None`.
COMMANDS = {
    "generate": "let a model, or a server, respond to a file of prompts",
    "preflight": "find what would waste a run, before it",
    "compare": "put finished or running folders side by side",
    "cache": "write down once what the teacher says about the data",
    "plan": "what a run takes in memory on each of many ranks, without any",
}


def build_cli() -> type:
    """The LightningCLI subclass; built in a function so that importing this module stays cheap."""
    import lightning.pytorch as L
    from jsonargparse import ArgumentError
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger

    import kd_lightning.assistants
    import kd_lightning.divergences
    import kd_lightning.label_losses
    import kd_lightning.objectives
    import kd_lightning.rollout
    import kd_lightning.schedules
    import kd_lightning.strategies
    import kd_lightning.teachers  # noqa: F401 - imported so that class names can be written short in YAML
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
    from kd_lightning.callbacks.tensorboard import Dashboard
    from kd_lightning.distributed.checkpoint_io import AtomicCheckpointIO
    from kd_lightning.distributed.trainer import is_fast_dev_run

    class KDCLI(LightningCLI):
        """Defaults, groups of callbacks, and nothing else."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            """Add the groups `checkpoint` to `predictions`, and `baseline`."""
            parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
            parser.add_lightning_class_args(HFExport, "export")
            parser.add_lightning_class_args(ResultsTable, "results")
            parser.add_lightning_class_args(GenerationQuality, "generation")
            parser.add_lightning_class_args(Samples, "samples")
            parser.add_lightning_class_args(Predictions, "predictions")
            text = "folder of another run, a supervised one say, drawn as a constant line beside this one"
            parser.add_argument("--baseline", type=str | None, default=None, help=text)

        def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
            super()._add_subcommands(parser, **kwargs)
            actions: Any = parser._subcommands_action
            for choice in actions._choices_actions:
                choice.help = VERBS[choice.dest]  # Lightning takes the first lines of Trainer's documentation

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            """What Lightning does; an unknown argument is answered with the nearest known one."""
            try:
                super().parse_arguments(parser, args)
            except ArgumentError as error:
                raise ValueError(unknown_argument(explain(error), self._parser("fit"))) from None

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
            kwargs["plugins"] = [*_as_list(config.plugins), AtomicCheckpointIO()]
            kwargs["callbacks"] = [*_as_list(config.callbacks)]
            if config.enable_progress_bar is not False and not any(
                isinstance(c, ProgressBar) for c in kwargs["callbacks"]
            ):
                kwargs["callbacks"].append(progress())
            if self.subcommand == "fit":
                parser, parsed = self._parser(self.subcommand), self.config[self.subcommand].clone()
                parsed.ckpt_path = None
                text = parser.dump(parsed, skip_none=False)
                kwargs["callbacks"] += [RunConfig(text), Baselines(parsed.baseline), Dashboard(text), Report()]
            return super().instantiate_trainer(**kwargs)

        def _parse_ckpt_path(self) -> None:
            """Nothing: checkpoints hold no hyper-parameters, and what is typed at a resume is honoured."""

        def before_fit(self) -> None:
            """Refuse a taken or unwritable ROOT, and a cache of words to come, before anything is written into it."""
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Regeneration):
                    callback.check(self.model)
            export: HFExport = self._get(self.config_init, "export")
            export.resuming = bool(self.config["fit"].ckpt_path)
            if not is_fast_dev_run(self.trainer):
                export.check(self.trainer.default_root_dir)
                for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                    if isinstance(callback, RunConfig) and not export.resuming:
                        callback.look(self.trainer.default_root_dir)

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    return KDCLI


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def parser_words() -> dict[str, Any]:
    """What `--help` says around the arguments, in place of a usage of ninety lines."""
    usage = "kd-lightning {} --config NAME_OR_FILE [--GROUP.ARGUMENT VALUE ...]"
    verbs = {verb: {"description": text, "usage": usage.format(verb)} for verb, text in VERBS.items()}
    about = "Distil a causal language model. `kd-lightning VERB --help` lists the arguments of a verb."
    about += " `--data.help` and `--data.help ContrastiveDataModule` list those of the data."
    beside = "Commands beside these verbs: " + "; ".join(f"{name}: {text}" for name, text in COMMANDS.items()) + "."
    words = {"exit_on_error": False, "allow_abbrev": False, "prog": "kd-lightning"}
    words["parser_mode"] = register_config_loader()
    every = f"kd-lightning {{{','.join([*VERBS, *COMMANDS])}}} ..."
    return {**words, "usage": every, "description": about, "epilog": beside, **verbs}


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

    silence_known_warnings()
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
        trainer_defaults={"use_distributed_sampler": False, "max_epochs": 1, "enable_model_summary": False},
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
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a class of one's own beside the config; last, so that it hides nothing
    use_plain_progress_bars()
    debug = "--debug" in words or os.environ.get("KD_LIGHTNING_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    try:
        if words and words[0] in COMMANDS:
            return importlib.import_module(f"kd_lightning.cli.{words[0]}").main(words[1:]) or 0
        names = [*VERBS, *COMMANDS]
        if not words:
            raise ValueError(f"a verb must be given: {', '.join(names)} (`kd-lightning --help` says what they do)")
        if not words[0].startswith("-") and words[0] not in VERBS:
            raise ValueError(f"there is no verb {words[0]}{did_you_mean(words[0], names)}: they are {', '.join(names)}")
        run(words)
    except Exception as error:
        if debug or not expected(error):
            raise
        print(f"kd-lightning: error: {explain(error)}", file=sys.stderr)
        return 1
    return 0
