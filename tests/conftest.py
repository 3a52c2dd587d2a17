"""Hypothesis profiles, chosen by HYPOTHESIS_PROFILE: `ci` (the default), `thorough`, `gpu` and `mutation`."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.register_profile("gpu", settings.get_profile("ci"), derandomize=False, max_examples=10_000)
# Few examples, none of which is shrunk or kept: a mutant is a process of its own, and any failure will do.
settings.register_profile(
    "mutation", settings.get_profile("ci"), max_examples=10, database=None, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # the tensors are tiny, and the tests run in several processes


def _roomy(call: Callable[[], object]) -> None:
    call()


# All frames of a test in one block, for the reason that `gsa_fast.verification.run` gives beside `check_case`.
_roomy.__code__ = _roomy.__code__.replace(co_stacksize=2**15)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Run a test function as pytest does, on a roomy stack."""
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    _roomy(partial(pyfuncitem.obj, **arguments))
    return True


def build_site(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout into `out`, strictly."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as it is built from this checkout, once for all tests of a process. Nobody writes to it."""
    out = tmp_path_factory.mktemp("site")
    done = build_site(ROOT, out)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    return out
