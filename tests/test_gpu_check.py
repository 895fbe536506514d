"""tools/gpu_check.sh with stand-ins for what it runs: its stages, their limits, what it writes."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "gpu_check.sh"
BEFORE = ["build", "driver", "device", "compile", "smoke", "hot path", "tests"]
DRY = ["build", "device", "compile", "hot path", "tests", "benches"]
# Runs what it is given, and notes for how long that might run.
TIMEOUT = 'echo "$2" >> "$NOTES"; shift 2; exec "$@"'
PYTHON = 'case "$*" in *"$FAILS"*) exit "$STATUS" ;; esac'


@pytest.fixture
def check(tmp_path):
    """Runs a copy of the script in a folder of its own; (exit status, what it wrote, limits)."""
    for name, text in {
        "tools/dev_build.sh": "",
        "bin/nvidia-smi": "echo a card",
        "bin/timeout": TIMEOUT,
        "bin/python": PYTHON,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "tools")

    def run(fails="nothing", status=1, **options):
        notes, out = tmp_path / "notes", tmp_path / "out"
        notes.write_text("")
        mine = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "python"}
        mine |= {"COMMIT": "abc"}
        mine |= {"NOTES": str(notes), "FAILS": fails, "STATUS": str(status), "OUT": str(out)}
        command = ["bash", tmp_path / "tools" / "gpu_check.sh"]
        done = subprocess.run(command, env=mine | options, capture_output=True, text=True)
        found = json.loads((out / "gpu_check.json").read_text())
        return done.returncode, found, [int(n) for n in notes.read_text().split()]

    return run


def results(found):
    return {row["name"]: row["result"] for row in found["results"]}


def test_every_stage_has_its_turn(check, tmp_path):
    status, found, limits = check()
    assert status == 0
    assert results(found) == dict.fromkeys([*BEFORE, "benches"], "passed")
    assert found["machine"]["card"] == "a card"
    assert found["machine"]["commit"] == "abc"
    kept = json.loads((tmp_path / "bench" / "results" / "gpu_check.json").read_text())
    assert kept == found
    assert len(limits) == len(found["results"])


def test_all_of_it_takes_less_than_ten_minutes(check, tmp_path):
    """If every stage takes what it may; here none takes any, so that the last may take it all."""
    *_, limits = check(WHEELS=str(tmp_path))
    assert len(limits) == len(BEFORE) + 2
    assert limits == sorted(limits)
    assert 500 < limits[-1] <= 580
    assert limits[-1] - limits[-2] > 100  # for the benches, whatever the others do


def test_memcheck_has_time_of_its_own(check, tmp_path):
    _, found, limits = check(SANITIZE="1", WHEELS=str(tmp_path))
    assert [row["name"] for row in found["results"]] == ["packages", *BEFORE, "memcheck", "benches"]
    assert 750 < limits[-1] <= 820


def test_a_stage_that_fails_stops_no_other(check):
    status, found, _ = check(fails="-m hot_path")
    assert status == 1
    assert results(found) == dict.fromkeys([*BEFORE, "benches"], "passed") | {
        "hot path": "failed (1)"
    }
    status, found, _ = check(fails="bench/gpu/all --seconds", status=3)
    assert (status, results(found)["benches"]) == (0, "no peer")
    status, found, _ = check(fails="info --warm", status=124)
    assert (status, results(found)["compile"]) == (1, "out of time")


def test_without_a_card(check, tmp_path):
    status, found, _ = check(DRY="1")
    assert (status, results(found)) == (0, dict.fromkeys(DRY, "passed"))
    assert list((tmp_path / "bench" / "results").iterdir()) == []


def test_what_it_runs_is_there():
    named = re.findall(r"(?:tools|bench|tests)/[\w/]+(?:\.\w+)?", SCRIPT.read_text())
    root = SCRIPT.parents[1]
    assert {"bench/gpu/all", "tools/dev_build.sh"} <= set(named)
    written = {"bench/results/gpu_check.json", "tests/test_gpu_"}  # and the beginning of a pattern
    assert {name for name in named if not (root / name).exists()} <= written
