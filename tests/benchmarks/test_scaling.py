"""The scaling benchmark: equality, traffic, memory, and a killed process."""

import functools
import json

import jax
import numpy as np
import pytest

from benchmarks import distributed
from benchmarks.harness.options import Options
from benchmarks.harness.results import record
from benchmarks.tasks.scaling import collectives, processes, report, task
from benchmarks.tasks.scaling import measurements as runs
from benchmarks.tasks.scaling import run as scaling

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices"),
    pytest.mark.usefixtures("any_rank"),
]


@pytest.fixture(scope="module")
def drawn():
    return task.batches(50, 128)


@functools.cache
def method(name):
    return task.METHODS[name]()


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("yoto", "upgrad")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in task.COMPARED
    ],
)
def test_fifty_steps_on_eight_devices_are_those_on_one(name, drawn):
    reference = task.run(task.one_device(method(name)), method(name), drawn)
    assert reference.weights.shape[0] == 50
    assert np.abs(reference.weights[-1] - reference.weights[0]).max() > 1e-3
    ways = task.WAYS if name == "yoto" else ("shard_map", "jit, Explicit")
    for way in ways:
        made = task.WAYS[way](method(name), jax.devices()[:8])
        outcome = task.run(made, method(name), drawn)
        assert outcome.identical, way
        assert task.difference(outcome, reference) < runs.LIMIT, way


def test_replicas_that_differ_are_seen():
    mesh = task.mesh_of(jax.devices(), "Auto")
    place, _ = task.on_mesh(mesh)
    whole = place(np.arange(3.0))
    parts = [np.arange(3.0) + k for k in range(8)]
    shards = [
        jax.device_put(x, d) for x, d in zip(parts, mesh.devices.flat, strict=True)
    ]
    torn = jax.make_array_from_single_device_arrays((3,), whole.sharding, shards)
    assert (task.copies(whole) == np.arange(3.0)).all()
    assert not (task.copies(torn) == task.copies(torn)[0]).all()


HLO = """
  %a = f32[3]{0} all-reduce(%x), channel_id=1
  %b = (f32[4,2]{1,0}, bf16[8]{0}) all-reduce(%y, %z), channel_id=2
  %c = f32[16]{0} all-gather-start(%w), dimensions={0}
  ROOT %d = f32[] add(%all-reduce.1, %x)
"""


class Program:
    def as_text(self):
        return HLO


def test_the_traffic_is_what_the_program_says():
    traffic = collectives.traffic(Program())
    expected = (("all-reduce", 12), ("all-reduce", 48), ("all-gather", 64))
    assert traffic == collectives.Traffic(3, 124, expected)


@pytest.mark.usefixtures("full_compilation")
def test_loss_driven_weightings_add_one_all_reduce_of_as_many_numbers_as_losses():
    sent = lambda method: runs.sent(method, "shard_map", jax.devices())
    plain = sent(method("plain"))
    assert plain.count == 1
    of_yoto = collectives.added(sent(method("yoto")), plain)
    assert (of_yoto.count, of_yoto.bytes) == (0, 2 * 4)  # two logits are learned
    of_famo = collectives.added(sent(method("famo")), plain)
    assert (of_famo.count, of_famo.operations) == (1, (("all-reduce", 3 * 4),))
    of_upgrad = collectives.added(sent(method("upgrad")), plain)
    assert of_upgrad.count == 1
    assert of_upgrad.bytes == (3 + 9) * 4  # losses and their Gramian


@pytest.mark.usefixtures("full_compilation")
def test_memory_is_what_the_guide_says():
    records = runs.measure_memory()
    value = lambda metric, config="": next(
        r["value"] for r in records if (r["metric"], r["config"]) == (metric, config)
    )
    assert 1.0 <= value("ratio of peaks") < 1.005
    for config in {r["config"] for r in records} - {""}:
        promised = value("promised bytes", config)
        assert value("extra bytes", config) < 1.15 * promised, config


def test_two_processes_are_one(tmp_path, drawn):
    runs.together(2, 1, runs.worker_arguments(tmp_path, "yoto", steps=4))
    reports = runs.read_reports(tmp_path, 2)
    assert [r["processes"] for r in reports] == [2, 2]
    assert reports[0]["digest"] == reports[1]["digest"]
    distributed.main(runs.worker_arguments(tmp_path / "alone", "yoto", steps=4))
    ours = runs.final_arrays(tmp_path, 2)[1]
    alone = runs.final_arrays(tmp_path / "alone", 1)[0]
    pairs = zip(ours, alone, strict=True)
    assert max(task.distance(a, b) for a, b in pairs) < runs.LIMIT


