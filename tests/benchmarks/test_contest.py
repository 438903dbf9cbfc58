"""The benchmarks of the paper's tasks: their records, and what is read from them."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.stats

from benchmarks import __main__ as command_line
from benchmarks.harness import contest as contests
from benchmarks.harness import contest_report, contest_runs, timing
from benchmarks.harness import runs as engine
from benchmarks.harness import searches as searching
from benchmarks.harness.contest import Contest, Method
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.results import parse, read_json, record, select, values
from benchmarks.harness.runs import Finished, Run, Runs, settings
from benchmarks.harness.searches import MEDIAN, ORACLE, VALIDATED, WORST
from benchmarks.harness.tables import mean_sd
from benchmarks.harness.training import Task
from benchmarks.tasks.ablations import methods as ablations_methods
from benchmarks.tasks.ablations import report as ablations_report
from benchmarks.tasks.ablations import run as ablations
from benchmarks.tasks.depth import methods as depth_methods
from benchmarks.tasks.depth import metrics
from benchmarks.tasks.depth import report as depth_report
from benchmarks.tasks.depth import run as depth
from benchmarks.tasks.segmentation import methods as segmentation_methods
from benchmarks.tasks.segmentation import report as segmentation_report
from benchmarks.tasks.segmentation import run as segmentation
from tests.benchmarks import streets

pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")

SEEDS = 2
METHODS = {
    "depth": ("primary", "equal", "yoto", "aligned", "grid"),
    "segmentation": ("primary", "equal", "yoto", "grid"),
    "segmentation_camvid": ("equal", "aligned", "grid"),
}
MODULES = {
    "depth": depth,
    "segmentation": segmentation,
    "segmentation_camvid": segmentation,
}
COMPARED = {
    "depth": depth_methods,
    "segmentation": segmentation_methods,
    "segmentation_camvid": segmentation_methods,
}
REPORTS = {
    "depth": depth_report,
    "segmentation": segmentation_report,
    "segmentation_camvid": segmentation_report,
}
METRICS = {
    "depth": metrics.METRICS,
    "segmentation": ("mIoU",),
    "segmentation_camvid": ("mIoU",),
}
FILES = tuple(METHODS)


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    return streets.write(tmp_path_factory.mktemp("camvid"), train=12, val=3)


def command(name, folder, camvid):
    words = [name.split("_")[0], "--preset", "quick", "--seeds", str(SEEDS)]
    words += ["--methods", ",".join(METHODS[name]), "--out", str(folder / name)]
    return words + (["--data", str(camvid)] if name.endswith("camvid") else [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, camvid):
    """What the quick presets write, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("results")
    with jax.numpy_rank_promotion("allow"), pytest.MonkeyPatch.context() as patch:
        # Nothing of it depends on the methods: resuming needs no second time.
        patch.setattr(depth.task, "make", functools.cache(depth.task.make))
        for name in FILES:
            command_line.main(command(name, folder, camvid))
        patch.setattr(Runs, "_train", None)
        (folder / "resumed").mkdir()
        written = folder / "depth" / "depth.json"
        kept = written.read_text()
        command_line.main([*command("depth", folder, camvid), "--resume"])
        written.rename(folder / "resumed" / "depth.json")
        written.write_text(kept)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return {name: read_json(folder / name / f"{name}.json") for name in FILES}


@pytest.fixture(params=FILES)
def name(request):
    return request.param


@pytest.fixture
def result(name, results):
    return results[name]


def domains(name):
    contest = COMPARED[name].contest(None)
    return (contest.seen, *contest.unseen)


def losses(name):
    task = MODULES[name].task
    return (task.PRIMARY, *task.AUXILIARY)


# Records.


