"""The exercises of README.md: each check fails as things are, and passes when done."""

import re
import subprocess
import sys

import pytest
from kit import ROOT, clean_environment

README = (ROOT / "README.md").read_text()
EXERCISES = re.findall(r"^\d\. \*\*(\w+)\*\* (?:A|An) ", README, re.M)


def check(names, program=""):
    """How the checks of these exercises end."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/exercises/exercises.py"]
    return subprocess.run(
        [*command, "-k", names, "-p", "no:cacheprovider"],
        check=False,
        cwd=ROOT,
        env=clean_environment({"EXERCISE_PROGRAM": program}),
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_none_of_the_five_is_done_yet():
    assert EXERCISES == ["typing", "model", "poll", "endpoint", "rate"]
    done = check(" or ".join(EXERCISES))
    assert "5 failed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_can_be_done(name):
    done = check(name, f"{ROOT}/tests/exercises/solutions.py {name}")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
