"""What ``--resume`` relies on: finished parts come back, unfinished ones are redone."""

import threading
import time
from concurrent import futures

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import units as storing
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.results import read_json, record
from benchmarks.harness.units import Units
from benchmarks.tasks.toy import run as toy


def units_in(folder, *, resume=True, seeds=3, **settings):
    options = Options("toy", seeds=seeds, out=folder, resume=resume)
    return Units(options, **{"steps": 5, **settings})


def never():
    raise AssertionError("this part is done")


RECORD = record("equal", "error", 0.5, seed=1)
OUTCOMES = {
    "numbers": [1, 2.5, float("nan"), float("-inf"), None, True, "text"],
    "records": [RECORD, RECORD],
    "small": 1e-300,
    "exact": 0.1 + 0.2,
    "tuples": {"a": [[1, 2], [3, [4]]]},
    "keys": {9: "nine", 25: {"x": 1}},
    "reserved": {"array": 0},
    "items": {"items": [], "array": 1},
    "empty": {},
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "arrays": {"points": {9: {"ce": np.eye(2)}}, "of jax": [jnp.ones(3, jnp.int32)]},
    "scalar array": np.array(3.0),
    "none at all": np.zeros((0, 4)),
    "unicode": "é\u2028\r\n\x0b",
}


def assert_same(one, other):
    if isinstance(other, dict):
        assert list(one) == list(other)
        for key in other:
            assert_same(one[key], other[key])
    elif isinstance(other, list | tuple):
        assert isinstance(one, list)
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            assert_same(x, y)
    elif hasattr(other, "dtype"):
        assert type(one) is np.ndarray
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    else:
        assert type(one) is type(other)
        assert repr(one) == repr(other)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled")
    units = units_in(folder, resume=False)
    for name, outcome in OUTCOMES.items():
        assert_same(units.do(name, lambda outcome=outcome: outcome), outcome)
    return folder


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes_come_back(name, filled):
    before = (filled / "toy.units.jsonl").read_bytes()
    assert_same(units_in(filled).do(name, never), OUTCOMES[name])
    assert (filled / "toy.units.jsonl").read_bytes() == before


def test_a_part_is_done_once_and_is_on_the_disk_when_it_is(tmp_path):
    units = units_in(tmp_path, resume=False)
    assert units.do("a", lambda: {"x": (1, 2)}) == {"x": [1, 2]}
    assert units.do("a", never) == {"x": [1, 2]}
    assert units_in(tmp_path).do("a", never) == {"x": [1, 2]}


def test_without_resuming_all_starts_afresh(tmp_path):
    units_in(tmp_path, resume=False).do("a", lambda: np.ones(2))
    units = units_in(tmp_path, resume=False)
    assert not list((tmp_path / "toy.units").iterdir())
    assert units.do("a", lambda: 2) == 2
    assert units_in(tmp_path).do("a", never) == 2


def test_resuming_where_there_is_nothing_starts(tmp_path):
    assert units_in(tmp_path / "new").do("a", lambda: 1) == 1
    assert units_in(tmp_path / "new").do("a", never) == 1


def test_a_line_cut_off_anywhere_is_done_again(tmp_path):
    path = tmp_path / "toy.units.jsonl"
    units = units_in(tmp_path, resume=False)
    units.do("first", lambda: [1])
    before = path.read_bytes()
    units.do("second", lambda: {"x": "é", "y": [2.5]})
    whole = path.read_bytes()
    assert len(whole) > len(before) + 40
    for written in range(len(before), len(whole)):
        path.write_bytes(whole[:written])
        units = units_in(tmp_path)
        assert path.read_bytes() == before
        assert units.do("first", never) == [1]
        assert units.do("second", lambda: 3) == 3
        assert units_in(tmp_path).do("second", never) == 3


def test_a_header_cut_off_anywhere_is_a_fresh_start(tmp_path):
    path = tmp_path / "toy.units.jsonl"
    units_in(tmp_path, resume=False)
    header = path.read_bytes()
    for written in range(len(header)):
        path.write_bytes(header[:written])
        assert units_in(tmp_path).do("a", lambda: 1) == 1
        assert path.read_bytes().startswith(header)


