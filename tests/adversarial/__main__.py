"""`python -m tests.adversarial`: run kinds of fault and print the table."""

import argparse
import json
import sys
from pathlib import Path

from . import driver, harness


def seed_range(text):
    """The seeds that a text "A:B" stands for, B left out."""
    first, last = text.split(":")
    return range(int(first), int(last))


def parse(arguments):
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.adversarial", description=__doc__)
    parser.add_argument("--kind", action="append", choices=harness.kind_names(), metavar="K")
    parser.add_argument("--seeds", type=seed_range, metavar="A:B")
    parser.add_argument("--cases", type=int, help="of each kind, from seed 0 (default: a few)")
    parser.add_argument("--slow", action="store_true", help="as many cases as each kind names")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each worker")
    parser.add_argument("--planted", action="store_true", help="the planted faults too")
    parser.add_argument("--messages", action="store_true", help="print the clear errors")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table to it too")
    return parser.parse_args(arguments)


def plan(options):
    """The seeds to run of each kind."""
    setting = "SLOW_CASES" if options.slow else "QUICK_CASES"
    result = {}
    for name in options.kind or harness.kind_names():
        if reason := harness.unavailable(name):
            print(f"{name} is left out: {reason}", file=sys.stderr)
            continue
        count = options.cases
        if count is None:
            count = harness.setting(harness.load_kind(name), setting)
        result[name] = options.seeds or range(count)
    return result


def as_json(tallies):
    """Everything that was found, as JSON."""
    return json.dumps(
        {
            t.kind: {
                "cases": t.cases,
                **{o: t.counts[o] for o in harness.OUTCOMES},
                "seeds": None if t.first is None else [t.first, t.last + 1],
                "seconds": round(t.seconds, 1),
                "planted": t.planted,
                "failures": t.failures,
                "messages": t.messages.most_common(),
            }
            for t in tallies.values()
        },
        indent=1,
    )


def main(arguments=None):
    """Run the command; returns the exit code, 1 if a case failed or a planted fault passed."""
    options = parse(arguments)
    tallies = driver.run_all(plan(options), options.seconds, 40 if options.planted else 0)
    table = driver.table(tallies)
    print(as_json(tallies) if options.json else table)
    if options.table:
        options.table.write_text(table + "\n")
    if options.messages:
        for tally in tallies.values():
            for message, count in tally.messages.most_common(40):
                print(f"{tally.kind} {count:6d} {message}")
    print(driver.failures(tallies), file=sys.stderr)
    return 0 if all(t.ok for t in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
