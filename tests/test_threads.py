"""How many threads there are; results, forks and other Python threads do not notice them."""

from __future__ import annotations

import os
from pathlib import Path

import fresh
import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext import _core

COUNT = "import bitnet_ext as bx; print(bx.get_num_threads())"


# --- how many ----------------------------------------------------------------------------------
def group_files(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 0.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 0.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": ""}, 0.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, 0.0),
        # The group's own quota and those above it: the least holds.
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.scope\n",
                "sys/fs/cgroup/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a.slice/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/a.slice/b.scope/cpu.max": "300000 100000\n",
            },
            0.5,
        ),
        # A container that sees the host's name of its group, but only the top of the tree.
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123abcd\n3:memory:/docker/0123abcd\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/jobs\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/jobs/cpu.cfs_quota_us": "25000\n",
                "sys/fs/cgroup/cpu/jobs/cpu.cfs_period_us": "50000\n",
            },
            0.5,
        ),
        # Another controller's group is not ours; lines that are not what they should be.
        (
            {
                "proc/self/cgroup": "2:cpuset:/x\n1:memory:/y\nnonsense\n7:cpu\n\n3:cpu:\n",
                "sys/fs/cgroup/x/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/cpu/y/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/y/cpu.cfs_period_us": "100000\n",
            },
            0.0,
        ),
    ],
)
def test_quota_of_control_groups(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    assert _core.cpu_quota(group_files(tmp_path, files)) == cores


def test_usable_cpus_are_those_of_the_affinity_mask() -> None:
    assert _core.usable_cpus() == len(os.sched_getaffinity(0))
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}})\n{COUNT}"
    assert fresh.output(code) == "1"


def test_default_is_the_usable_cores() -> None:
    quota = _core.cpu_quota()
    cores = len(os.sched_getaffinity(0))
    assert int(fresh.output(COUNT)) == (min(cores, -int(-quota // 1)) if quota else cores)


@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({"BITNET_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"BITNET_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"BITNET_NUM_THREADS": "none", "OMP_NUM_THREADS": "5"}, 5),
        ({"BITNET_NUM_THREADS": "-2", "OMP_NUM_THREADS": "5"}, 5),
        ({"BITNET_NUM_THREADS": "5000", "OMP_NUM_THREADS": "5"}, 5),
    ],
)
def test_environment_sets_the_threads(env: dict[str, str], threads: int) -> None:
    assert int(fresh.output(COUNT, **env)) == threads


def test_environment_holds_whatever_the_affinity() -> None:
    code = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n{COUNT}"
    assert fresh.output(code, BITNET_NUM_THREADS="3") == "3"


def test_set_num_threads(threads: None) -> None:
    bx.set_num_threads(3)
    assert bx.get_num_threads() == 3


@pytest.mark.parametrize("wrong", [0, -1, 4097, 2.0, True, "2", None])
def test_wrong_number_of_threads_changes_nothing(wrong: object, threads: None) -> None:
    bx.set_num_threads(2)
    with pytest.raises(ValueError, match=r"num_threads: found .*, wanted an integer"):
        bx.set_num_threads(wrong)  # type: ignore[arg-type]
    assert bx.get_num_threads() == 2


# --- fork --------------------------------------------------------------------------------------
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_forked_child_computes(busy: bool) -> None:
    """The pool's threads do not exist in the child; it must neither wait for them nor join them."""
    done = fresh.run(
        "import os, threading, warnings\n"
        "import numpy as np\n"
        "import bitnet_ext as bx\n"
        "warnings.simplefilter('ignore', DeprecationWarning)  # fork beside threads\n"
        "stop = threading.Event()\n"
        "def fill():\n"
        "    return bx.create_causal_mask(600, 600)\n"
        "def work():\n"
        "    while not stop.is_set():\n"
        "        fill()\n"
        "wanted = fill()\n"
        f"other = threading.Thread(target=work) if {busy} else None\n"
        "if other:\n"
        "    other.start()\n"
        "for _ in range(10):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        os._exit(0 if np.array_equal(fill(), wanted) else 1)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
        "stop.set()\n"
        "if other:\n"
        "    other.join()\n"
        "assert np.array_equal(fill(), wanted)\n",
        BITNET_NUM_THREADS="3",
    )
    assert done.returncode == 0, done.stderr


# --- other Python threads ------------------------------------------------------------------------
@pytest.mark.parametrize("op", ["mask", "attention", "gradients"])
def test_ops_release_the_interpreter(ticks: list[int], op: str) -> None:
    out, x = np.empty((3000, 3000), np.float32), np.ones((1, 4, 200, 64), np.float32)
    call = {
        "mask": lambda: bx.create_causal_mask(3000, 3000, out=out),
        "attention": lambda: bx.attention(x, x, x),
        "gradients": lambda: bx.attention_backward(x, x, x, x),
    }[op]
    for _ in range(1000):
        before = ticks[0]
        call()
        if ticks[0] > before:
            return
    pytest.fail("no other Python thread ran meanwhile")