@pytest.mark.parametrize("how", ["missing", "cut off", "foreign", "empty"])
def test_a_part_whose_arrays_are_spoilt_is_done_again(how, tmp_path):
    units = units_in(tmp_path, resume=False)
    units.do("a", lambda: {"x": np.ones(100)})
    units.do("b", lambda: {"x": np.ones(2)})
    (first, _) = sorted((tmp_path / "toy.units").iterdir())
    content = first.read_bytes()
    first.unlink()
    if how != "missing":
        spoilt = {
            "cut off": content[: len(content) // 2],
            "foreign": b"x",
            "empty": b"",
        }
        first.write_bytes(spoilt[how])
    units = units_in(tmp_path)
    np.testing.assert_array_equal(units.do("b", never)["x"], np.ones(2))
    np.testing.assert_array_equal(units.do("a", lambda: np.zeros(3)), np.zeros(3))
    again = units_in(tmp_path)
    np.testing.assert_array_equal(again.do("a", never), np.zeros(3))
    np.testing.assert_array_equal(again.do("b", never)["x"], np.ones(2))


def test_killed_between_arrays_and_line_loses_that_part_alone(tmp_path, monkeypatch):
    units = units_in(tmp_path, resume=False)
    units.do("a", lambda: np.ones(2))

    def killed(path, line):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storing, "append_line", killed)
        with pytest.raises(KeyboardInterrupt):
            units.do("b", lambda: np.zeros(2))
    units = units_in(tmp_path)
    np.testing.assert_array_equal(units.do("b", lambda: np.full(2, 7)), [7, 7])
    again = units_in(tmp_path)
    np.testing.assert_array_equal(again.do("a", never), [1, 1])
    np.testing.assert_array_equal(again.do("b", never), [7, 7])


@pytest.mark.parametrize(
    "other", [{"seeds": 4}, {"steps": 6}, {"width": 2}], ids=lambda other: str(other)
)
def test_other_settings_are_refused_and_both_named(other, tmp_path):
    units_in(tmp_path, resume=False).do("a", lambda: 1)
    before = (tmp_path / "toy.units.jsonl").read_bytes()
    with pytest.raises(UsageError, match="other settings") as refused:
        units_in(tmp_path, **other)
    text = str(refused.value)
    assert '"seeds": 3' in text
    assert '"steps": 5' in text
    ((name, value),) = other.items()
    assert f'"{name}": {value}' in text
    assert (tmp_path / "toy.units.jsonl").read_bytes() == before


def test_an_error_leaves_nothing_behind(tmp_path):
    units = units_in(tmp_path, resume=False)
    with pytest.raises(ZeroDivisionError):
        units.do("a", lambda: 1 / 0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        units.do("a", lambda: [object()])
    assert units.do("a", lambda: 1) == 1
    assert units_in(tmp_path).do("a", never) == 1


def test_threads_may_work_side_by_side(tmp_path):
    units = units_in(tmp_path, resume=False)
    together = threading.Barrier(4)

    def work(i):
        together.wait(10)
        return {"i": i, "x": np.full(50, i)}

    with futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: units.do(str(i), lambda: work(i)), range(8)))
    assert [outcome["i"] for outcome in found] == list(range(8))
    again = units_in(tmp_path)
    for i in range(8):
        np.testing.assert_array_equal(again.do(str(i), never)["x"], np.full(50, i))


def test_seconds_go_on_where_they_were(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    units = units_in(tmp_path, resume=False)
    now += 5
    units.do("a", lambda: 1)
    now += 3  # lost
    units = units_in(tmp_path)
    assert units.seconds == 5
    now += 2
    assert units.seconds == 7


@pytest.mark.usefixtures("quick_compilation")
def test_a_benchmark_that_was_killed_ends_with_the_same_numbers(tmp_path, monkeypatch):
    methods = ("equal", "uncertainty")
    started = []
    run = toy.run

    def watched(method, seeds, steps):
        started.append(method)
        if method == killed:
            raise KeyboardInterrupt
        return run(method, seeds, steps)

    def main(folder, resume):
        started.clear()
        options = Options("toy", methods, 1, 20, "quick", out=folder, resume=resume)
        toy.main(options)
        return read_json(folder / "toy.json")

    monkeypatch.setattr(toy, "run", watched)
    monkeypatch.setattr(toy, "figure", lambda result, path: None)
    killed = None
    expected = main(tmp_path / "undisturbed", False)
    assert sorted(started) == sorted(methods)
    killed = "uncertainty"
    with pytest.raises(KeyboardInterrupt):
        main(tmp_path, False)
    assert not (tmp_path / "toy.json").exists()
    killed = None
    resumed = main(tmp_path, True)
    assert started == ["uncertainty"]
    for part in ("records", "trajectories"):
        assert resumed[part] == expected[part]
    assert main(tmp_path, True)["records"] == expected["records"]
    assert not started
    other = Options("toy", methods, 1, 30, "quick", out=tmp_path, resume=True)
    with pytest.raises(UsageError, match="other settings"):
        toy.main(other)
