"""The README's claims that can be executed, and the files around it."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_readme_examples_run():
    assert len(BLOCKS) == 4
    # In one process and in order, as a reader would type them; without Triton only the reference's example can run.
    code = "\n".join(b for b in BLOCKS if find_spec("triton") or "gsa_fast" not in b)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_readme_opens_with_the_two_commands():
    first_block = README.split("```")[1]
    commands = re.findall(r"^make (\w+)", first_block, re.MULTILINE)
    assert commands == ["verify", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} is not a target"


def test_every_path_that_the_readme_names_exists():
    names = set(
        re.findall(r"`((?:docs|gsa_ref|gsa_fast|tests|notebooks|[A-Z]+\.?)[\w./]*\.(?:md|py|cff|toml))`", README)
    )
    assert "CITATION.cff" in names
    assert [n for n in sorted(names) if not (ROOT / n).exists()] == []
    assert (ROOT / "LICENSE").is_file()


def test_citation_agrees_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["authors"] == [{"name": "The Gated Sparse Attention project contributors"}]
    assert citation["references"][0]["url"] == project["urls"]["Paper"]


def test_licence_is_the_full_apache_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    for section in ("1. Definitions.", "9. Accepting Warranty", "END OF TERMS AND CONDITIONS", "APPENDIX"):
        assert section in text
