"""The benchmarks run, small; what they say of speed is no test's business, how they count is."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from locations import ROOT
from scoring_server import ScoringServer

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one of the scripts as it sees itself: beside its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_every_loss_beside_its_products(script: Any, tmp_path: Path) -> None:
    engine = script("engine")
    engine.main(["--quick", "--threads", "1", "--output", str(tmp_path / "engine")])
    record = json.loads((tmp_path / "engine.json").read_text())
    assert set(record["results"]) == set(engine.QUICK)
    assert not record["left_out"]
    for rounds in record["results"].values():
        assert len(rounds) == 1
        assert rounds[0]["cpu"] > 0
        assert rounds[0]["floor"] == 4 * (1000 * 32 + 256 * 32 + 2 * 64 * 1000)
    text = (tmp_path / "engine.md").read_text()
    assert "1 threads" in text
    assert all(f"| {name} |" in text for name in engine.QUICK)


def test_every_case_can_be_prepared(script: Any) -> None:
    engine = script("engine")
    for case in engine.CASES:
        if "trl" not in case:
            call, x = engine.prepared(case, (50, 4, 6, 20), 8)
            assert callable(call)
            assert len(x["labels"]) == (80 if "4x" in case else 20)
            assert bool((x["labels"] == -100).any()) == ("40%" in case)


def test_the_table_divides_medians_and_marks_what_is_above_its_limit(script: Any) -> None:
    engine = script("engine")
    case = lambda *cpu: [{"cpu": c, "peak": 110.0, "floor": 100.0} for c in cpu]  # noqa: E731
    results = {"plain": case(2.0, 1.0, 9.0), "best": case(1.0), "forward_kl": case(1.8, 2.4, 2.2), "jsd": case(2.0)}
    results["forward_kl+jsd"] = case(2.6)
    lines = {line.split(" | ")[0].strip("| "): line for line in engine.table(results, 4099).splitlines()}
    assert "1.10 [0.90–1.20] | 1.00 | missed |" in lines["forward_kl, time / plain"]
    assert "1.00 [1.00–1.00] | 1.05 |  |" in lines["jsd, time / plain"]
    assert "1.10 [1.10–1.10] | 1.20 |  |" in lines["jsd, peak / floor"]
    assert "0.20 [0.20–0.20] | 0.10 | missed |" in lines["monitor jsd, added time / plain"]
    assert "forward_kl, time / naive" not in lines
    assert "| 1.20 |  |" in next(x for x in engine.table(results, 4096).splitlines() if "forward_kl, time / plain" in x)


def test_errors_against_float64(script: Any, tmp_path: Path) -> None:
    script("exactness").main(["--quick", "--threads", "1", "--output", str(tmp_path / "exactness")])
    record = json.loads((tmp_path / "exactness.json").read_text())
    assert set(record["results"]) == {"forward_kl", "amid"}
    for columns in record["results"].values():
        for column, ways in columns.items():
            value, gradient = ways["hidden: ours"]
            assert value < (3e-6 if "far" in column else 1e-4)
            assert gradient < {"fp32, far": 3e-6, "fp32, near": 5e-5}.get(column, 2.5e-3)
            assert set(ways) >= {"hidden: ours", "logits: ours"}


def test_whole_steps(script: Any, tmp_path: Path) -> None:
    script("step").main(["--quick", "--threads", "1", "--output", str(tmp_path / "step")])
    record = json.loads((tmp_path / "step.json").read_text())
    assert set(record["rounds"][0]) == {"kd", "sft", "teacher", "teacher_bare", "lightning", "bare"}
    assert all(seconds > 0 for seconds in record["rounds"][0].values())
    assert (tmp_path / "step.md").read_text().count("| 1.20 |") == 3


def test_packed_beside_padded_rows(script: Any, tmp_path: Path) -> None:
    script("packing").main(["--quick", "--threads", "1", "--output", str(tmp_path / "packing")])
    results = json.loads((tmp_path / "packing.json").read_text())["results"]
    assert [(one["order"], len(one["ratios"])) for one in results] == [
        *[("random", 2)] * 3,
        *[("similar length", 2)] * 3,
    ]
    assert all(one["padding"]["packed"] <= one["padding"]["padded"] for one in results)
    assert all(speed > 0 for one in results for speed in one["tokens_per_second"].values())


def test_what_a_logged_step_costs(script: Any, tmp_path: Path) -> None:
    components = script("components")
    components.main(["--quick", "--threads", "1", "--output", str(tmp_path / "components")])
    record = json.loads((tmp_path / "components.json").read_text())
    assert list(record["results"]) == ["ForwardKL", "ForwardKL, the loss alone, V 301"]
    assert all(seconds > 0 for rounds in record["results"].values() for seconds in rounds[0].values())
    rounds = [{"logged": 1.2, "plain": 1.0}, {"logged": 1.9, "plain": 1.0}, {"logged": 1.3, "plain": 1.0}]
    assert "| A | 1.30 [1.20–1.90] | 3.00 [2.00–9.00] | 5.00 |  |" in components.table({"A": rounds})


def test_when_compiling_pays(script: Any, tmp_path: Path) -> None:
    script("break_even").main(["--quick", "--threads", "1", "--output", str(tmp_path / "even")])
    record = json.loads((tmp_path / "even.json").read_text())
    assert [at["entries"] for at in record["results"]["forward_kl"]["warm"]["sizes"]] == [101 * 32]
    assert "| forward_kl | 3e+03 |" in (tmp_path / "even.md").read_text()


def test_generate_beside_bare_generate(script: Any, tmp_path: Path) -> None:
    generate = script("generate")
    generate.main(["--quick", "--output", str(tmp_path / "generate")])
    record = json.loads((tmp_path / "generate.json").read_text())
    (found,) = record["rounds"]
    assert set(found["tokens"]) == set(found["seconds"]) == set(generate.WAYS)
    assert len(set(found["tokens"].values())) == 1  # the same responses
    assert found["equal"] == {"ours": None, "bare": 8, "one by one": 8, "ours, file order": None}
    one = {"tokens": {"ours": 6, "bare": 6}, "seconds": {"ours": [2.0, 3.0], "bare": [4.0, 3.0]}}
    text = generate.table([{**one, "equal": {"ours": None, "bare": 7}, "first": {"ours": 2.0, "bare": 4.0}}])
    assert "| ours | 2 [2–3] | 1.00 [1.00–1.00] | 6 tokens | 2.0 [2.0–2.0] |" in text
    assert "| bare | 2 [2–2] | 1.50 [1.00–2.00] | 7 | 4.0 [4.0–4.0] |" in text


def test_steps_by_where_their_responses_come_from(script: Any, tmp_path: Path) -> None:
    responses = script("responses")
    responses.main(["--quick", "--output", str(tmp_path / "responses")])
    (turn,) = json.loads((tmp_path / "responses.json").read_text())["turns"]
    assert all(seconds > 0 for seconds in turn.values())
    names = ("respond", "generate", "step", "contrastive", "gap", "teacher's half", "student's half")
    assert set(turn) == set(names)
    text = responses.table([dict(zip(names, (5.0, 2.0, 2.0, 4.0, 6.0, 1.0, 3.0), strict=True))])
    assert "| 1.75 [1.75–1.75] | 1.10 | missed |" in text
    assert "| 1.00 [1.00–1.00] | 1.05 |  |" in text
    assert "| 1.50 [1.50–1.50] |  |  |" in text


def test_sources_of_responses_go_on_where_they_were(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_policy = script("on_policy")
    asked: list[tuple[str, int, int]] = []

    class Bench:
        def __init__(self, rows: int) -> None: ...

        def measure(self, student: str) -> dict[str, float]:
            return dict.fromkeys(on_policy.COLUMNS, 0.5)

    def train(root: Path, config: str, steps: int, seed: int, extra: list[str]) -> float:
        asked.append((config, steps, seed))
        return 3.0 if config == "minillm" else 2.0

    monkeypatch.setattr(on_policy, "Bench", Bench)
    monkeypatch.setattr(on_policy, "train", train)
    words = ["--steps", "10", "--output", str(tmp_path)]
    on_policy.main([*words, "--runs", "forward_kl", "gkd"])
    on_policy.main([*words, "--same_time", "--seeds", "0", "1"])
    others = [(name, 10, 0) for name in ("seqkd", "distillm", "distillm2", "minillm")]
    again = [(name, 10, 1) for name in ("quickstart", "seqkd", "gkd", "distillm", "distillm2", "minillm")]
    longer = [("quickstart", 15, seed) for seed in (0, 1)]
    assert asked == [("quickstart", 10, 0), ("gkd", 10, 0), *others, longer[0], *again, longer[1]]
    assert "| distillm2 | 10 | 2 | 2 ± 0 | 0.500 ± 0.000 |" in (tmp_path / "report.md").read_text()


def test_methods_beside_their_controls_go_on_where_they_were(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = script("compare_methods")
    asked: list[tuple[str, ...]] = []
    measured = dict.fromkeys(methods.COLUMNS, 0.5)

    class Bench:
        def __init__(self, rows: int) -> None: ...

        def measure(self, student: str) -> dict[str, float]:
            return measured

    def one(file: str, words: list[str]) -> dict[str, float]:
        _, run, seed, steps, _ = words
        asked.append((run, seed, steps))
        away = 0.4 if run == "gkd" else 0.01 * int(seed)
        return {**measured, "forward_kl": 0.5 + away, "seconds": {"gkd": 4.0, "jsd": 2.1}.get(run, 2.0)}

    monkeypatch.setattr(methods, "Bench", Bench)
    monkeypatch.setattr(methods, "in_a_process", one)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    words = ["--steps", "10", "--output", str(tmp_path), "--runs", "forward_kl", "jsd", "gkd"]
    methods.main([*words, "--same_time"])
    methods.main([*words, "--same_time", "--seeds", "0", "1", "--jobs", "2"])
    first = [("forward_kl", "0", "10"), ("jsd", "0", "10"), ("gkd", "0", "10"), ("gkd", "0", "5")]
    assert asked[:4] == first
    assert sorted(asked[4:]) == sorted([(run, "1", steps) for run, _, steps in first])
    report = (tmp_path / "report.md").read_text()
    assert "| jsd | 10 | 2 | 2 | 0.505 ± 0.007† |" in report
    assert "| gkd | 10 | 2 | 4 | 0.900 ± 0.000\\*† | 0.500 ± 0.000 |" in report
    assert report.count("| gkd | 5 | 2 | 4 |") == 1
    assert "jsd" in (tmp_path / "chart.svg").read_text()


def test_variants_of_a_baseline_with_the_same_student_share_a_line(script: Any) -> None:
    methods = script("compare_methods")
    rows = lambda value: [dict.fromkeys(methods.COLUMNS, value)]  # noqa: E731
    found = {
        "jsd": rows(1.0),
        "labels, last step": rows(1.0),
        "labels, best step": rows(1.0),
        "labels, rows": rows(2.0),
    }
    assert list(methods.merged(found)) == ["jsd", "labels, last step and best step", "labels, rows"]
    results = json.loads((FOLDER / "results" / "methods.json").read_text(encoding="utf-8"))
    table = (FOLDER / "results" / "methods.md").read_text(encoding="utf-8")
    assert methods.report(results).splitlines()[3:] == table.splitlines()[3:]


def test_every_method_that_ships_is_compared(script: Any) -> None:
    shipped = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {
        "lora",
        "real_pair",
        "sft",
        "self_distillation",
        "cross_tokenizer",
        "pretraining",
        "draft",
    }
    assert shipped == {words[0] for words in script("compare_methods").METHODS.values()}


@pytest.mark.slow
def test_the_first_hour_on_gpus_runs_on_a_cpu(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    gpus = script("on_gpu")
    assert gpus.main(["--device", "cpu", "--small", "--rounds", "1", "--output", str(tmp_path / "gpus")]) == 0
    parts = json.loads((tmp_path / "gpus.json").read_text())["parts"]
    assert list(parts) == list(gpus.PARTS)
    assert parts["All devices compared with one"] < 1e-3
    assert parts["Exactness"]["forward_kl"]["bf16, near"]["hidden: ours"][1] < 2.5e-3
    text = (tmp_path / "gpus.md").read_text()
    assert "Failed" not in text
    assert "| forward_kl:eager | " in text


def test_a_part_that_fails_on_gpus_says_why_and_loses_nothing(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = script("on_gpu")

    def fails(args: Any) -> Any:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(
        gpus, "PARTS", {"one": lambda args: (1, "measured\n"), "two": fails, "three": lambda args: (3, "")}
    )
    assert gpus.main(["--device", "cpu", "--output", str(tmp_path / "gpus")]) == 1
    assert json.loads((tmp_path / "gpus.json").read_text())["parts"] == {"one": 1, "three": 3}
    assert "## one\n\nmeasured\n\n## two\n\nFailed: no more memory\n" in (tmp_path / "gpus.md").read_text()


def test_a_chart_of_several_shapes(script: Any, tmp_path: Path) -> None:
    chart = script("chart")
    case = lambda cpu: [{"cpu": cpu, "peak": 110.0, "floor": 100.0}]  # noqa: E731
    paths = []
    for i, (v, n, cpu) in enumerate([(50, 100, 1.0), (50, 10, 3.0), (50, 1000, 1.0), (70, 10, 4.0)]):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps({"shape": [v, 4, 6, n], "results": {"plain": case(2.0), "jsd": case(cpu)}}))
        paths.append(str(path))
    records = [json.loads(Path(path).read_text()) for path in paths]
    over_tokens, over_vocabulary = chart.alike(records, chart.TOKENS), chart.alike(records, chart.VOCABULARY)
    assert chart.points(over_tokens, "jsd", "time", chart.TOKENS) == [(10, 1.5), (100, 0.5), (1000, 0.5)]
    assert chart.points(over_vocabulary, "jsd", "time", chart.VOCABULARY) == [(50, 1.5), (70, 2.0)]
    assert chart.points(over_tokens, "jsd", "peak", chart.TOKENS) == [(10, 1.1), (100, 1.1), (1000, 1.1)]
    assert chart.points(over_tokens, "amid", "time", chart.TOKENS) == []
    chart.main([*paths, "--output", str(tmp_path / "cost.svg")])
    assert (tmp_path / "cost.svg").read_text().count("jsd") >= 1


def test_waiting_threads_are_compared_with_the_default(script: Any, tmp_path: Path) -> None:
    waiting = script("waiting")
    waiting.main(["--quick", "--threads", "1", "--beside", "0", "--output", str(tmp_path / "waiting")])
    record = json.loads((tmp_path / "waiting.json").read_text())
    assert set(record["results"]) == set(waiting.POLICIES)
    assert "| default | 1.00 [1.00–1.00] |" in (tmp_path / "waiting.md").read_text()


def test_the_page_on_a_server(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with ScoringServer(max_model_len=512) as server:
        script("on_server").main([server.url, "--rows", "4", "--top_k", "5"])
    text = capsys.readouterr().out
    assert "form: prompt_logprobs (vLLM); max_model_len: 512" in text
    assert "test at the start: passed" in text
    assert "| 8 | 4 |" in text


@pytest.mark.slow
def test_self_distillation_is_compared_with_labels(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    benchmark = script("self_distillation")
    benchmark.main(["--steps", "2", "--runs", "labels only", "--output", str(tmp_path)])
    (found,) = json.loads((tmp_path / "results.json").read_text())
    assert found["teacher"]["exact_match"] > found["student_before"]["exact_match"]
    assert "| labels only | 2 | 1 |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_two_tokenizers_are_compared_with_labels(script: Any, tmp_path: Path) -> None:
    benchmark = script("two_tokenizers")
    words = ["--steps", "2", "--rows", "20", "--runs", "labels only", "--output", str(tmp_path)]
    benchmark.main(words)
    benchmark.main(words)  # nothing is repeated
    teacher, before, found = json.loads((tmp_path / "results.json").read_text())
    assert teacher["nll"] < before["nll"]
    assert teacher["exact_match"] > before["exact_match"]
    assert found["nll"] < before["nll"] + 1
    assert "| labels only | 2 | 1 |" in (tmp_path / "report.md").read_text()


def test_shapes_of_real_pairs_have_the_published_numbers_of_parameters(script: Any) -> None:
    pairs = script("plan_real_pairs")
    for name, count in pairs.PARAMETERS.items():
        config = dict(pairs.MODELS[name])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config))
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name


def test_a_plan_of_a_real_pair_names_the_smallest_gpu(script: Any) -> None:
    pairs = script("plan_real_pairs")
    assert [pairs.cell(None if peak is None else peak * 2**30) for peak in (None, 21, 22, 73)] == [
        "",
        "21.0 (24)",
        "22.0 (80)",
        "73.0 (no)",
    ]
    one = {"teacher": "SmolLM2-1.7B", "student": "SmolLM2-360M", "way": "all weights", "gpus": 2, "peak": 2**30}
    assert pairs.table([one]).splitlines()[2] == "| SmolLM2-1.7B → SmolLM2-360M | all weights |  | 1.0 (24) |  |"


@pytest.mark.slow
def test_real_pairs_are_planned(script: Any, tmp_path: Path) -> None:
    script("plan_real_pairs").main(["--quick", "--output", str(tmp_path / "pairs")])
    (found,) = json.loads((tmp_path / "pairs.json").read_text())["results"]
    assert 12 * 361_821_120 < found["peak"] - 2 * 1_711_376_384 < 30 * 2**30


def test_a_step_beside_a_server(script: Any) -> None:
    served = script("served")
    row = {"latency": 0.2, "step": (0.1, 0.08), "server": 0.22, "both": (0.24, 0.12)}
    client = {str(n): {"tokens_per_s": 12345.6, "cpu_per_1000": 0.031} for n in served.REQUESTS}
    record = {
        "machine": "a machine",
        "load": 1.0,
        "steps": [{"student": "asset:student", "batch": 8, "rows": [row]}],
        "client": {"rows": 4, "length": 64, "k": 20, **client},
    }
    text = served.report(record)
    assert "| asset:student | 200 | 100 | 220 | 240 | 1.09 | 0.75 | 1.50 |" in text
    assert "| 8 | 12,346 | 31 |" in text


@pytest.mark.slow
def test_a_step_beside_a_server_is_measured(script: Any, tmp_path: Path) -> None:
    words = ["--steps", "2", "--batch", "2", "--rows", "2", "--length", "16", "--output", str(tmp_path / "served")]
    script("served").main(words)
    record = json.loads((tmp_path / "served.json").read_text())
    assert [len(step["rows"]) for step in record["steps"]] == [4, 4]
    assert "| requests at a time |" in (tmp_path / "served.md").read_text()


def test_arms_with_and_without_an_assistant(script: Any) -> None:
    gap = script("assistants_gap")
    assert all(without in ("", *gap.ARMS) for _, without in gap.ARMS.values())
    values = dict.fromkeys(gap.COLUMNS, 0.5)

    def run(arm: str, rate: float, seed: int, distance: float) -> dict[str, Any]:
        after = {**values, "forward_kl": distance, "exact_match": distance}
        return {"gap": "tiny", "arm": arm, "rate": rate, "seed": seed, "steps": 9, "student_after": after}

    rates = [
        run(arm, rate, gap.TUNING, abs(rate - 2.5e-2)) for arm in ("forward KL", "TAID") for rate in (1e-2, 2.5e-2)
    ]
    assert gap.tuned(rates, "tiny") == {"forward KL": 2.5e-2, "TAID": 2.5e-2}
    measured = [run("forward KL", 2.5e-2, seed, 1.0 + seed / 100) for seed in (0, 1)]
    measured += [run("TAID", 2.5e-2, seed, 2.0 + seed / 100) for seed in (0, 1)]
    text = gap.report(rates + measured)
    assert "| forward KL |  | 0.025 | 2 | 1.005 ± 0.007 | 0.500 ± 0.000 |" in text
    line = next(line for line in text.splitlines() if line.startswith("| TAID | forward KL |"))
    assert "| 2.005 ± 0.007 (−) | 0.500 ± 0.000 |" in line
    assert "| 2.005 ± 0.007 (+) |" in line  # exact match: more is better
    assert "| TAID | 0.015 / 0.500 | 0.000 / 0.500 |" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_assistants_are_measured(script: Any, tmp_path: Path) -> None:
    words = ["--quick", "--gaps", "tiny", "--arms", "forward KL", "TAID", "--rows", "20", "--output", str(tmp_path)]
    script("assistants_gap").main(words)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 1 + 2 * 3 + 2  # before, the grid, one seed
    before, *_, after = (r["student_after"] for r in results)
    assert after["forward_kl"] < before["forward_kl"]
    assert "| TAID | forward KL |" in (tmp_path / "report.md").read_text()
