"""The tests themselves: each broken variant of the service is caught by the tests that are to catch it."""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

import pytest
from conftest import LENT_POSTGRES, PostgresServer
from mutants import MUTANTS, PYTEST, RUFF, Mutant, copy, mutate, run

Result: TypeAlias = subprocess.CompletedProcess[str]

pytestmark = pytest.mark.timeout(400)  # a test may wait for runs that were begun before its own


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, postgres_18: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[Result]]]:
    """The runs that the tests below look at, by the tests' names, all begun.

    As many at a time as there are processors, since most of a run is waiting. Each has a copy of the service of its
    own; the PostgreSQL is the same.
    """
    lent = {f"{LENT_POSTGRES}18": postgres_18.url}

    def on_unbroken() -> Result:
        folder = tmp_path_factory.mktemp("unbroken")
        copy(folder)
        checked = run(folder, RUFF, [], lent)
        tests = sorted({test for mutant in MUTANTS if mutant.command == PYTEST for test in mutant.tests})
        return run(folder, PYTEST, tests, lent) if checked.returncode == 0 else checked

    def on(mutant: Mutant) -> Result:
        folder = tmp_path_factory.mktemp(mutant.name)
        copy(folder)
        mutate(mutant, folder)
        return run(folder, mutant.command, mutant.tests, lent)

    works = {"test_nothing_is_caught_where_nothing_is_broken": on_unbroken}
    works |= {f"test_each_is_caught[{mutant.name}]": partial(on, mutant) for mutant in MUTANTS}
    selected = {item.name for item in request.session.items}
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        yield {name: executor.submit(work) for name, work in works.items() if name in selected}
        executor.shutdown(cancel_futures=True)


@pytest.fixture
def result(request: pytest.FixtureRequest, runs: Mapping[str, Future[Result]]) -> Result:
    """How the run of this test ended."""
    return runs[request.node.name].result()


def test_nothing_is_caught_where_nothing_is_broken(result: Result) -> None:
    """On a copy of the service as it is, the same tests pass: what fails below fails for what is broken there."""
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_is_caught(mutant: Mutant, result: Result) -> None:
    """On each broken variant its tests fail, and not for want of a fixture or of a server that starts."""
    told = f"{mutant.breaks}\n{result.stdout}{result.stderr}"
    assert result.returncode == 1, told
    if mutant.command == PYTEST:
        assert "\nFAILED " in result.stdout, told
        assert not re.search("onetime (is not serving|ended with exit code)", result.stdout), told
