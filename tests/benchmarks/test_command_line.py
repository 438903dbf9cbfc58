"""The benchmarks run, their records are complete, and pages follow from records."""

import importlib.metadata
import json
import pathlib
import shlex
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import yoto_jax as yoto
from benchmarks import __main__ as command_line
from benchmarks.harness import durations, merging
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.provenance import meta, refuse_miscompiling
from benchmarks.harness.results import read_json, record, select, values
from benchmarks.tasks.digits import methods as digits_methods
from benchmarks.tasks.digits import report as digits_report
from benchmarks.tasks.digits import run as digits
from benchmarks.tasks.digits import task
from benchmarks.tasks.overhead import methods as overhead_methods
from benchmarks.tasks.overhead import report as overhead_report
from benchmarks.tasks.overhead import run as overhead
from benchmarks.tasks.overhead import weighting_costs
from benchmarks.tasks.pinn import methods as pinn_methods
from benchmarks.tasks.pretraining import run as pretraining
from benchmarks.tasks.properties import report as properties_report
from benchmarks.tasks.properties import run as properties
from benchmarks.tasks.rho import methods as rho_methods
from benchmarks.tasks.rho import run as rho
from benchmarks.tasks.robustness import task as robustness
from benchmarks.tasks.scaling import measurements
from benchmarks.tasks.toy import run as toy

ROOT = pathlib.Path(__file__).parent.parent.parent
SEEDS, STEPS = 2, 10  # throughout, to share compiled programs

ALIKE = (*digits_methods.CONDITIONAL[1:], "nash_mtl")
ONE_OF_A_KIND = [method for method in digits.METHODS if method not in ALIKE]
ROWS = [row for row in digits_methods.ROWS if row[0] in ONE_OF_A_KIND]

pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")