def test_every_method_has_every_metric_domain_and_seed(name, result):
    wanted = {(m, d) for m in METRICS[name] for d in domains(name)}
    wanted |= {(f"{x}:{n}", None) for x in ("loss", "weight") for n in losses(name)}
    wanted |= {("validation", None)}
    choices = {"grid": (VALIDATED, ORACLE, MEDIAN, WORST)}
    for method in METHODS[name]:
        for config in choices.get(method, ("",)):
            for seed in range(SEEDS):
                records = select(
                    result["records"], method=method, config=config, seed=seed
                )
                assert len(records) == len(wanted)
                assert {(r["metric"], r["domain"]) for r in records} == wanted
                assert np.isfinite([r["value"] for r in records]).all()
    assert {r["method"] for r in result["records"]} == {*METHODS[name], "constant"}


def test_the_runs_of_a_search_have_the_metric_and_the_validation(name, result):
    task = MODULES[name].task
    records = select(result["records"], method="grid")
    runs = [r for r in records if "=" in r["config"]]
    tried = {r["config"] for r in runs}
    assert len(tried) == MODULES[name].BUDGET["quick"] == 2
    assert all(tuple(parse(c)) == task.AUXILIARY for c in tried)
    metric = COMPARED[name].METRIC
    for config in tried:
        for seed in range(SEEDS):
            of_run = select(runs, config=config, seed=seed)
            assert sorted((r["metric"], r["domain"] or "") for r in of_run) == sorted(
                [(metric, d) for d in domains(name)] + [("validation", "")]
            )


def test_domains_kept_out_of_training_are_marked(name, result):
    seen, *unseen = domains(name)
    for found in result["records"]:
        assert found["unseen"] == (found["domain"] in unseen)
        assert found["domain"] in (None, seen, *unseen)


def test_a_run_costs_one_and_a_choice_the_whole_search(name, result):
    for found in result["records"]:
        whole = found["config"] in (VALIDATED, ORACLE)
        expected = 0 if found["method"] == "constant" else 2 if whole else 1
        assert found["compute"] == expected


def test_validation_chooses(name, result):
    for seed in range(SEEDS):
        records = select(result["records"], method="grid", seed=seed)
        runs = [r for r in records if "=" in r["config"]]
        best = int(np.argmax(values(runs, metric="validation")))
        for domain in domains(name):
            wanted = {"metric": COMPARED[name].METRIC, "domain": domain}
            chosen = select(records, config=VALIDATED)
            expected = values(runs, **wanted)[best]
            assert values(chosen, **wanted) == [expected]


def test_weights_sum_to_one(name, result):
    for method in METHODS[name]:
        for config in {r["config"] for r in result["records"]}:
            found = select(result["records"], method=method, config=config)
            weights = [values(found, metric=f"weight:{n}") for n in losses(name)]
            np.testing.assert_allclose(np.sum(weights, axis=0), 1, atol=1e-4)
    equal = select(result["records"], method="equal")
    for n in losses(name):
        share = 1 / len(losses(name))
        found = values(equal, metric=f"weight:{n}")
        np.testing.assert_allclose(found, share, rtol=1e-4)


def test_weights_over_time_are_kept_of_those_that_learn(name, result):
    learned = [m for m in METHODS[name] if m in ("yoto", "aligned")]
    assert [(h["method"], h["seed"]) for h in result["history"]] == [
        (method, seed) for method in learned for seed in range(SEEDS)
    ]
    for entry in result["history"]:
        assert set(entry["weights"]) == set(losses(name))
        assert len(entry["step"]) == result["meta"]["steps"]


def test_the_meta_data_tell_what_was_run_and_name_no_folder(name, result, folder):
    meta = result["meta"]
    assert meta["seeds"] == SEEDS
    assert meta["preset"] == "quick"
    assert ",".join(METHODS[name]) in meta["command"]
    assert str(folder.parent) not in json.dumps(meta)


def test_a_folder_of_images_is_told_from_scenes(results):
    assert results["segmentation"]["meta"]["data"] == "scenes"
    meta = results["segmentation_camvid"]["meta"]
    # Two of the twelve are held out; a half of the others lends its looks.
    counts = {k: v for k, v in meta.items() if k.endswith("_images")}
    assert counts == {
        "train_images": 5,
        "target_images": 15,
        "validation_images": 2,
        "test_images": 3,
    }


# Resuming.


