"""Every kind of fault: a few cases by default, 10^5 with -m slow; a planted one is caught."""

import pytest
from tests.adversarial import driver, harness

QUICK_SECONDS = 2.0  # of cases, for each kind
KINDS = harness.kind_names()


def cases(setting):
    return {k: range(harness.setting(harness.load_kind(k), setting)) for k in KINDS}


@pytest.fixture(scope="module")
def quick():
    return driver.run_all(cases("QUICK_CASES"), QUICK_SECONDS, planted=40)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_cases_end_well_and_a_planted_fault_is_caught(quick, kind):
    assert quick[kind].cases > 0
    assert quick[kind].ok, driver.failures({kind: quick[kind]})


@pytest.mark.slow
def test_a_hundred_thousand_cases_end_well():
    tallies = driver.run_all(cases("SLOW_CASES"), planted=40)
    print(driver.table(tallies))
    assert all(t.ok for t in tallies.values()), driver.failures(tallies)
    assert sum(t.cases for t in tallies.values()) >= 100_000
