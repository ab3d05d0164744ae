"""Rows of three small tasks from the data files of WordNet, split by synset."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

# The 26 noun files of WordNet in their order (numbers 3 to 28), without a name where a plain word does not fit.
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
            if line.startswith("  "):  # the licence
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
    """Whether this synset is kept out of everything, so that fresh rows can be drawn from it."""
    return int(hashlib.md5("".join(key).encode()).hexdigest(), 16) % 12 == 7


def usable(synsets: dict[Key, dict[str, Any]]) -> list[Key]:
    """Shuffled keys of one synset per definition, of 12 to 140 characters, nothing reserved."""
    seen = {synset["gloss"] for key, synset in synsets.items() if is_reserved(key)}
    keys = [key for key, synset in synsets.items() if not is_reserved(key) and 12 <= len(synset["gloss"]) <= 140]
    random.Random(0).shuffle(keys)
    kept = []
    for key in keys:
        if synsets[key]["gloss"] not in seen:
            seen.add(synsets[key]["gloss"])
            kept.append(key)
    return kept


def tasks(synsets: dict[Key, dict[str, Any]], keys: list[Key]) -> dict[Key, dict[str, Row]]:
    """Every row that each synset can give, by task."""
    found: dict[Key, dict[str, Row]] = {}
    count: Counter[str] = Counter()
    for key in keys:
        synset, rows = synsets[key], {}
        gloss = synset["gloss"]
        if key[0] == "n":
            name = CATEGORIES[synset["file"] - 3]
            if name and count[name] < PER_CATEGORY:
                count[name] += 1
                rows["category"] = ("Which category does this definition belong to?", gloss, name)
            kind = synset["hypernyms"][0] if synset["hypernyms"] else None
            if kind in synsets and not is_reserved(kind):
                rows["kind"] = ("What kind of thing is defined here?", gloss, f"a kind of {synsets[kind]['words'][0]}")
        rows["define"] = (f"Define the {POS[key[0]][1]} below.", synset["words"][0], gloss)
        found[key] = {
            task: {"instruction": row[0], "input": row[1], "output": row[2], "task": task} for task, row in rows.items()
        }
    return found


def split(synsets: dict[Key, dict[str, Any]]) -> dict[str, list[Row]]:
    """Rows of test, validation and train (one per synset) and of the teacher's pool (all rows of the other synsets).

    A word of a synset held out by an earlier file is defined in no later one.
    """
    keys = usable(synsets)
    rows = tasks(synsets, keys)
    held: set[str] = set()
    files: dict[str, list[Row]] = {}
    used: set[Key] = set()
    for name, wanted in SPLITS.items():
        left = dict(wanted)
        files[name] = []
        new: set[str] = set()
        for key in keys:
            if key in used:
                continue
            if synsets[key]["words"][0].lower() in held:
                rows[key].pop("define", None)
            open_tasks = [task for task in rows[key] if left[task]]
            if open_tasks:
                task = max(open_tasks, key=lambda task: left[task] / wanted[task])
                left[task] -= 1
                used.add(key)
                files[name].append(rows[key][task])
                new.update(word.lower() for word in synsets[key]["words"])
        if name != "train":
            held |= new
    files["pool"] = [
        row
        for key in keys
        if key not in used
        for row in rows[key].values()
        if row["task"] != "define" or row["input"].lower() not in held
    ]
    for name in files:
        random.Random(name).shuffle(files[name])
    return files