def test_resuming_a_finished_benchmark_trains_nothing(folder, results):
    resumed = read_json(folder / "resumed" / "depth.json")
    assert resumed["records"] == results["depth"]["records"]
    assert resumed["history"] == results["depth"]["history"]


def test_what_cannot_be_resumed_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["properties", "--resume"])
    assert stop.value.code == 2
    assert "properties cannot be resumed: drop --resume" in capsys.readouterr().err


# Reading.


@pytest.fixture
def nothing_is_trained(monkeypatch):
    monkeypatch.setattr(depth.task, "make", None)
    monkeypatch.setattr(segmentation.task, "make", None)
    monkeypatch.setattr(segmentation.task, "load", None)
    monkeypatch.setattr(engine, "prepare", None)


@pytest.mark.usefixtures("nothing_is_trained")
def test_tables_follow_from_the_file(name, result):
    report = REPORTS[name]
    everything = [report.table(result), report.summary(result)]
    everything += report.tables(result).values()
    for table in everything:
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    full, short = everything[:2]
    kept = [row[0] for row in full.rows if row[0] != "grid, median point"]
    assert [row[0] for row in short.rows] == kept
    assert len(full.rows) == len(METHODS[name]) + 3
    assert len(short.columns) == len(full.columns) - len(domains(name))
    labels = [row[0] for row in full.rows]
    assert labels[-4:] == [
        "grid, best by validation, 2 runs",
        "grid, best on test (oracle)",
        "grid, median point",
        "grid, worst point",
    ]
    equal = full.rows[labels.index("equal weights")]
    records = select(result["records"], method="equal", metric=COMPARED[name].METRIC)
    for domain in domains(name):
        expected = mean_sd(values(records, domain=domain))
        assert equal[full.columns.index(domain)] == expected
    by_seed = [
        np.mean([r["value"] for r in records if r["unseen"] and r["seed"] == seed])
        for seed in range(SEEDS)
    ]
    assert equal[full.columns.index("mean unseen")] == mean_sd(by_seed)


@pytest.mark.usefixtures("nothing_is_trained")
def test_the_figure_is_redrawn_from_the_file(name, result, folder, tmp_path):
    REPORTS[name].figure(result, tmp_path / "again.png")
    written = folder / name / f"{name}.png"
    assert (tmp_path / "again.png").read_bytes() == written.read_bytes()
    assert (folder / name / f"{name}_examples.png").stat().st_size > 10_000


def raised(result, method, values, config=""):
    """The result with these values, one for each seed, of a method in all domains."""
    changed = json.loads(json.dumps(result))
    for r in select(changed["records"], method=method, config=config):
        if r["domain"] is not None:
            r["value"] = values[r["seed"]]
    return changed


@pytest.mark.usefixtures("nothing_is_trained")
@pytest.mark.parametrize(
    ("values", "verdict"),
    [((99.0, 99.1), "held"), ((0.0, 0.1), "did not hold"), ((-200, 400), "not told")],
)
def test_claims_follow_from_the_records(values, verdict, results):
    result = raised(results["depth"], "equal", (50.0, 50.0))
    result = raised(result, "yoto", values)
    rows = depth_report.tables(result)["depth-claims"].rows
    # The first of the two is about YOTO, the other about the best train-once method.
    _, difference, found = next(row for row in rows if row[0] == "- equal weights")
    assert difference == mean_sd(np.array(values) - 50)
    assert verdict in found
    assert ("did not" in verdict) == ("did not" in found)
    # There is no such method in the records.
    assert not any("published" in claim for claim, *_ in rows)


@pytest.mark.usefixtures("nothing_is_trained")
def test_the_best_train_once_method_learns_its_weights(results):
    result = raised(results["depth"], "equal", (99.0, 99.0))
    result = raised(result, "aligned", (98.0, 98.0))
    view = depth_report.view(result)
    assert contest_report.best_train_once(view) == "aligned"
    assert any(
        "softmax alignment" in row[0] for row in contest_report.claims(view).rows
    )


