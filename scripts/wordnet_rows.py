"""Rows of three small tasks from the data files of WordNet, split by synset."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

# The 26 noun files of WordNet in order (numbers 3 to 28); the name is empty where no plain word fits.
CATEGORIES = (
    " act animal artifact attribute body cognition communication event feeling food group place  object person "
    "phenomenon plant possession process quantity relation shape state substance time"
).split(" ")
PER_CATEGORY = 6000
POS = {"n": ("noun", "noun"), "v": ("verb", "verb"), "a": ("adj", "adjective")}
SPLITS = {
    "test": {"category": 800, "kind": 800, "define": 400},
    "validation": {"category": 150, "kind": 150, "define": 100},
    "train": {"category": 1500, "kind": 1500, "define": 1000},
}
Row = dict[str, str]
Key = tuple[str, str]


def definition(gloss: str) -> str:
    """The gloss without parentheses and without its examples."""
    gloss = re.sub(r"\([^()]*\)", " ", gloss)
    gloss = re.split(r';\s*"|\s"|:\s*"', " " + gloss)[0]
    return re.sub(r"\s+", " ", gloss).strip(" ;,:")


def read_wordnet(folder: Path) -> dict[Key, dict[str, Any]]:
    """All synsets by (part of speech, offset): noun file number, words, hypernyms, definition."""
    synsets: dict[Key, dict[str, Any]] = {}
    for pos, (file, _) in POS.items():
        for line in (folder / "dict" / f"data.{file}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the license
                continue
            head, _, gloss = line.partition("|")
            fields = head.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            first = 5 + 2 * count
            pointers = [fields[first + 4 * i : first + 4 * i + 2] for i in range(int(fields[first - 1]))]
            synsets[pos, fields[0]] = {
                "file": int(fields[1]),
                "words": words,
                "hypernyms": [("n", target) for symbol, target in pointers if symbol in ("@", "@i")],
                "gloss": definition(gloss.strip()),
            }
    return synsets


def is_reserved(key: Key) -> bool:
    """Whether this synset is excluded from all splits, so that new rows can be drawn from it later."""
    return int(hashlib.md5("".join(key).encode()).hexdigest(), 16) % 12 == 7


def usable(synsets: dict[Key, dict[str, Any]], generator: random.Random) -> list[Key]:
    """Shuffled keys of one synset per definition of 12 to 140 characters, without reserved synsets."""
    seen = {synset["gloss"] for key, synset in synsets.items() if is_reserved(key)}
    keys = [key for key, s in synsets.items() if s["gloss"] not in seen and 12 <= len(s["gloss"]) <= 140]
    generator.shuffle(keys)
    kept = []
    for key in keys:
        if synsets[key]["gloss"] not in seen:
            seen.add(synsets[key]["gloss"])
            kept.append(key)
    return kept


def rows_of(synsets: dict[Key, dict[str, Any]], key: Key) -> dict[str, Row]:
    """Every row that can be made from a synset, by task."""
    synset, rows = synsets[key], {}
    gloss = synset["gloss"]
    if key[0] == "n":
        if name := CATEGORIES[synset["file"] - 3]:
            rows["category"] = ("Which category does this definition belong to?", gloss, name)
        kind = synset["hypernyms"][0] if synset["hypernyms"] else None
        if kind in synsets and not is_reserved(kind):
            rows["kind"] = ("What kind of thing is defined here?", gloss, f"a kind of {synsets[kind]['words'][0]}")
    rows["define"] = (f"Define the {POS[key[0]][1]} below.", synset["words"][0], gloss)
    return {t: {"instruction": row[0], "input": row[1], "output": row[2], "task": t} for t, row in rows.items()}


def split(synsets: dict[Key, dict[str, Any]]) -> dict[str, list[Row]]:
    """Rows of test, validation and train (one per synset) and of the teacher's pool (all rows of the other synsets).

    The teacher's pool has no definitions of words in test or validation synsets.
    """
    generator = random.Random(0)
    keys = usable(synsets, generator)
    held: set[str] = set()
    files: dict[str, list[Row]] = {}
    used: set[Key] = set()
    for name, wanted in SPLITS.items():
        left = dict(wanted)
        files[name] = []
        for key in keys:
            if key in used:
                continue
            rows = rows_of(synsets, key)
            open_tasks = [task for task in left if left[task] and task in rows]
            if open_tasks:
                task = max(open_tasks, key=lambda task: left[task] / wanted[task])
                left[task] -= 1
                used.add(key)
                files[name].append(rows[task])
                if name != "train":
                    held.update(synsets[key]["words"])
        generator.shuffle(files[name])
    files["pool"] = []
    count: Counter[str] = Counter()
    for key in keys:
        if key in used:
            continue
        rows = rows_of(synsets, key)
        if synsets[key]["words"][0] in held:
            rows.pop("define", None)
        if "category" in rows:
            count[rows["category"]["output"]] += 1
            if count[rows["category"]["output"]] > PER_CATEGORY:
                rows.pop("category")
        files["pool"] += rows.values()
    generator.shuffle(files["pool"])
    return files
