"""Memory of real pairs on one, two and eight GPUs, estimated by `kd-lightning plan` with the config `real_pair`.

    python benchmarks/plan_real_pairs.py --output build/real_pairs

A plan needs shapes alone. Those below were copied by hand from the published `config.json` files in November 2026;
their numbers of parameters equal those that the Hugging Face Hub reports. No weights are read, and no GPU is used. A
plan that OUTPUT.json has is not repeated. Teachers in 4 bits need bitsandbytes, and are skipped without it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measuring import write

from kd_lightning.cli import plan

QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
LLAMA3 = {**LLAMA, "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SMOLLM2 = {**LLAMA, "vocab_size": 49152, "head_dim": 64}
SMOLLM3 = {
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 11008,
}
GEMMA3 = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 256}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def shape(base: dict[str, Any], hidden: int, layers: int, heads: int, wide: int, tied: bool) -> dict[str, Any]:
    """The `config.json` of a model of some family."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**base, **sizes, "intermediate_size": wide, "tie_word_embeddings": tied, "dtype": "bfloat16"}


def with_images(text: dict[str, Any]) -> dict[str, Any]:
    """A Gemma 3 that also reads images: its files hold the vision tower as well."""
    own = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256}
    return {**own, "text_config": text, "vision_config": SIGLIP, "tie_word_embeddings": True, "dtype": "bfloat16"}


WIDE_GEMMA3 = {**GEMMA3, "vocab_size": 262208, "sliding_window": 1024}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": shape(QWEN3, 1024, 28, 16, 3072, True),
    "Qwen3-1.7B": shape(QWEN3, 2048, 28, 16, 6144, True),
    "Qwen3-8B": shape(QWEN3, 4096, 36, 32, 12288, False),
    "Llama-3.2-1B": {**shape(LLAMA3, 2048, 16, 32, 8192, True), "head_dim": 64},
    "Llama-3.1-8B": {**shape(LLAMA3, 4096, 32, 32, 14336, False), "head_dim": 128},
    "gemma-3-1b": {
        **shape({**GEMMA3, "vocab_size": 262144, "sliding_window": 512}, 1152, 26, 4, 6912, True),
        "num_key_value_heads": 1,
    },
    "gemma-3-4b": with_images({**shape(WIDE_GEMMA3, 2560, 34, 8, 10240, True), "num_key_value_heads": 4}),
    "gemma-3-12b": with_images({**shape(WIDE_GEMMA3, 3840, 48, 16, 15360, True), "num_key_value_heads": 8}),
    "SmolLM2-360M": {**shape(SMOLLM2, 960, 32, 15, 2560, True), "num_key_value_heads": 5},
    "SmolLM2-1.7B": {**shape(SMOLLM2, 2048, 24, 32, 8192, True), "num_key_value_heads": 32},
    "SmolLM3-3B": shape(SMOLLM3, 2048, 36, 16, 11008, True),
    "18 of its layers": shape(SMOLLM3, 2048, 18, 16, 11008, True),
}
PARAMETERS = {  # as the Hub reports them
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-8B": 8_190_735_360,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "SmolLM3-3B": 3_075_098_624,
}
PAIRS = (  # teacher, student
    ("Qwen3-8B", "Qwen3-0.6B"),
    ("Qwen3-8B", "Qwen3-1.7B"),
    ("Llama-3.1-8B", "Llama-3.2-1B"),
    ("gemma-3-4b", "gemma-3-1b"),
    ("gemma-3-12b", "gemma-3-1b"),
    ("SmolLM2-1.7B", "SmolLM2-360M"),
    ("SmolLM3-3B", "18 of its layers"),
)
LORA = ("--model.lora.r", "16")
FOUR_BITS = (
    "--model.teacher_kwargs.quantization_config",
    '{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}',
)
WAYS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {  # numbers of GPUs, arguments
    "all weights": ((1, 2, 8), ()),
    "all weights, teacher's layers in host memory": ((1,), ("--model.teacher", "OffloadedTeacher")),
    "all weights, teacher in 4 bits": ((1,), FOUR_BITS),
    "LoRA": ((1,), LORA),
    "LoRA, teacher in 4 bits": ((1,), (*LORA, *FOUR_BITS)),
}
ENOUGH = ("SmolLM2-1.7B", "all weights")  # the pair that fits everywhere as it is
MEMORY = ("24GiB", "80GiB")


def estimate(folder: Path, teacher: str, student: str, gpus: int, extra: tuple[str, ...]) -> int:
    """Peak bytes on each GPU."""
    words = ["--config", "real_pair", "--world_size", str(gpus), "--json", str(folder / "plan.json")]
    words += ["--model.student", str(folder / student), "--trainer.strategy", "auto" if gpus == 1 else "fsdp2"]
    name = "--model.teacher.path" if "OffloadedTeacher" in extra else "--model.teacher"
    words += ["--trainer.default_root_dir", str(folder / "root"), *extra, name, str(folder / teacher)]
    with contextlib.redirect_stdout(io.StringIO()):
        plan.main(words)
    return int(json.loads((folder / "plan.json").read_text(encoding="utf-8"))["peak"])


def cell(peak: int | None) -> str:
    """GiB, and the smallest GPU on which that fits with a tenth of its memory to spare."""
    if peak is None:
        return ""
    smallest = next((memory.removesuffix("GiB") for memory in MEMORY if plan.fits(peak, plan.size(memory))), "no")
    return f"{peak / 2**30:.1f} ({smallest})"


def table(results: list[dict[str, Any]]) -> str:
    """One line for each pair and way."""
    peaks = {(r["teacher"], r["student"], r["way"], r["gpus"]): r["peak"] for r in results}
    text = "| teacher → student | trained | 1 GPU | 2 GPUs, `fsdp2` | 8 GPUs, `fsdp2` |\n|---|---|---|---|---|\n"
    for teacher, student in PAIRS:
        for way in WAYS:
            found = [peaks.get((teacher, student, way, gpus)) for gpus in (1, 2, 8)]
            if any(found):
                text += f"| {teacher} → {student} | {way} | {' | '.join(map(cell, found))} |\n"
    return text


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/real_pairs"))
    parser.add_argument("--quick", action="store_true", help="one plan of the smallest pair")
    args = parser.parse_args(words)
    wanted = [
        (way, pair, gpus)
        for gpus in (1, 2, 8)
        for way, (numbers, _) in WAYS.items()
        for pair in PAIRS
        if gpus in numbers and (pair[0] != ENOUGH[0] or way == ENOUGH[1])
    ]
    if args.quick:
        wanted = [("all weights", ("SmolLM2-1.7B", "SmolLM2-360M"), 1)]
    if importlib.util.find_spec("bitsandbytes") is None:
        wanted = [one for one in wanted if "4 bits" not in one[0]]
    path = args.output.with_suffix(".json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    there = {(r["way"], (r["teacher"], r["student"]), r["gpus"]) for r in results}
    with TemporaryDirectory() as root:
        for name, config in MODELS.items():
            (Path(root) / name).mkdir()
            (Path(root) / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for way, (teacher, student), gpus in (one for one in wanted if one not in there):
            peak = estimate(Path(root), teacher, student, gpus, WAYS[way][1])
            results.append({"teacher": teacher, "student": student, "way": way, "gpus": gpus, "peak": peak})
            print(f"{teacher} → {student}, {way}, {gpus}: {cell(peak)}", flush=True)
            write(args.output, {"results": results}, table(results))


if __name__ == "__main__":
    main()