def test_costs_are_read_from_the_records(results, monkeypatch):
    ratios = {"aligned": [1.5, 1.6, 1.7], contests.PLAIN: [1.0] * 3}
    asked = {}

    def step_ratios(task, rules, baseline, rounds):
        asked.update(rules)
        assert (baseline, rounds) == (contests.PLAIN, 3)
        return {name: np.array(ratios.get(name, [1.1] * 3)) for name in rules}

    speed = lambda task, rule, config, lanes, rounds: np.array([5.0, 3.0, 4.0])
    monkeypatch.setattr(timing, "step_ratios", step_ratios)
    monkeypatch.setattr(timing, "sweep_speed", speed)
    contest = depth_methods.contest(SimpleNamespace(auxiliary=depth.task.AUXILIARY))
    records = contest_runs.costs(contest, METHODS["depth"], 3)
    assert set(asked) == {"softmax", "plain", "plain again", "aligned"}
    assert asked["plain"][0] is asked["plain again"][0]
    result = dict(results["depth"])
    result["records"] = result["records"] + records
    table = depth_report.tables(result)["depth-costs"]
    assert dict(table.rows)["softmax alignment, held-out objective"] == (
        "1.600 (1.550 to 1.650)"
    )
    assert "as long as 3.8 one by one (4.00 times faster" in table.caption
    rows = {row[0]: row for row in depth_report.table(result).rows}
    runs = depth_report.table(result).columns.index("runs")
    assert rows["softmax alignment, held-out objective"][runs] == "1.6"
    assert rows["YOTO, library defaults"][runs] == "1.1"
    assert rows["equal weights"][runs] == "1"
    assert rows["grid, best by validation, 2 runs"][runs] == "2"


# A search, told what a model of it would be.

NAMES = ("a", "b")


class Recorded(searching.Points):
    """Points one by one, and what was told of them."""

    def __init__(self, points):
        super().__init__(points)
        self.told = []

    def ask(self):
        return self._left[:1]

    def tell(self, values):
        self.told += values
        self._left = self._left[1:]


class Trained:
    """In place of ``Runs``: values by formula."""

    def __init__(self, validation, test):
        self.validation, self.test = validation, test
        self.runs = []

    def finish(self, runs, description):
        self.runs += runs
        return [self.one(run) for run in runs]

    def one(self, run):
        config = dict(run.config)
        assert not config["learn"]
        x = config["ratios"][0]
        values = {
            ("score", "near"): 0.0,
            ("score", "far"): self.test(x, run.seed) - 1,
            ("score", "farther"): self.test(x, run.seed) + 1,
            ("validation", None): self.validation(x, run.seed),
        }
        return Finished(values, {}, 1.0)


def contest_of(searches, better=1):
    task = SimpleNamespace(name="stub", primary="p", auxiliary=NAMES)
    methods = {"grid": Method("grid", search=lambda seed: searches[seed])}
    unseen = ("far", "farther")
    return Contest(task, "score", better, "points", "near", unseen, methods, {})


def points(n):
    return [(float(x), 1.0) for x in range(1, n + 1)]


def chosen(records, config, seed):
    found = select(records, config=config, seed=seed, metric="score")
    return values(found, domain="far") + 1, {r["compute"] for r in found}


@pytest.mark.parametrize("better", [1, -1])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_search_chooses_by_validation_where_the_test_disagrees(one_by_one, better):
    make = Recorded if one_by_one else searching.Points
    searches = [make(points(7)) for _ in range(SEEDS)]
    # By validation the larger is the better, on the test it is the worse.
    runs = Trained(lambda x, seed: x + 10 * seed, lambda x, seed: -better * x)
    records = contest_runs.search(contest_of(searches, better), "grid", runs, SEEDS)
    for seed in range(SEEDS):
        value = lambda config, seed=seed: chosen(records, config, seed)
        assert value(VALIDATED) == (-better * 7, {7})
        assert value(f"{VALIDATED}, 5 runs") == (-better * 5, {5})
        assert value(ORACLE) == (-better * 1, {7})
        assert value(MEDIAN) == (-better * 4, {1})
        assert value(WORST) == (-better * 7, {1})
        if one_by_one:
            assert searches[seed].told == [x + 10.0 * seed for x in range(1, 8)]
    assert not any("10 runs" in r["config"] for r in records)
    assert sorted((r.seed, dict(r.config)["ratios"]) for r in runs.runs) == sorted(
        (seed, point) for seed in range(SEEDS) for point in points(7)
    )


