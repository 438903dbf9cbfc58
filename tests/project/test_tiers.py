"""Tables of tests name tests that there are, and mutants lines that there are."""

import pathlib

import pytest

from tests import conftest
from tests.benchmarks import conftest as benchmarks
from tools.mutants import MUTANTS, ROOT

TESTS = pathlib.Path(conftest.__file__).parent
TABLES = {
    "smoke": conftest.SMOKE,
    "rows": conftest.STANDING_FOR_THE_TEST,
    "benchmarks": {f"benchmarks/{k}": v for k, v in benchmarks.SLOW.items()},
}


@pytest.mark.parametrize("table", TABLES)
def test_the_tests_in_the_tables_are_there(table):
    for file, names in TABLES[table].items():
        source = (TESTS / file).read_text()
        for name in names:
            assert f"def {name.split('[')[0]}(" in source, (file, name)


def test_the_fixtures_that_train_are_there():
    files = TESTS.joinpath("benchmarks").glob("test_*.py")
    source = "".join(path.read_text() for path in files)
    assert all(f"def {name}(" in source for name in benchmarks.TRAINED)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.file)
def test_what_a_mutant_changes_is_there_and_so_are_its_tests(mutant):
    source = (ROOT / "yoto_jax" / mutant.file).read_text()
    assert source.count(mutant.right) == 1
    assert all((TESTS / name).exists() for name in mutant.tests.split())