@pytest.fixture(scope="module")
def data():
    return task.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the digits write of one method of each kind."""
    folder = tmp_path_factory.mktemp("results")
    methods = f"--methods {','.join(ONE_OF_A_KIND)}"
    with jax.numpy_rank_promotion("allow"):
        size = f"--preset quick --seeds {SEEDS} --steps {STEPS} {methods}"
        command_line.main(f"digits {size} --out {folder}".split())
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return read_json(folder / "digits.json")


# Command line.


def test_without_a_name_the_benchmarks_are_listed(capsys):
    command_line.main([])
    listed = capsys.readouterr().out
    for name, what in command_line.BENCHMARKS.items():
        assert name in listed
        assert what in listed


@pytest.mark.parametrize("name", command_line.BENCHMARKS)
def test_every_benchmark_has_a_table_and_a_main(name):
    assert callable(command_line.load(name).main)
    assert callable(command_line.load(name, "report").table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing", "invalid choice"),
        ("digits --seeds 0", "positive integer"),
        ("digits --seeds two", "positive integer"),
        ("digits --steps -5", "positive integer"),
        ("digits --preset huge", "invalid choice"),
        ("digits --data nowhere", "no folder 'nowhere'"),
        ("digits --data .", "reads no data folder"),
        ("digits --methods yoto,magic", "unknown method 'magic'"),
        ("rho --methods adam", "unknown method 'adam'"),
    ],
)
def test_bad_options_exit_with_2_and_say_why(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_names_may_have_commas_in_them():
    rows = ("equal", "search", "search, GP", "aligned_mtl, every 10")
    given = "search,search, GP,aligned_mtl, every 10"
    parsed = command_line.parser().parse_args(["frontier", "--methods", given])
    options = Options("frontier", methods=parsed.methods)
    assert options.choose(rows) == rows[1:]
    assert Options("frontier").choose(rows) == rows
    assert Options("frontier").choose(rows, quick=rows[:1]) == rows
    assert Options("frontier", preset="quick").choose(rows, quick=rows[:1]) == rows[:1]
    assert options.choose(rows, quick=rows[:1]) == rows[1:]
    with pytest.raises(UsageError, match="unknown method 'every 3':"):
        Options("frontier", methods=("equal", "every 3")).choose(rows)
    words = shlex.split(Options("frontier", methods=rows[2:]).command)
    assert words[words.index("--methods") + 1] == ",".join(rows[2:])


def test_a_jaxlib_that_miscompiles_is_refused_on_a_cpu(monkeypatch, capsys, tmp_path):
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda package: "0.10.2" if package == "jaxlib" else installed(package),
    )
    with pytest.raises(SystemExit) as stop:
        command_line.main(f"toy --preset quick --out {tmp_path}".split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "jaxlib 0.10.2" in message
    assert "pip install 'jax!=0.10.*'" in message
    assert not list(tmp_path.iterdir())
    refuse_miscompiling("gpu")  # right there


# Stored results.


@pytest.mark.parametrize(
    "path",
    sorted(command_line.RESULTS.glob("*.json")),
    ids=lambda path: path.stem,
)
def test_no_stored_result_rests_on_miscompiled_gradients(path):
    name = merging.benchmark_of(path.stem, tuple(command_line.BENCHMARKS))
    assert merging.complaints(name, read_json(path)) == []


def measured(jaxlib, values, seeds=3):
    """A result of the depth task: for each method, a value for each seed."""
    versions = {"jaxlib": jaxlib}
    meta = {"platform": "cpu", "versions": versions, "seeds": seeds, "steps": 800}
    meta |= dict.fromkeys(("command", "commit", "date"), jaxlib)
    records = [
        record(method, "delta1", value, seed=seed, domain="both")
        for method, of_method in values.items()
        for seed, value in enumerate(of_method[:seeds])
    ]
    return {"meta": meta, "records": records}


OLD = measured("0.10.2", {"equal": (1, 2, 3), "yoto": (4, 5, 6), "grap": (7, 8, 9)})


def test_results_of_a_jaxlib_that_miscompiles_are_complained_about():
    assert merging.complaints("depth", OLD) == ["jaxlib 0.10.2 computed it"]
    later = measured("0.10.1", {"grap": (7, 8, 9)})
    assert merging.complaints("depth", later) == []
    later["records"].append(record("grap", "CD", 1.0, seed=0, domain="both"))
    assert merging.complaints("depth", later) == ["jaxlib 0.10.1 computed CD"]
    later["meta"]["versions"]["jaxlib"] = "0.9.2"
    assert merging.complaints("depth", later) == []


def test_what_is_measured_again_replaces_and_the_rest_is_marked_as_kept():
    now = measured("0.10.1", {"equal": (1, 2, 6), "grap": (4, 4, 4)})
    merged = merging.merge("depth", OLD, now)
    assert values(merged["records"], method="grap").tolist() == [4, 4, 4]
    assert values(merged["records"], method="yoto").tolist() == [4, 5, 6]
    assert merged["meta"]["versions"] == {"jaxlib": "0.10.1"}
    kept = merged["meta"]["kept"]
    assert kept["methods"] == ["yoto"]
    assert kept["versions"] == {"jaxlib": "0.10.2"}
    assert kept["checked"]["methods"] == ["equal"]
    difference = {"runs": 3, "run": 3, "mean": 1, "sd of seeds": 1}
    assert kept["checked"]["differences"] == {"delta1": difference}
    assert merging.complaints("depth", merged) == []
    del kept["checked"]
    assert merging.complaints("depth", merged) == ["what is kept was not compared"]
    kept["methods"].append("grap")
    assert "grap looks at gradients, kept" in merging.complaints("depth", merged)


def test_methods_that_look_at_gradients_can_be_dropped():
    now = measured("0.10.1", {"equal": (1,)}, seeds=1)
    merged = merging.merge("depth", OLD, now, drop=True)
    assert {r["method"] for r in merged["records"]} == {"equal", "yoto"}
    assert merged["meta"]["dropped"] == ["aligned", "conditional-grap", "grap"]
    assert merging.complaints("depth", merged) == []


def test_a_sample_of_fewer_seeds_is_compared_and_replaces_nothing():
    before = measured("0.10.2", {"equal": (1, 2, 3), "yoto": (4, 5, 6)})
    merged = merging.merge(
        "depth", before, measured("0.10.1", {"equal": (1,)}, seeds=1)
    )
    assert merged["records"] == before["records"]
    assert merged["meta"]["kept"]["methods"] == ["equal", "yoto"]
    assert merged["meta"]["seeds"] == 3


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (measured("0.10.1", {"equal": (1, 2, 3)}), "without grap"),
        (measured("0.10.1", {"grap": (1, 2, 3)}), "without per-loss gradients"),
        (measured("0.10.1", {"equal": (1, 2, 3)}, seeds=1), "without grap"),
        ({**OLD, "meta": OLD["meta"] | {"steps": 8}}, "other settings"),
        (OLD, "with all of its methods"),
    ],
)
def test_what_cannot_be_merged_says_so(now, message):
    with pytest.raises(UsageError, match=message):
        merging.merge("depth", OLD, now)


def test_methods_that_look_at_gradients_are_known():
    needs = lambda make, *given: make(*given).needs != ("losses",)
    found = {
        m
        for m, (_, _, make) in pinn_methods.METHODS.items()
        if needs(make, jnp.ones(2))
    }
    assert found == set(merging.PER_LOSS_GRADIENTS["pinn"])
    ones = jnp.ones(3)
    learned = pretraining.LEARNED.items()
    found = {name for name, method in learned if needs(method.weighting, ones)}
    assert found == set(merging.PER_LOSS_GRADIENTS["pretraining"])


# Data and corruptions.


def test_the_split_is_disjoint_and_stratified():
    labels = np.repeat(np.arange(10), 100)
    parts = task.split(labels)
    assert [len(part) for part in parts] == [400, 100, 500]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    for part in parts:
        np.testing.assert_array_equal(np.bincount(labels[part]), len(part) / 10)


def test_all_digits_are_used_once(data):
    assert sum(len(part.labels) for part in data) == 1797


def test_corruption_of_strength_0_is_the_identity(data):
    images = data.test.images[:20]
    unchanged = task.corrupt(jax.random.key(0), images, jnp.zeros((20, 5)))
    np.testing.assert_allclose(unchanged, images, atol=1e-6)


@pytest.mark.parametrize("i", range(5), ids=task.CORRUPTIONS)
def test_each_corruption_changes_images_the_more_the_stronger(i, data):
    images = data.test.images[:200]
    changes = [
        jnp.mean(jnp.abs(task.corrupt(jax.random.key(0), images, s) - images))
        for s in jnp.linspace(0, 1.3, 4)[:, None, None]
        * jnp.eye(5)[i]
        * jnp.ones((200, 1))
    ]
    assert (np.diff(changes) > 0).all()


def test_evaluation_is_the_same_every_time(data):
    first, second = (task.test_domains(data.test) for _ in range(2))
    for domain, part in first.items():
        np.testing.assert_array_equal(part.images, second[domain].images)


# Training.


def train(data, configurations):
    return task.train(
        data.train, digits.optimizer(STEPS), configurations, STEPS, "test"
    )


def test_a_sweep_trains_as_a_single_run_does(data):
    grid = jnp.array(task.GRID)
    sweep = train(data, task.fixed(grid, SEEDS))
    single = train(data, task.fixed(grid[5:6], SEEDS))
    jax.tree.map(
        lambda many, one: np.testing.assert_allclose(many[:, 5], one[:, 0], atol=1e-4),
        (sweep.model, sweep.losses),
        (single.model, single.losses),
    )


def test_fixed_weights_stay_and_learned_ones_move(data):
    fixed = train(data, task.fixed(jnp.full((1, 2), 0.1), SEEDS))
    learned = train(data, task.learned([(0.1, 1.0)], SEEDS))
    for name in task.LOSSES:
        assert np.ptp(fixed.weights[name]) == 0
        assert np.ptp(learned.weights[name]) > 0
        np.testing.assert_array_equal(
            fixed.losses[name][..., 0], learned.losses[name][..., 0]
        )


# Records, and what is made of them.


def test_records_have_the_schema(result):
    fields = {
        "method": str,
        "config": str,
        "seed": int | None,
        "domain": str | None,
        "unseen": bool,
        "metric": str,
        "value": float,
        "compute": int | float,
    }
    for found in result["records"]:
        assert found.keys() == fields.keys()
        for field, kind in fields.items():
            assert isinstance(found[field], kind), found


def test_meta_names_no_folder_of_this_machine(result, folder):
    assert {"command", "commit", "date", "device", "versions"} <= result["meta"].keys()
    assert str(folder.parent) not in json.dumps(result["meta"])
    assert result["meta"]["command"].startswith("python -m benchmarks digits")


@pytest.mark.parametrize(("method", "config"), ROWS)
def test_every_method_has_every_seed_and_domain(method, config, result):
    for domain in ("clean", *task.UNSEEN):
        records = select(
            result["records"], method=method, domain=domain, metric="accuracy"
        )
        if config is not None:
            records = select(records, config=config)
        runs = 9 if method in digits.SEARCHES and config is None else 1
        assert [r["seed"] for r in records] == list(range(SEEDS)) * runs
        assert all(r["unseen"] == (domain != "clean") for r in records)
        assert all(0 <= r["value"] <= 1 for r in records)


def test_a_search_pays_for_all_its_runs(result):
    for method in digits.SEARCHES:
        chosen = select(result["records"], method=method, config=digits.VALIDATED)
        assert {r["compute"] for r in chosen} == {9}


def test_validation_chooses_and_test_does_not(result):
    grid = select(result["records"], method="grid", seed=0)
    runs = [r for r in grid if "=" in r["config"]]
    validation = values(runs, domain="validation stylised")
    configs = [r["config"] for r in select(runs, domain="clean")]
    best = configs[int(np.argmax(validation))]
    for domain in ("clean", *task.UNSEEN):
        np.testing.assert_array_equal(
            values(grid, config=digits.VALIDATED, domain=domain),
            values(grid, config=best, domain=domain),
        )


def test_best_of_n_of_all_is_the_validated_best(result):
    curve = digits_report.best_of_n(result, "random")
    records = select(result["records"], method="random", config=digits.VALIDATED)
    expected = np.mean([values(records, domain=d) for d in task.UNSEEN])
    np.testing.assert_allclose(curve[-1], expected, rtol=1e-6)


def test_sentences_follow_from_the_records(result):
    assert len(digits_report.conclusions(result)) == 15
    better = json.loads(json.dumps(result))
    for found in better["records"]:
        if found["method"] == "yoto" and found["unseen"]:
            found["value"] = 1.0 + 0.001 * found["seed"]
    assert "YOTO is ahead" in digits_report.conclusions(better)[0]


def test_figure_is_redrawn_from_the_file(folder, result):
    written = (folder / "digits.png").read_bytes()
    digits_report.figure(result, folder / "again.png")
    assert (folder / "again.png").read_bytes() == written


def test_one_seed_and_one_method_are_enough(tmp_path):
    options = Options("digits", ("equal",), seeds=1, steps=2, out=tmp_path)
    digits.main(options)
    table = digits_report.table(read_json(tmp_path / "digits.json"))
    assert len(table.rows) == 1


def test_rho_writes_its_results(tmp_path):
    options = Options("rho", ("sgdw",), seeds=1, steps=2, preset="quick", out=tmp_path)
    rho.main(options)
    result = read_json(tmp_path / "rho.json")
    assert (tmp_path / "rho.png").is_file()
    learned = [r for r in result["records"] if "rho=" in r["config"]]
    assert len(learned) == len(rho.QUICK_RHOS) * (len(rho_methods.EPSILONS) + 1) * 5
    assert not any(r["unseen"] for r in result["records"])


def test_tables_are_filled_in_once(folder, tmp_path):
    page = tmp_path / "page.md"
    marks = [
        f"<!-- {n}:begin -->\n<!-- {n}:end -->" for n in ("digits", "digits-summary")
    ]
    page.write_text("\n".join(["Before", *marks, "After\n"]))
    command_line.update_tables((page,), folder)
    once = page.read_text()
    assert once.startswith("Before\n")
    assert once.endswith("After\n")
    assert once.count("| grid, best by validation |") == 2
    command_line.update_tables((page,), folder)
    assert page.read_text() == once


# What weightings cost, and what they promise.


@pytest.fixture(scope="module")
def overhead_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overhead")
    quick = f"--preset quick --steps 1 --out {folder}"
    with jax.numpy_rank_promotion("allow"):
        command_line.main(f"overhead {quick} --methods weightings".split())
        command_line.main(f"overhead {quick} --methods solvers".split())
    return folder


@pytest.mark.slow
def test_sections_of_the_overhead_are_measured_apart(overhead_folder):
    result = read_json(overhead_folder / "overhead.json")
    found = {overhead.section(r) for r in result["records"]}
    assert found == {"weightings", "solvers"}
    tables = overhead_report.tables(result)
    assert set(tables) == {"overhead-weightings", "overhead-solvers"}
    rows = {row[0]: row for row in tables["overhead-weightings"].rows}
    assert float(rows["upgrad"][1].split()[0]) > 0
    assert rows["fixed"][1].endswith("ms")
    assert result["meta"]["before"]["command"].endswith(str(overhead_folder.name))


@pytest.mark.slow
def test_the_overhead_goes_on_where_it_stopped(overhead_folder, monkeypatch, capsys):
    before = read_json(overhead_folder / "overhead.json")
    monkeypatch.setattr(weighting_costs, "solver_times", lambda *_: 1 / 0)
    quick = f"--preset quick --steps 1 --out {overhead_folder}"
    command_line.main(f"overhead {quick} --methods solvers --resume".split())
    after = read_json(overhead_folder / "overhead.json")
    assert after["records"] == before["records"]
    assert "part 1 of 3: solvers, nash_mtl, 2 sizes" in capsys.readouterr().out


def test_what_the_overhead_did_not_measure_stays(tmp_path):
    path = tmp_path / "overhead.json"
    assert overhead.merged(path, overhead.USUAL, {}, []) == ({}, [])
    many = record("famo", "many: ratio", 2.0, config="many losses, K=200")
    old = [record("yoto", "import ms", 30.0), many]
    about = {"command": "before", "pairs": 7}
    path.write_text(json.dumps({"meta": about, "records": old}))
    new = [record("yoto", "import ms", 40.0)]
    about, records = overhead.merged(path, overhead.USUAL, {}, new)
    assert records == [many, *new]
    assert about["before"]["command"] == "before"
    assert about[overhead_methods.MANY_PAIRS] == 7
    assert overhead.merged(path, overhead.SECTIONS, {}, new) == ({}, new)


def test_without_torchjd_its_section_stays_as_it_was_measured(monkeypatch):
    asked = lambda *names: Options("overhead", names or None)
    monkeypatch.setattr(overhead.peers, "available", lambda: True)
    assert overhead.chosen(asked()) == overhead.USUAL
    monkeypatch.setattr(overhead.peers, "available", lambda: False)
    assert overhead.chosen(asked()) == overhead.USUAL[:-1] != overhead.USUAL
    assert overhead.chosen(asked("solvers")) == ("solvers",)
    with pytest.raises(UsageError, match="peers needs PyTorch and TorchJD"):
        overhead.chosen(asked("solvers", "peers"))


def test_each_weighting_is_timed_with_a_model():
    kinds = [weighting_costs.kinds(name).values() for name in weighting_costs.SHARED]
    timed = {arm for of_model in kinds for arms in of_model for arm in arms}
    assert timed == set(overhead_methods.ARMS)


def test_tables_of_costs_show_no_minus_zero_and_name_versions_that_are_known():
    assert overhead_report._number(-0.04, 1) == "0.0"
    assert overhead_report._number(-1234.5, 1) == "-1,234.5"
    result = read_json(ROOT / "benchmarks" / "results" / "overhead.json")
    plain = {k: v for k, v in result["meta"].items() if k not in ("torch", "torchjd")}
    for versions in ({}, {"torch": "2.9.1", "torchjd": "0.17.0"}):
        result["meta"] = plain | versions
        caption = overhead_report.peer_table(result).caption
        named = " PyTorch 2.9.1, TorchJD 0.17.0." if versions else ""
        assert caption.endswith(f"the same framework.{named}")


@pytest.mark.parametrize(
    ("benchmark", "stored_in", "names"),
    [
        (toy, "toy", toy.METHODS),
        (robustness, "robustness", robustness.WEIGHTINGS),
        (overhead_methods, "overhead", overhead_methods.MEASURED),
        (measurements, "scaling", measurements.WEIGHTINGS),
        (properties, "properties", properties.METHODS),
    ],
)
def test_benchmarks_take_the_weightings_of_the_registry(benchmark, stored_in, names):
    known = set(yoto.weightings.methods())
    left_out = set(getattr(benchmark, "LEFT_OUT", ()))
    assert left_out <= known
    taking_part = {name.removeprefix("weightings.") for name in names}
    if benchmark is properties:
        left_out = {name for name in known if name not in properties.METHODS}
    assert known - left_out <= taking_part
    assert not left_out & taking_part
    result = read_json(ROOT / "benchmarks" / "results" / f"{stored_in}.json")
    assert known & {r["method"] for r in result["records"]} <= taking_part


def test_properties_have_a_row_for_each_method(tmp_path):
    command_line.main(f"properties --methods equal,mgda --out {tmp_path}".split())
    result = read_json(tmp_path / "properties.json")
    columns, rows, _ = properties_report.table(result)
    assert [row[0] for row in rows] == ["`equal`", "`mgda`"]
    assert set(rows[0][1:]) == {"yes", "-"}
    held = dict(zip(columns, rows[1], strict=True))
    assert held["permutation equivariant"] == "yes"
    assert held["linear under scaling"] == "-"


def test_processor_time_of_the_quick_presets_is_measured_and_listed(
    tmp_path, monkeypatch
):
    asked = []

    def run(command, check):
        asked.append(command[3:6])
        return subprocess.CompletedProcess(command, command[3] == "pinn")

    monkeypatch.setattr(durations.subprocess, "run", run)
    path = tmp_path / "durations.json"
    assert durations.read(path) == {}
    monkeypatch.setattr(command_line, "DURATIONS", path)
    with pytest.raises(SystemExit):  # one fails, and the others are written
        command_line.main(["durations", "toy", "pinn", "rho"])
    assert asked == [[name, "--preset", "quick"] for name in ("toy", "pinn", "rho")]
    assert durations.read(path) == {"toy": 0, "rho": 0}
    rows = {row[0]: row[2] for row in command_line.index(tmp_path).rows}
    assert (rows["`toy`"], rows["`pinn`"]) == ("0 s", "")
    with pytest.raises(SystemExit):
        command_line.main(["durations", "tox"])
    assert len(asked) == 3
    with pytest.raises(SystemExit):
        command_line.main(["durations"])
    assert [name for name, *_ in asked[3:]] == [*command_line.BENCHMARKS]


def test_a_result_knows_how_long_it_took():
    assert meta(Options("toy"))["seconds"] < 5
    assert meta(Options("toy", resume=True))["seconds"] is None