def test_seeds_of_a_search_train_side_by_side():
    searches = [searching.Points(points(3)) for _ in range(SEEDS)]
    runs = Trained(lambda x, seed: x, lambda x, seed: x)
    contest_runs.search(contest_of(searches), "grid", runs, SEEDS)
    assert [run.seed for run in runs.runs] == [0, 1] * 3


@pytest.mark.parametrize(("runs", "budgets"), [(5, ()), (10, (5,)), (15, (5, 10))])
def test_smaller_budgets_are_those_that_are_smaller(runs, budgets):
    searches = [searching.Points(points(runs))]
    trained = Trained(lambda x, seed: -abs(x - 7), lambda x, seed: x)
    records = contest_runs.search(contest_of(searches), "grid", trained, 1)
    configs = {r["config"] for r in records if "=" not in r["config"]}
    smaller = {f"{VALIDATED}, {n} runs" for n in budgets}
    assert configs == {VALIDATED, ORACLE, MEDIAN, WORST} | smaller
    for n in budgets:
        expected = min(n, 7)
        assert chosen(records, f"{VALIDATED}, {n} runs", 0) == (expected, {n})


def test_a_run_that_diverged_is_not_chosen():
    searches = [searching.Points(points(4))]
    diverged = lambda x, seed: math.nan if x == 4 else x
    runs = Trained(diverged, lambda x, seed: x)
    records = contest_runs.search(contest_of(searches), "grid", runs, 1)
    assert chosen(records, VALIDATED, 0)[0] == 3


def test_the_same_weights_are_described_alike():
    task = SimpleNamespace(auxiliary=NAMES)
    assert contest_runs.config_of(task, (contests.NONE, 0.25)) == "a=0 b=0.25"


def read(records, labels=("grid", "random", "tpe")):
    named = {method: (method, contests.SOFTMAX) for method in labels}
    unseen = ("far", "farther")
    return contest_report.View({"records": records}, named, "score", 1, "near", unseen)


def searched(method, validation, test):
    """Records of the runs of a search, seed by seed."""
    return [
        record(method, metric, value, config=f"a={i}", seed=seed, domain=domain)
        for seed, (of_seed, tests) in enumerate(zip(validation, test, strict=True))
        for i in range(len(of_seed))
        for metric, domain, value in (
            ("validation", None, of_seed[i]),
            ("score", "far", tests[i] - 1),
            ("score", "farther", tests[i] + 1),
        )
    ]


def test_the_curve_of_a_search_is_the_validated_best_of_n():
    rng = np.random.default_rng(0)
    validation, test = rng.normal(size=(2, SEEDS, 6)).round(3)
    for method in ("grid", "random", "tpe"):
        view = read(searched(method, validation, test))
        curve = contest_report.search_curve(view, method)
        if method == "tpe":  # Its runs build on those before.
            expected = [
                [t[np.argmax(v[:n])] for n in range(1, 7)]
                for v, t in zip(validation, test, strict=True)
            ]
        else:
            expected = [
                searching.best_of_n(v, t) for v, t in zip(validation, test, strict=True)
            ]
        np.testing.assert_allclose(curve, np.mean(expected, axis=0), atol=1e-4)
        chosen = [t[np.argmax(v)] for v, t in zip(validation, test, strict=True)]
        np.testing.assert_allclose(curve[-1], np.mean(chosen), atol=1e-4)
    assert contest_report.search_curve(read([]), "grid") is None


