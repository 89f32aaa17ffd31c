"""Every kind of fault runs a few cases, or 10^5 with -m slow, and a planted one is caught."""

import pytest
from tests.adversarial import driver, harness

QUICK_SECONDS = 0.5  # each kind runs cases for so long
KINDS = [k for k in harness.kind_names() if not harness.unavailable(k)]


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


def test_every_way_to_end_is_told_apart():
    tally = driver.run_piece(driver.Piece("_ways_to_end", range(12), 60.0, planted=5))
    outcomes = {seed: (outcome, detail) for seed, outcome, detail in tally.failures}
    assert {s: outcome for s, (outcome, _) in outcomes.items()} == {
        1: "wrong", 2: "crash", 5: "hang", 6: "traceback", 7: "traceback", 8: "traceback",
        9: "crash", 10: "wrong",
    }  # fmt: skip
    assert (tally.counts["right"], tally.counts["clear error"], tally.cases) == (2, 2, 12)
    assert "SIGSEGV" in outcomes[2][1] and "exit code 3" in outcomes[9][1]
    assert "KeyError" in outcomes[6][1] and "_hang" in outcomes[5][1]
    assert tally.planted == "wrong, seed 2"
    assert not tally.ok


def test_a_planted_fault_that_passes_fails_the_run():
    tally = driver.run_piece(driver.Piece("_ways_to_end", range(1), 60.0, planted=2))
    assert tally.planted == ""
    assert not tally.ok
    assert "not caught" in driver.failures({"_ways_to_end": tally})
