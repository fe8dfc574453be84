"""Processes that load modules ahead for the next run and scoring: pytest tests/test_spares.py"""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import reply

import agent

LOADS = {"train": ("json",), "score": ("json",)}


@pytest.fixture
def torch_checkout(checkout, monkeypatch):
    """A toy whose train.py looks as if it used torch, and says where and how it runs."""
    path = checkout.root / "train.py"
    text = path.read_text().replace('"""A torch-free', '"""\nimport torch\nNot really. A torch-free', 1)
    line = "    data = prepare.load()\n"
    assert line in text
    path.write_text(text.replace(line, f"    print('at', os.getcwd(), os.environ['AUTORESEARCH_SEED'])\n{line}").replace(
        "import prepare\n", "import os\n\nimport prepare\n", 1))
    checkout.git("-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qam", "talk")
    monkeypatch.setattr(agent, "PRELOADED", LOADS)
    if not agent.bubblewraps():
        pytest.skip("no bubblewrap")
    return checkout


def sandboxed(checkout, **more):
    return checkout.session(**{"sandbox": "require", "rules": False, "startup_s": 30.0, **more})


def places(checkout):
    """Where each run found itself, and its seed, by id."""
    runs = checkout.root / "runs" / checkout.record()[0].tag
    found = {}
    for folder in sorted(runs.glob("[0-9]*")):
        words = next(line for line in (folder / "run.log").read_text().splitlines() if line.startswith("at ")).split()
        found[folder.name] = (words[1].removeprefix(f"{runs}/"), words[2])
    return found


def spare_processes():
    """The processes below this one whose sandbox has the folder of the next scoring's: pid -> state.

    A run that trains was the next run's once, and has its folder still.
    """
    found = {}
    for pid in agent.descendants(os.getpid()):
        try:
            if b"/spare-score" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            pass
    return found


def test_the_second_run_is_one_that_was_started_ahead_and_nothing_is_left(torch_checkout):
    assert sandboxed(torch_checkout, experiments=3) == 0
    assert [place for place, _ in places(torch_checkout).values()] == ["0001/work", "spare-train", "spare-train"]
    runs = torch_checkout.root / "runs"
    assert not [*runs.glob("*/spare-*"), *runs.glob("*/*/work")] and not spare_processes()


@pytest.mark.slow
def test_a_run_that_confirms_gets_the_other_seed(torch_checkout, server):
    server.script += [reply("SET BPB = 0.5", description="too good"), reply("SET RATE = 0.5")]
    sandboxed(torch_checkout, experiments=3, proposer="llm", base_url=server.url)
    assert places(torch_checkout) == {
        "0001": ("0001/work", "42"),
        "0002": ("spare-train", "42"),
        "0003": ("spare-train", "43"),
        "0004": ("spare-train", "43"),   # the best's
        "0005": ("spare-train", "42"),
    }
    assert [r.status for r in torch_checkout.record()] == ["keep", "keep", "verify", "verify", "discard"]


def test_they_stand_still_while_the_tokens_are_out(torch_checkout):
    seen = []

    def look():
        while not done.is_set():
            logs = [*(torch_checkout.root / "runs").glob("*/000[12]/run.log")]
            if logs and "step 2 " in logs[-1].read_text() and (states := spare_processes()):
                seen.append((logs[-1].parent.name, *states.values()))
            time.sleep(0.05)

    done = threading.Event()
    thread = threading.Thread(target=look)
    thread.start()
    sandboxed(torch_checkout, experiments=2, budget_s=1.5)
    done.set()
    thread.join()
    still = [states for _, *states in seen if set(states) == {"T"}]
    assert len(still) > len(seen) / 2 > 3, seen   # the rest: the moment before the end of a run, and its scoring


@pytest.mark.slow
def test_one_that_dies_is_replaced(torch_checkout):
    killed = []

    def kill():
        while not done.is_set():
            for pid in spare_processes():
                if pid not in killed:
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    done = threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    code = sandboxed(torch_checkout, experiments=3, budget_s=0.3)
    done.set()
    thread.join()
    assert code == 0 and killed and [r.status for r in torch_checkout.record()][0] == "keep"
    assert {r.status for r in torch_checkout.record()} <= {"keep", "discard"}


def test_ctrl_c_ends_them(torch_checkout):
    main = threading.main_thread().ident

    def interrupt():
        while not spare_processes():
            time.sleep(0.02)
        time.sleep(0.2)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert sandboxed(torch_checkout, experiments=3, budget_s=5.0) == 130
    assert not spare_processes() and not [*(torch_checkout.root / "runs").glob("*/spare-*")]


def test_what_a_run_leaves_behind_is_dead_when_it_is_over_whoever_its_parent_is(torch_checkout):
    """A child in a session of its own, of a run that ends by itself: its parent is then agent.py."""
    import ctypes

    agent.adopt_orphans()
    try:
        s, _ = agent.opened(torch_checkout.config(sandbox="require"), agent.Screen())
        agent.read_branch(s)
        s.runs.mkdir(parents=True)
        agent.find_sandbox(s)
        (s.runs / "0001").mkdir()
        before = {*agent.descendants(os.getpid())}
        text = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n"
        with agent.child(s, "train", s.runs / "0001", text) as running:
            agent.order(s, running, ["train.py"])
            running.process.wait(20)
        assert {*agent.descendants(os.getpid())} == before
    finally:
        ctypes.CDLL(None).prctl(36, 0)


def test_one_that_has_an_old_prepare_py_is_not_used(torch_checkout):
    """A sandbox goes on showing the file that was there when it was made."""
    path = torch_checkout.root / "prepare.py"

    def replaced(*_):
        if ids := [*(torch_checkout.root / "runs").glob("*/0002/run.log")]:
            line = "def score(folder, split):\n"
            path.with_suffix(".new").write_text(path.read_text().replace(line, f"{line}    print('the new file')\n"))
            os.replace(path.with_suffix(".new"), path)
            done.set()
        return bool(ids)

    done = threading.Event()

    def wait():
        while not replaced():
            time.sleep(0.02)

    threading.Thread(target=wait, daemon=True).start()
    with pytest.raises(agent.UserError, match="prepare.py"):
        sandboxed(torch_checkout, experiments=3, budget_s=1.0)
    log = next((torch_checkout.root / "runs").glob("*/0002/score.log"))
    assert done.is_set() and "the new file" in log.read_text()


def test_there_are_none_without_a_sandbox(torch_checkout):
    torch_checkout.session(experiments=2, rules=False, startup_s=30.0)
    assert [place for place, _ in places(torch_checkout).values()] == ["0001/work", "0002/work"]


def test_what_a_run_leaves_for_the_cache_is_no_way_out(tmp_path):
    """A link in place of the folder for temporary files: what it leads to stays."""
    mine, folder = tmp_path / "mine", tmp_path / "0001"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    (folder / "work" / "compile").mkdir(parents=True)
    (folder / "work" / "compile" / "tmp").symlink_to(mine)
    agent.take(folder, "compile")
    assert (mine / "letter").exists() and not (folder / "compile" / "tmp").exists()


def test_only_torchs_own_temporary_files_stay_in_the_cache(tmp_path):
    tmp = tmp_path / "work" / "compile" / "tmp"
    for name in ("torchinductor_me", "other"):
        (tmp / name).mkdir(parents=True)
    agent.take(tmp_path, "compile")
    assert [path.name for path in (tmp_path / "compile" / "tmp").iterdir()] == ["torchinductor_me"]