def test_a_run_that_diverged_is_not_in_the_curve():
    validation, test = [[math.nan, 1.0, math.nan, 2.0]], [[9.0, 1.0, 8.0, 2.0]]
    curve = contest_report.search_curve(read(searched("tpe", validation, test)), "tpe")
    np.testing.assert_allclose(curve, [9.0, 1.0, 1.0, 2.0])


def test_methods_that_are_not_drawn_leave_an_empty_figure(results, tmp_path):
    result = results["depth"] | {"history": []}
    result["records"] = [
        r | {"method": "rho-1"} for r in result["records"] if r["method"] == "equal"
    ]
    depth_report.figure(result, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


# Methods.


@pytest.mark.usefixtures("nothing_is_trained")
@pytest.mark.parametrize("name", ["depth", "segmentation"])
def test_an_unknown_method_is_refused_before_anything_is_made(name, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        command_line.main([name, "--methods", "magic", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "unknown method 'magic'" in capsys.readouterr().err


def test_a_folder_without_images_is_refused(capsys, tmp_path):
    words = ["segmentation", "--preset", "quick", "--data", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        command_line.main([*words, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "no such folder" in capsys.readouterr().err


def test_gp_without_torch_is_refused_where_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(searching, "has_gp", lambda: False)
    options = Options("depth", ("equal", "gp"), preset="quick", out=tmp_path)
    with pytest.raises(UsageError, match=r"gp needs PyTorch: pip install"):
        contests.check(depth_methods.contest(None), options)
    assert not list(tmp_path.iterdir())


def test_gp_without_torch_is_left_out_otherwise(monkeypatch, capsys):
    names = ("grid", "gp")
    monkeypatch.setattr(searching, "has_gp", lambda: False)
    assert contests.available(names, asked=False) == ("grid",)
    assert "gp is left out" in capsys.readouterr().out
    monkeypatch.setattr(searching, "has_gp", lambda: True)
    assert contests.available(names, asked=False) == names
    assert contests.available(names, asked=True) == names


@pytest.mark.parametrize("module", [depth_methods, segmentation_methods])
def test_every_method_has_a_rule_and_settings_of_it(module):
    contest = module.contest(None)
    for method in contest.methods.values():
        assert method.rule in contest.rules
        if method.search:
            continue
        rule = contest.rules[method.rule]
        config = method.config or {}
        if method.rule == contests.SOFTMAX:
            assert len(config["ratios"]) == len(module.task.AUXILIARY)
        settings(**config)
        rule.configure([config])
    keys = [
        Run(m.rule, 0, settings(**(m.config or {}))).key
        for m in contest.methods.values()
        if not m.search
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("module", [depth_methods, segmentation_methods])
def test_searches_have_the_budget_of_the_paper_or_less(module):
    for budget in (None, 2):
        methods = module.contest(None, budget).methods
        for name in ("grid", "random", "tpe"):
            search = methods[name].search(0)
            expected = len(module.GRID) if name == "grid" else max(contests.BUDGETS)
            assert search.budget == (budget or expected)
        first, other = (methods["random"].search(seed).ask() for seed in range(2))
        assert not set(first) & set(other)


# Ablations, without their runs.


class Made:
    """In place of ``Runs``: what differs from run to run."""

    def __init__(self, task, rules, folder, *, resume, planned):
        assert not resume
        self.task, self.planned, self.runs = task, planned, []
        every_runs.append(self)

    def finish(self, runs, description):
        self.runs += runs
        return [self.one(run) for run in runs]

    def one(self, run):
        config = dict(run.config)
        config["ratios"] = config.get("ratios", (1.0,) * len(self.task.auxiliary))
        assert len(config["ratios"]) == len(self.task.auxiliary)
        relative = np.array([1.0, *config["ratios"]])
        weights = relative / relative.sum()
        value = 50 + run.seed + min(config.get("rho", 10.0), 100.0) / 100
        seen = (depth.task.SEEN, *depth.task.UNSEEN)
        values = {(ablations_methods.METRIC, domain): value for domain in seen}
        values["validation", None] = value
        for i, n in enumerate(self.task.names):
            values[f"weight:{n}", None] = float(weights[i])
            values[f"loss:{n}", None] = 1.0
        curve = {n: [float(w)] * 3 for n, w in zip(self.task.names, weights)}  # noqa: B905
        history = {"step": [0.0, 1.0, 2.0], "weights": curve, "losses": curve}
        return Finished(values, history, 1.0)


every_runs: list[Made] = []


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """What the ablations make of runs that are made up."""
    folder = tmp_path_factory.mktemp("ablations")

    def make(size, extra=0):
        fields = dict.fromkeys(Task.__dataclass_fields__)
        auxiliary = (*depth.task.AUXILIARY, *depth.task.EXTRA[:extra])
        given = {"name": "depth", "primary": depth.task.PRIMARY, "lanes": 3}
        return Task(**fields | given | {"auxiliary": auxiliary}), {}, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations.task, "make", make)
        patch.setattr(ablations, "Runs", Made)
        every_runs.clear()
        words = f"ablations --preset quick --seeds {SEEDS} --out {folder}"
        command_line.main(words.split())
    return folder, list(every_runs), make


def test_ablations_plan_as_many_runs_as_they_train(ablated):
    _, every, _ = ablated
    assert [runs.task.name for runs in every] == ["ablations", "ablations_8_losses"]
    for runs in every:
        assert len(runs.runs) == runs.planned
        assert len({run.key for run in runs.runs}) <= runs.planned


def test_ablations_are_read_from_the_file(ablated, tmp_path):
    folder, *_ = ablated
    result = read_json(folder / "ablations.json")
    table = ablations_report.table(result)
    rows = {row[0]: row[1:] for row in table.rows}
    assert (
        len(rows)
        == len(ablations_methods.VARIANTS) + len(ablations_methods.REPLAYED) + 1
    )
    assert rows["YOTO, library defaults (rho 10)"][1] == "50.6 ± 0.7"
    assert rows["YOTO, library defaults (rho 10)"][2:4] == ["", ""]
    # Every seed is as much worse as the others.
    assert rows["without both (rho 0)"][2:4] == ["-0.1 ± 0.0", "worse"]
    assert rows["exp(mu), not normalised"][3] == ""
    assert rows["equal weights"][4] == "0.33 / 0.33 / 0.33"
    assert rows["constant, YOTO's final weights"][4] == "0.83 / 0.083 / 0.083"
    counts = ablations_report.tables(result)["ablations-losses"]
    assert [row[0] for row in counts.rows] == ["2", "8"]
    assert "collapse" in counts.rows[1][-1]
    written = (folder / "ablations.png").read_bytes()
    ablations_report.figure(result, Path(tmp_path / "again.png"))
    assert (tmp_path / "again.png").read_bytes() == written


def test_ablations_have_parts(ablated, monkeypatch, tmp_path):
    monkeypatch.setattr(ablations, "Runs", Made)
    monkeypatch.setattr(ablations.task, "make", ablated[2])
    words = f"ablations --seeds {SEEDS} --methods equal,aligned --out {tmp_path}"
    command_line.main(words.split())
    result = read_json(tmp_path / "ablations.json")
    assert {r["method"] for r in result["records"]} == {"equal", "K aligned"}
    numbers = ["auxiliary=4", "auxiliary=6", "auxiliary=8", "auxiliary=2"]
    assert ablations_report.configs(result, "K aligned") == numbers
    assert not list(tmp_path.glob("*.png"))


def test_the_range_test_of_two_points_is_the_paired_t_test():
    found = np.random.default_rng(0).normal(size=(2, 6)) + np.array([[0.0], [0.8]])
    expected = scipy.stats.ttest_rel(*found).pvalue
    np.testing.assert_allclose(contest_report.range_test(found), expected, rtol=1e-6)


def test_the_range_test_does_not_see_what_seeds_have_in_common():
    rng = np.random.default_rng(0)
    found = rng.normal(size=(5, 3))
    shifted = found + 100 * rng.normal(size=3)
    np.testing.assert_allclose(
        contest_report.range_test(shifted), contest_report.range_test(found), rtol=1e-6
    )
