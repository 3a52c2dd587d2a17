"""Faults for the kernels: `verify` must turn red under every one of them.

    python -m tests.mutants              the faults that somebody thought of, one line each
    python -m tests.mutants --generated  those drawn from the kernels' syntax trees
    python -m tests.mutants --only NAME  some of them

Exit status 1 if a fault survives that `survivors.json` does not explain, if an explanation is out of date, or if the
unchanged package fails a case that showed a fault. Without --only, what was found is stored in `hand.json` or
`generated.json`, with a case that shows each fault; later runs try that case first.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.mutants import generated, hand, runner

RECORDS = {"hand": Path(__file__).with_name("hand.json"), "generated": Path(__file__).with_name("generated.json")}
SURVIVORS = Path(__file__).with_name("survivors.json")
FIELDS = ("file", "kernel", "operator", "before", "after", "occurrence")  # of a generated fault's key


def read(path: Path) -> Any:
    """The list in a JSON file; an empty one if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def explanations() -> dict[tuple[Any, ...], str]:
    """Why a fault survives, by its key: of a generated one its fields, of one by hand its name."""
    return {
        (entry["name"],) if "name" in entry else tuple(entry[field] for field in FIELDS): entry["why"]
        for entry in read(SURVIVORS)
    }


def explained_as(fault: runner.Fault) -> tuple[Any, ...]:
    return fault.key if isinstance(fault, generated.Generated) else (fault.name,)


def stem_of(fault: runner.Fault, outcome: runner.Outcome) -> str:
    return fault.stems[0] if outcome.test else outcome.stem


def entry(fault: runner.Fault, outcome: runner.Outcome) -> dict[str, Any]:
    """What the record keeps of a fault."""
    found = {
        "verdict": outcome.verdict,
        "stem": stem_of(fault, outcome),
        "detail": outcome.detail[:120],
        "case": outcome.case,
    }
    if isinstance(fault, generated.Generated):
        return {**dict(zip(FIELDS, fault.key, strict=True)), "line": fault.line, **found}
    return {"key": list(fault.key), **found}


def stale(faults: Sequence[runner.Fault], outcomes: dict[tuple[Any, ...], runner.Outcome], by_hand: bool) -> list[str]:
    """Explanations of faults that are no more, or that are killed."""
    surviving = {explained_as(f) for f in faults if not outcomes[f.key].killed}
    return [" · ".join(map(str, key)) for key in explanations() if (len(key) == 1) == by_hand and key not in surviving]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--generated", action="store_true", help="faults from the syntax trees, not those by hand")
    parser.add_argument("--only", action="append", metavar="NAME", help="faults whose name contains NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(argv)
    kind = "generated" if options.generated else "hand"
    every: list[runner.Fault] = [*(generated.draw(runner.ROOT / "gsa_fast") if options.generated else hand.MUTANTS)]
    faults = [f for f in every if not options.only or any(part in f.name for part in options.only)]
    if not faults:
        parser.error(f"argument --only: no fault is named like {options.only}")
    entries = {tuple(e[f] for f in FIELDS) if options.generated else tuple(e["key"]): e for e in read(RECORDS[kind])}
    known = {key: e["case"] for key, e in entries.items() if e["case"]}
    explained = explanations()

    def report(fault: runner.Fault, outcome: runner.Outcome) -> None:
        status = "killed   " if outcome.killed else "explained" if explained_as(fault) in explained else "SURVIVED "
        print(
            f"{status}  {stem_of(fault, outcome):18s} {fault.name[:90]:90s} {outcome.verdict} {outcome.detail[:90]}",
            flush=True,
        )
        if options.only:
            return
        entries[fault.key] = entry(fault, outcome)
        ordered = [entries[f.key] for f in every if f.key in entries]
        RECORDS[kind].write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    # Faults that nobody chose survive more often, and a survivor runs every case: a fifth of them, and reading each.
    outcomes, control = runner.run_faults(faults, known, 5 if options.generated else 1, options.jobs, report)
    n_killed = sum(outcome.killed for outcome in outcomes.values())
    unexplained = [f for f in faults if not outcomes[f.key].killed and explained_as(f) not in explained]
    print(f"\n{n_killed} of {len(faults)} faults turn a check red; the unchanged copy: {control.verdict}.")
    if unexplained:
        print(f"{len(unexplained)} faults survive without an explanation in {SURVIVORS.name}.")
    outdated = [] if options.only else stale(faults, outcomes, not options.generated)
    for line in outdated:
        print(f"{SURVIVORS.name} explains a fault that does not survive: {line}")
    return 1 if unexplained or outdated or control.killed else 0


if __name__ == "__main__":
    sys.exit(main())
