"""Sessions killed at random instants, and what is left of them, read with plain git: pytest tests/test_crash.py"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import bench_crash  # noqa: E402


@pytest.fixture(autouse=True)
def no_git_configuration(monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)


def test_a_killed_session_goes_on(tmp_path):
    tally = bench_crash.crash_test(tmp_path, seed=1938, kills=7, aimed=0.8)
    assert not tally.faults, tally.report()
    assert tally.survived == 7 and tally.restarts > 0


@pytest.mark.slow
def test_forty_killed_sessions_go_on(tmp_path):
    tally = bench_crash.crash_test(tmp_path, seed=6, kills=40, aimed=0.7)
    assert not tally.faults, tally.report()
    assert tally.survived == 40 and tally.in_record > 0


# The checks themselves: each sees what it is there for


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A ground with a session of a few experiments that came to its end."""
    ground = bench_crash.new_ground(tmp_path_factory.mktemp("crash"), user_files=True)
    bench_crash.new_tag(ground)
    command = ground.checkout.command("--proposer", "search", "--sandbox", "off", "--tag", "t1", "--experiments", "6")
    subprocess.run(command, cwd=ground.root, env=ground.checkout.env(), check=True, timeout=60)
    ground.seen = ground.refs()
    shutil.copytree(ground.root, ground.folder / "sound", symlinks=True)
    return ground


@pytest.fixture
def ground(ended):
    """The same, as it was before the last test did its damage."""
    shutil.rmtree(ended.root)
    shutil.copytree(ended.folder / "sound", ended.root, symlinks=True)
    return ended


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cut(ground):
    path = ground.root / "results.tsv"
    path.write_text(path.read_text()[:-9])


def drop_row(ground):
    lines = (ground.root / "results.tsv").read_text().splitlines(keepends=True)
    (ground.root / "results.tsv").write_text("".join(lines[:2] + lines[3:]))


def repeat_row(ground):
    path = ground.root / "results.tsv"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])


def first_keep(ground):
    return bench_crash.keeps_of(ground)[0].commit


def corrupt(ground):
    """Empty an object that only fsck reads."""
    (ground.folder / "odd").write_text("odd")
    name = ground.git("hash-object", "-w", str(ground.folder / "odd")).strip()
    found = ground.root / ".git/objects" / name[:2] / name[2:]
    found.chmod(0o600)
    found.write_bytes(b"")


def again(ground, position):
    """An experiment once more, under the next id."""
    e = bench_crash.experiments(ground)[position]
    message = ground.git("log", "-1", "--format=%B", e.commit).replace(f"Id: {e.id}", "Id: 0007")
    identity = "-c", "user.name=u", "-c", "user.email=u"
    commit = ground.git(*identity, "commit-tree", f"{e.commit}^{{tree}}", "-p", e.parent, "-m", message).strip()
    ground.git("update-ref", "refs/autoresearch/t1/0007", commit)


DAMAGES = {
    "lost: refs/autoresearch/t1/0006 was": lambda g: g.git("update-ref", "-d", "refs/autoresearch/t1/0006"),
    "lost: t1 has the ids": lambda g: g.git("update-ref", "-d", "refs/autoresearch/t1/0002"),
    "lost: results.tsv has the rows": drop_row,
    "counted twice: results.tsv has 2 rows": repeat_row,
    "counted twice: t1 has the program": lambda g: again(g, -1),
    "counted twice: refs/autoresearch/t1/0007 is proposed by baseline": lambda g: again(g, 0),
    "0007 is a keep and no better": lambda g: again(g, 0),
    "half a line": cut,
    "has val_bpb": lambda g: edit(g.root / "results.tsv", "\t1.", "\t0."),
    "has the parent": lambda g: setattr(g, "start", "0" * 40),
    "HEAD is": lambda g: g.git("symbolic-ref", "HEAD", "refs/heads/main"),
    "refs/heads/autoresearch/t1 is": lambda g: g.git("update-ref", "refs/heads/autoresearch/t1", first_keep(g)),
    "checkout/train.py is not the best's": lambda g: edit(g.root / "train.py", "RATE", "RATIO"),
    "best/train.py is not the best's": lambda g: edit(g.runs / "best" / "train.py", "RATE", "RATIO"),
    "git status shows": lambda g: (g.root / "more.txt").write_text("?"),
    "the index differs": lambda g: g.git("read-tree", first_keep(g)),
    "git fsck": corrupt,
    "left over: .git/index.lock": lambda g: (g.root / ".git/index.lock").touch(),
    "left over: .git/refs/heads/main.lock": lambda g: (g.root / ".git/refs/heads/main.lock").touch(),
    "left over: .train.py.autoresearch-half": lambda g: (g.root / ".train.py.autoresearch-half").touch(),
    "left over: runs/t1/best.new": lambda g: (g.runs / "best.new").mkdir(),
    "left over: runs/t1/0007/work": lambda g: (g.runs / "0007/work").mkdir(parents=True),
    "program.md is not as the user left it": lambda g: (g.root / "program.md").write_text("Raise it.\n"),
    "notes.txt is no longer staged": lambda g: g.git("rm", "-q", "--cached", "notes.txt"),
}


@pytest.mark.slow
def test_a_sound_session_has_no_fault(ground):
    assert bench_crash.audit(ground) == [] and list(bench_crash.faults_at_any_instant(ground)) == []
    assert bench_crash.undone(ground) == bench_crash.begun(ground) == []
    assert len(bench_crash.keeps_of(ground)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damage_is_seen(ground, fault, monkeypatch):
    monkeypatch.setattr(ground, "start", ground.start)
    monkeypatch.setattr(ground, "seen", dict(ground.seen))
    bench_crash.experiment.cache_clear()
    DAMAGES[fault](ground)
    found = [f"{kind}: {what}" for kind, what in bench_crash.audit(ground)]
    assert any(fault in line for line in found), found
