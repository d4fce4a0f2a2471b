"""No file holds what a merge left behind."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_file_holds_the_marks_of_an_unfinished_merge():
    marks = "^(<{7}|>{7}) "
    found = subprocess.run(["git", "grep", "-nIE", marks], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1, found.stdout + found.stderr
