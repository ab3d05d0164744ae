"""Cut a student out of a larger model: `kd-lightning prune --model M --layers 6 --output DIR`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jsonargparse
from torch import Tensor
from transformers import PreTrainedModel

from kd_lightning.callbacks.export import save_student
from kd_lightning.data import InstructionDataModule
from kd_lightning.data.tokenization import load_tokenizer
from kd_lightning.models.hf_adapter import number_of_layers
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.models.pruning.cut import cut_layers
from kd_lightning.models.pruning.layers import block_influence, evenly_spaced, most_influential
from kd_lightning.models.pruning.width import cut_mlp, neuron_activity
from kd_lightning.models.quantized.layers import is_quantized
from kd_lightning.paths import expand_path
from kd_lightning.reporting.redaction import print_message


def main(args: Sequence[str]) -> None:
    """Run `prune` with the arguments of the command line.

    Args:
        args: arguments after the command.

    Raises:
        ValueError: see `prune`.
    """
    parser = jsonargparse.ArgumentParser(
        prog="kd-lightning prune",
        description="Cut a smaller model out of a larger one, to be a student that starts with the teacher's weights.",
        usage="kd-lightning prune --model M --layers N --output DIR [--ARGUMENT VALUE ...]",
        exit_on_error=False,
    )
    parser.add_function_arguments(prune)
    prune(**parser.parse_args(list(args)).as_dict())


def prune(
    model: str,
    output: str,
    layers: int | str | None = None,
    data: str | None = None,
    mlp_width: int | None = None,
    rows: int = 128,
    max_length: int = 512,
    batch_size: int = 8,
    dtype: str = "auto",
) -> None:
    """Write a model with some of the layers of another one, with its configuration, tokenizer and chat template.

    All layers and the whole width: the same weights, bit for bit. Before anything is written, the cut model is compared
    with the original whose other layers are skipped.

    Args:
        model: folder, hub name or `asset:` name.
        output: the folder to write; it must not exist.
        layers: a number N, or a list of indices from 0 such as `0,1,5,11`. N layers are evenly spaced, the first and
            the last among them (1: the first); with `data`, those with the largest influence. None: all layers.
        data: anything that `InstructionDataModule` reads: layers and neurons are chosen by what they do on these rows.
        mlp_width: neurons of each MLP that are kept, the most active ones on `data`; None: all.
        rows: rows of `data` that are read, at least 1.
        max_length: longest row in tokens.
        batch_size: rows per batch.
        dtype: of the written weights, such as float32; auto: as saved.

    Raises:
        ValueError: an argument is out of its range; the model cannot be read or cannot be cut; `output` exists.
    """
    folder = Path(expand_path(output))
    if folder.exists():
        raise ValueError(f"--output {output} exists: choose another name, or remove it first")
    if layers is None and mlp_width is None:
        raise ValueError("prune: pass --layers, --mlp_width, or both")
    if mlp_width is not None and data is None:
        raise ValueError("mlp_width needs --data: the neurons that are most active on these rows are kept")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    listed = _listed(layers)
    whole = load_causal_lm(model, kwargs={"dtype": dtype}, role="model")
    if is_quantized(whole):
        raise ValueError(f"prune: {model} is quantized: prune the model that it was made of, and quantize the result")
    tokenizer = load_tokenizer(model)
    batches = [] if data is None else list(_batches(data, model, rows, max_length, batch_size))
    count = number_of_layers(whole)
    kept = list(range(count)) if layers is None else listed or _chosen(whole, int(layers), batches)
    cut = cut_layers(whole, kept)
    if mlp_width is not None:
        cut = cut_mlp(cut, neuron_activity(cut, batches), mlp_width)
    save_student(cut, tokenizer, folder)
    sizes = [sum(x.numel() for x in part.parameters()) / 1e6 for part in (whole, cut)]
    _log(
        f"{output}: layers {', '.join(map(str, kept))} of {count}; {sizes[1]:.1f} of {sizes[0]:.1f} million parameters"
    )


def _listed(layers: int | str | None) -> list[int]:
    """The indices of a list of layers; empty for a number."""
    if layers is None or isinstance(layers, int):
        return []
    try:
        return [int(word) for word in layers.split(",")]
    except ValueError:
        raise ValueError(f"layers must be a number or a list of indices such as 0,1,5,11, got {layers!r}") from None


def _chosen(model: PreTrainedModel, kept: int, batches: list[dict[str, Tensor]]) -> list[int]:
    """Indices of the layers to keep: the most influential on the data, or evenly spaced ones."""
    even = evenly_spaced(number_of_layers(model), kept)
    if not batches:
        return even
    influence = block_influence(model, batches)
    for index, value in enumerate(influence):
        _log(f"layer {index}: influence {value:.4f}")
    return most_influential(influence, kept)


def _batches(data: str, tokenizer: str, rows: int, max_length: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the first rows of the data."""
    batch_size = min(batch_size, rows)
    datamodule = InstructionDataModule(
        data, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, shuffle=False
    )
    datamodule.setup("fit")
    left = rows
    for batch in datamodule.train_dataloader():
        yield {name: batch[name][:left] for name in ("input_ids", "attention_mask")}
        left -= len(batch["input_ids"])
        if left <= 0:
            return


def _log(text: str) -> None:
    print_message(text, sys.stderr)