@pytest.mark.slow
def test_a_killed_process_is_noticed_and_the_run_continues_bit_for_bit(tmp_path):
    arguments = functools.partial(runs.worker_arguments, method="yoto", steps=9)
    runs.together(2, 1, arguments(folder=tmp_path / "whole", every=3))
    expected = runs.read_reports(tmp_path / "whole", 2)
    assert expected[0]["digest"] == expected[1]["digest"]

    broken = arguments(folder=tmp_path / "broken", every=3)
    running = processes.start(2, 1, broken, ["--kill-at", "8"])
    killed, other = processes.wait(running, timeout=120)
    assert killed.status == -9
    assert other.status not in (0, -9)
    assert runs.is_clear(other.output)
    runs.together(2, 1, [*broken, "--resume"])
    reports = runs.read_reports(tmp_path / "broken", 2)
    assert {r["digest"] for r in reports} == {expected[0]["digest"]}
    assert reports[0]["first"] % 3 == 0
    assert reports[0]["steps"] == 9


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    arguments = runs.worker_arguments(tmp_path, "yoto", steps=3, every=2)
    distributed.main(arguments)
    first = runs.read_reports(tmp_path, 1)
    distributed.main([*arguments, "--resume"])  # from step 2, to the same end
    assert runs.read_reports(tmp_path, 1)[0]["digest"] == first[0]["digest"]
    shorter = runs.worker_arguments(tmp_path, "yoto", steps=2, every=2)
    distributed.main([*shorter, "--resume"])
    assert "nothing to do: the run is at step 2 of 2" in capsys.readouterr().err


def test_an_error_of_this_process_alone_is_its_own():
    assert distributed.speaks_of_others("Gloo AllReduce failed: Connection closed")
    assert not distributed.speaks_of_others("RESOURCE_EXHAUSTED: out of memory")


def test_soaking_compiles_once_and_stays_finite():
    records = runs.soak(scaling.SIZES["quick"])
    values = {r["metric"]: r["value"] for r in records}
    assert values["compilations"] == 1
    assert values["finite"] == 1
    assert sum(values[f"weight:{name}"] for name in ("ce", "invariance")) < 1


def result(*records):
    size = scaling.SIZES["quick"]._asdict()
    meta = {"limit": runs.LIMIT, "platform": "cpu", "cpu_count": 2, **size}
    return {"meta": meta, "records": list(records)}


def test_what_is_said_follows_the_numbers():
    stored = result(
        record("yoto", "difference", 3e-7, config="pmap", domain="8"),
        record("yoto", "identical", 0.0, config="pmap", domain="8"),
        record("crash", "steps lost", 4),
        record("crash", "every", 5),
        record("crash", "bit for bit", 1.0),
    )
    said = report.conclusions(stored)
    assert "at most 3.0e-07" in said[0]
    assert "NOT identical" in said[0]
    assert said[1].startswith("Of 1 killed runs 1 continued bit for bit; at most 4")


def test_the_figure_shows_what_was_measured(tmp_path):
    timed = [
        record(name, f"of one device{part}", 1.0, config="devices=2")
        for name in ("plain", "yoto")
        for part in ("", ", lower quartile", ", upper quartile")
    ]
    sent = [record(n, "bytes", 8.0, config="shard_map") for n in ("plain", "famo")]
    path = tmp_path / "scaling.png"
    report.figure(result(*timed, *sent), path)
    assert path.stat().st_size > 10_000


def test_the_model_of_an_all_reduce():
    tiny, large = report.all_reduce_seconds(4), report.all_reduce_seconds(1e9)
    assert tiny == pytest.approx(2 * 10 * report.LATENCY, rel=1e-3)  # a tree
    assert large == pytest.approx(2 * 1e9 / report.BANDWIDTH, rel=0.3)  # a ring
    rows = {name: share for name, _, share in report.model_table(result()).rows}
    assert rows["plain"] == "+0.00 %"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_it_writes_its_results(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "TIMED", ("plain", "yoto"))
    monkeypatch.setattr(runs, "WEIGHTINGS", {"famo": runs.WEIGHTINGS["famo"]})
    monkeypatch.setattr(runs, "SAMPLE", ("plain", "yoto"))
    methods = ("collectives", "speed")
    options = Options("scaling", preset="quick", methods=methods, out=tmp_path)
    scaling.main(options)
    stored = json.loads((tmp_path / "scaling.json").read_text())
    assert {r["method"] for r in stored["records"]} >= {"plain", "yoto"}
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert report.table(stored).rows[0][0] == "plain"
    assert len(report.tables(stored)["scaling-speed"].rows) == 2
