"""Which tests of the benchmarks are left to ``make test-all``.

``make test`` tests what all benchmarks share, the stored results, and one benchmark
from its command to its page: the digits, in the quick preset. The tasks of the others,
their networks, data and trainings, are tested by ``make test-all``.
"""

import pytest

from tests.benchmarks import streets

SHARED = (
    "test_command_line.py",
    "test_contest.py",
    "test_frontier.py",
    "test_searches.py",
    "test_units.py",
)
# Fixtures of these files that train a whole benchmark, and tests that take seconds.
TRAINED = ("ablated", "folder", "overhead_folder")
OF_THE_DIGITS = ("test_command_line.py", "folder")
SLOW = {
    "test_command_line.py": [
        "test_a_sweep_trains_as_a_single_run_does",
        "test_one_seed_and_one_method_are_enough",
        "test_rho_writes_its_results",
    ],
    "test_units.py": ["test_a_benchmark_that_was_killed_ends_with_the_same_numbers"],
}


@pytest.fixture(scope="session")
def street_images(tmp_path_factory):
    """A folder that is large enough for seeds with splits of their own."""
    return streets.write(tmp_path_factory.mktemp("streets"), train=20, val=4)


def is_slow(item):
    file = item.path.name
    if file not in SHARED or item.originalname in SLOW.get(file, ()):
        return True
    trained = {(file, x) for x in TRAINED if x in item.fixturenames}
    return bool(trained - {OF_THE_DIGITS})


def pytest_ignore_collect(collection_path, config):
    """Whether a file has slow tests alone, and they are not asked for."""
    name = collection_path.name
    if name.startswith("test_") and name not in SHARED:
        return "not slow" in config.option.markexpr or None
    return None


def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.parent.name == "benchmarks"]
    for item in here:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
