"""The claims page: the published figures one by one, from docs/claims.json. Our figures there are directives.

An entry has `group` (a heading), `claim`, `published`, `source` (published, README or second-hand), `setting` (ours),
`here` (what was found, every figure a directive), `verdict`, `records` (files that the figures come from) and `command`
(which writes the records again; empty where nothing was measured).
"""

import json
from pathlib import Path

from speed import Record, table

LEDGER = "docs/claims.json"
VERDICTS = {
    "reproduced": "our figure is the published one",
    "same direction": "the effect is there, of another size",
    "not seen": "looked for in our setting, and not there",
    "contradicted": "our figure rules the published one out in the setting it names",
    "out of reach": "needs a model or data far beyond this project",
    "not measured": "could be measured here, and has not been yet",
}
MEASURED = ("reproduced", "same direction", "not seen", "contradicted")
FIELDS = ("group", "claim", "published", "source", "setting", "here", "verdict", "records", "command")


def ledger(root: Path) -> list[Record]:
    """The entries, in the order of the file.

    Raises:
        ValueError: an entry has other fields, or an unknown verdict.
    """
    entries = json.loads((root / LEDGER).read_text(encoding="utf-8"))
    for entry in entries:
        if tuple(entry) != FIELDS:
            raise ValueError(f"{LEDGER}: expected the fields {FIELDS}, got {tuple(entry)}")
        if entry["verdict"] not in VERDICTS:
            raise ValueError(f"{LEDGER}: expected a verdict of {tuple(VERDICTS)}, got {entry['verdict']!r}")
    return entries


def claims_verdicts(root: Path) -> str:
    """`{{ claims_verdicts }}`: what each verdict means, and how often it was given."""
    given = [entry["verdict"] for entry in ledger(root)]
    rows = [[f"**{name}**", meaning, str(given.count(name))] for name, meaning in VERDICTS.items()]
    return table(["verdict", "means", "claims"], rows, left=2)


def claims_list(root: Path) -> str:
    """`{{ claims_list }}`: a section for each group, a table with a row for each claim."""
    entries = ledger(root)
    lines = []
    for group in dict.fromkeys(entry["group"] for entry in entries):
        rows = [
            [
                entry["claim"],
                entry["published"] + ("" if entry["source"] == "published" else f" ({entry['source']})"),
                "<br>".join(part for part in (entry["here"], f"*{entry['setting']}*") if part.strip("*")),
                f"**{entry['verdict']}**",
            ]
            for entry in entries
            if entry["group"] == group
        ]
        commands = dict.fromkeys(e["command"] for e in entries if e["group"] == group and e["command"])
        lines += [f"## {group}", "", table(["claim", "published", "here", "verdict"], rows, left=4), ""]
        lines += ["To see it: " + "; ".join(f"`{command}`" for command in commands) + ".", ""] if commands else []
    return "\n".join(lines)
