"""Sessions on real git repositories with real runs, from the loop to the sentence: pytest tests/test_session.py

Everything but the last two tests is without torch, on the toy task; what the command line adds is in test_cli.py.
"""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import ROOT, TOY, USER, commit_all, llm, make_checkout, reply, rewrite, scored, wait_for

import agent

FINISH = "    prepare.finish(model, steps=step, tokens=1_000_000)"
MODEL_LINE = next(line for line in (TOY / "train.py").read_text().splitlines() if line.startswith("    return {"))
GONE = 404, {"error": {"message": "no repair today"}}  # an answer after which the model is not asked again


def seeds(**values):
    """A table of BPB by seed, for the toy: seeds(s42=1.0, s43=1.1, s0=1.0 for any other)."""
    return repr({int(name[1:]): value for name, value in values.items()})


STOP = "(prepare.CACHE / 'stopped').mkdir(); os.kill(os.getppid(), 2); time.sleep(60)"  # Ctrl-C for the session, once
FALL = "raise ValueError('odd')"


def trap(checkout, seed, what, value=None, note="trap"):
    """Commit a train.py that does something before it trains: under one seed, and where NOTE says so."""
    when = f"os.environ['AUTORESEARCH_SEED'] == '{seed}' and NOTE == '{note}'"
    when += " and not (prepare.CACHE / 'stopped').exists()" * (what == STOP)
    lines = f"    import os, time\n    if {when}:\n        {what}\n    step = 0"
    checkout.commit(checkout.text().replace("    step = 0", lines).replace("BPB = None", f"BPB = {value}"))


def after(action, answer):
    """An answer of the model's server, before which something happens to the checkout."""
    return lambda body: (action(), answer)[1]


def error_of(checkout, **more):
    with pytest.raises(agent.UserError) as error:
        checkout.session(**{"experiments": 1, **more})
    return str(error.value)


def facts(checkout, *names):
    """Some columns of results.tsv, by row, with blanks between them."""
    return [" ".join(row[name] for name in names) for row in checkout.rows()]


def commits(checkout):
    """The commits of all rows, oldest first."""
    return list(checkout.refs().values())


def head(checkout, name="HEAD"):
    """The full name of a commit, a blob or a tree."""
    return checkout.git("rev-parse", name)


def clean(checkout):
    """Whether branch, index and checkout are those of one commit, but for results.tsv, which is never committed."""
    return checkout.git("status", "--porcelain") == "M results.tsv"


# The loop and the record


def test_every_experiment_is_one_commit_under_one_ref(checkout, server):
    start = head(checkout, "main")
    script = [scored(1.05), scored(1.05, "\nSET RATE = 2.0"), scored(1.2)]
    script += [rewrite(MODEL_LINE, '    return {"invalid": "looks ahead", "bpb": 0.1}', description="peek")]
    script += [rewrite("    step = 0", "    raise TypeError('no')", description="bad"), GONE]
    assert llm(checkout, server, *script, experiments=6, tag="t") == 0
    assert facts(checkout, "id", "status", "val_bpb", "description", "proposer") == [
        "0001 keep 1.056169 baseline baseline",
        "0002 keep 1.050000 score 1.05 llm",
        "0003 discard 1.050000 score 1.05 llm",  # a tie
        "0004 discard 1.200000 score 1.2 llm",
        "0005 invalid 0.000000 peek (looks ahead) llm",
        "0006 crash 0.000000 bad (TypeError: no) llm",
    ]
    made, rows = checkout.refs(), checkout.rows()
    assert list(made) == [f"refs/autoresearch/t/{row['id']}" for row in rows]
    base, keep, *others = made.values()
    assert [row["commit"] for row in rows] == [commit[:7] for commit in made.values()]
    assert [head(checkout, f"{c}^") for c in made.values()] == [start, base, keep, keep, keep, keep]
    assert head(checkout, f"{base}^{{tree}}") == head(checkout, "main^{tree}")
    for commit, row in zip([keep, *others], rows[1:]):
        assert checkout.git("diff", "--name-only", base, commit) == "train.py"
        assert checkout.git("show", "-s", "--format=%s", commit) == row["description"].split(" (")[0]
        saved = checkout.root / "runs" / "t" / row["id"] / "train.py"
        assert checkout.git("show", f"{commit}:train.py") + "\n" == saved.read_text()
    found = checkout.trailers("0002", "t")
    assert (found["Format"], found["Id"], found["Score"], found["Bar"][:6]) == ("2", "0002", "1.05", "1.0561")
    assert found["Conditions"].startswith("val_bpb (lower is better), preset cpu, ")
    assert (found["Status"], found["Expected"]) == ("keep", "-0.002")
    assert "It should help." in checkout.git("show", "-s", keep) and "Score" not in checkout.trailers("0006", "t")
    assert facts(checkout, "seed", "tag", "role", "memory_gb", "llm_tokens")[1] == "42 t generalist 0.5 100"
    assert head(checkout) == keep and clean(checkout) and "BPB = 1.05" in checkout.text()
    assert checkout.git("symbolic-ref", "--short", "HEAD") == "autoresearch/t"


CRASHES = {
    "    raise SystemExit('NaN loss at step 12')": "NaN loss at step 12",
    "    raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')": "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB",
    "    import os; os.kill(os.getpid(), 9)": "killed by signal 9, perhaps out of memory",
    "    import os; prepare.finish and os._exit(0)": "no checkpoint.pt",
    "    import sys; sys.exit(7)": "exit status 7",
    '    model = {"no": 1}\n    step = 0': "scoring: KeyError: 'rate'",
}


def test_a_crash_says_why_and_after_three_the_best_runs_once_more(checkout, server):
    script = [answer for code in CRASHES for answer in (rewrite("    step = 0", code), GONE)]
    llm(checkout, server, *script, experiments=1 + len(CRASHES), guard=False)
    reasons = [f"an idea ({reason})" for reason in CRASHES.values()]
    again = "repeat of 0001 (after 3 runs without a score)"
    assert facts(checkout, "description") == ["baseline", *reasons[:3], again, *reasons[3:]]
    assert facts(checkout, "status", "seed", "val_bpb")[4] == "verify 43 1.056169"


def test_where_the_best_fails_too_it_is_the_machine_until_it_is_put_right(checkout, server):
    trap(checkout, 43, FALL, note="plain")
    crash = [rewrite("    step += 1", f"    raise TypeError({i})") for i in range(3)]
    with pytest.raises(agent.UserError, match="so it is the machine.*runs/t/0005/run.log"):
        llm(checkout, server, *[a for c in crash for a in (c, GONE)], experiments=9, tag="t")
    assert facts(checkout, "status", "description")[-1] == "verify repeat of 0001 (ValueError: odd)"
    llm(checkout, server, scored(1.05), experiments=1)
    assert facts(checkout, "status", "seed")[5:] == ["verify 44", "keep 42"]


def test_odd_characters_of_a_reply_do_no_harm_and_where_nothing_was_kept_nothing_is_verified(checkout, server, capsys):
    odd = "t\tab \ud800 \x00 café ∞ " + "x" * 100
    llm(checkout, server, reply("SET NOTE = 'é∞'\nSET RATE = 0.5", description=odd), tag="t", verify=True)
    assert len(checkout.rows()) == 2 and "Nothing was kept: no gain." in capsys.readouterr().out
    what = checkout.rows()[1]["description"]
    assert what.startswith("t ab") and "café ∞ xxx" in what and len(what) <= 80
    assert "'é∞'" in checkout.git("show", "refs/autoresearch/t/0002:train.py")


def test_a_baseline_without_a_score_is_recorded_and_ends_the_session(checkout):
    trap(checkout, 42, FALL, note="plain")
    assert "gets no score (ValueError: odd)" in error_of(checkout)
    assert facts(checkout, "status", "proposer") == ["crash baseline"]


def test_a_hypothesis_and_the_near_misses_come_back_as_they_were(checkout, server):
    """Though the best has run again since: its mean is another."""
    checkout.commit(checkout.text().replace("BPB = None", f"BPB = {seeds(s42=1.05, s43=1.054)}"))
    told = "A low-rank and hyper-connected idea, such as " + "https://example.org/" + "x" * 90 + " has it, may well-do."
    first, lucky = reply("SET BPB = 1.06", description="near", hypothesis=told), scored(seeds(s42=1.04, s43=1.2))
    others = map(scored, (1.3, 1.31, 1.32))
    llm(checkout, server, first, *others, lucky, scored(1.33), confirm="always", tag="t")
    body = checkout.git("show", "-s", "--format=%B", "refs/autoresearch/t/0002").split("\n\n")[1]
    assert " ".join(body.split("\n")) == told
    assert "1.052000" in server.asked(-1) and "0002 discard: near\n" in server.asked(-1)


def test_a_run_of_no_steps_is_a_row_and_the_next_start_goes_on(checkout, server):
    none = rewrite(FINISH, FINISH.replace("steps=step", "steps=0"), description="none")
    llm(checkout, server, none, tag="t")
    llm(checkout, server, scored(1.2), experiments=1)
    assert facts(checkout, "id", "steps")[1] == "0002 0" and len(checkout.rows()) == 3


def test_data_that_are_prepared_during_a_session_do_not_mix_with_its_own(checkout, server):
    def prepare(**env):
        subprocess.run([sys.executable, "prepare.py"], cwd=checkout.root, env=checkout.env(**env), check=True)

    others = after(lambda: prepare(TOY_NAME="other", TOY_FINGERPRINT="beef"), scored(1.04))
    anew = after(lambda: prepare(TOY_FINGERPRINT="beef"), scored(1.03))
    with pytest.raises(agent.UserError, match="prepared anew"):
        llm(checkout, server, scored(1.05), others, anew, tag="t")
    assert all("f00d" in checkout.trailers(id)["Conditions"] for id in facts(checkout, "id"))
    assert facts(checkout, "status") == ["keep"] * 3


# A restart is another turn


def test_a_restart_goes_on_from_the_best_at_the_next_id(checkout, server, capsys):
    llm(checkout, server, scored(1.05), scored(1.2), tag="t")
    assert llm(checkout, server, scored(1.04), experiments=1) == 0
    assert facts(checkout, "id") == ["0001", "0002", "0003", "0004"] and "score 1.2\n" in server.asked(2)
    _, keep, _, new = commits(checkout)
    assert head(checkout, f"{new}^") == keep and head(checkout) == new
    assert re.search("autoresearch/t: .*after 3 rows", capsys.readouterr().out)


def test_a_session_that_died_between_ref_and_view_is_finished_by_the_next(checkout, server):
    """Put the checkout back to each state between a keep's ref and its end, and start again."""
    llm(checkout, server, scored(1.05), tag="t")
    keep, results, whole = head(checkout), checkout.root / "results.tsv", checkout.text()
    for number, died_before in enumerate(["results.tsv", "train.py", "the branch", "the index"], 3):
        checkout.git("update-index", "--cacheinfo", f"100644,{checkout.git('rev-parse', 'main:train.py')},train.py")
        if died_before != "the index":
            checkout.git("update-ref", "refs/heads/autoresearch/t", "main")
        (checkout.root / "train.py").write_text(checkout.git("show", "main:train.py") + "\n" if number < 5 else whole)
        if died_before == "results.tsv":
            results.write_text("".join(results.read_text().splitlines(keepends=True)[:-1]))
        llm(checkout, server, scored(1.2, f"\nSET RATE = {number}.5"), experiments=1)
        assert head(checkout) == keep and checkout.text() == whole and clean(checkout), died_before
        assert [row["commit"] for row in checkout.rows()] == [c[:7] for c in commits(checkout)], died_before
        assert len(checkout.rows()) == number and head(checkout, f"{commits(checkout)[-1]}^") == keep


@pytest.mark.slow
def test_killed_sessions_go_on():
    """A few rounds of the proof in tests/benchmarks."""
    words = [sys.executable, ROOT / "tests" / "benchmarks" / "bench_crash.py", "--kills", "3", "--seed", "1938"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0 and "3 of 3 survived" in done.stdout, done.stdout + done.stderr


def test_results_and_run_folders_are_made_again_when_lost_torn_or_edited(checkout, server):
    path, seen = checkout.root / "results.tsv", []

    def harm(how):
        seen.append(path.read_text())
        how(seen[-1])

    harms = [
        lambda whole: path.write_text(whole[:-30]),
        lambda whole: path.write_text(whole.replace("keep", "discard") + "a line of mine\n"),
        lambda whole: (path.unlink(), shutil.rmtree(checkout.root / "runs")),
    ]
    script = [after(lambda how=how: harm(how), scored(1.2 + i / 100)) for i, how in enumerate(harms)]
    llm(checkout, server, scored(1.05), *script, tag="t")
    seen.append(path.read_text())
    assert all(new.startswith(old) for old, new in zip(seen, seen[1:])) and len(checkout.rows()) == 5
    assert "mine" not in path.read_text() and (checkout.root / "runs/t/0005/run.log").exists()


def test_another_branch_of_the_same_data_shares_the_history_and_nothing_else(checkout, server):
    llm(checkout, server, scored(1.05), tag="one")
    checkout.git("checkout", "-q", "main")
    llm(checkout, server, scored(1.05), scored(1.04), experiments=2, tag="two")
    assert re.search(r"repeats experiment one/0002 +keep +1\.050000 .* score 1\.05", server.asked(2))
    assert re.search("one/0002 +keep +1.050000 .*score 1.05", server.requests[1]["messages"][1]["content"])
    parents = head(checkout, "main")[:7], checkout.rows()[2]["commit"]
    assert facts(checkout, "tag", "id", "parent")[2:] == [f"two 000{i} {p}" for i, p in enumerate(parents, 1)]


def test_other_conditions_are_not_mixed(checkout, monkeypatch):
    checkout.session(experiments=1, tag="t")
    found = error_of(checkout, time_budget=0.2)
    assert "--tag NAME" in found and "0.03 s" in found and "0.2 s" in found
    for name, was, value in (("TOY_FINGERPRINT", "f00d", "beef"), ("TOY_PRESET", "cpu", "mac")):
        (checkout.cache / "current").unlink()
        with monkeypatch.context() as m:
            m.setenv(name, value)
            found = error_of(checkout)
        assert "--tag NAME" in found and was in found and value in found and "autoresearch/t" in found
    assert len(checkout.rows()) == 1


def test_refs_of_another_format_are_skipped_with_one_line(checkout, capsys):
    for id in ("0001", "odd"):
        checkout.git("update-ref", f"refs/autoresearch/old/{id}", "main")
    assert checkout.session(experiments=1, tag="new") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(said) == 1 and "refs/autoresearch/old/" in said[0]
    assert facts(checkout, "tag") == ["new"] and len(checkout.refs()) == 3
    checkout.git("checkout", "-q", "main")
    assert "--tag NAME" in error_of(checkout, tag="old")


# The user's own work


@pytest.mark.parametrize("harm", ["edited", "staged"])
def test_a_train_py_of_the_users_is_refused_at_a_start_and_stays(checkout, harm):
    path, mine = checkout.root / "train.py", checkout.text() + "# mine\n"
    path.write_text(mine)
    if harm == "staged":
        checkout.git("add", "train.py")
        path.write_text(mine.removesuffix("# mine\n"))
    before = checkout.git("status", "--porcelain")
    found = error_of(checkout)
    assert "not committed. Commit it (git commit train.py" in found
    assert checkout.git("status", "--porcelain") == before and not checkout.refs()
    assert checkout.git("branch", "--format=%(refname:short)") == "main"


CHANGED, STAGE = "changed and not committed", "update-index --cacheinfo 100644,{},train.py"
WAITS = {
    "an edit": (lambda c: (c.root / "train.py").write_text("#"), [*USER, "stash", "push", "train.py"], CHANGED),
    "staged text": (lambda c: c.git(*STAGE.format(head(c, "HEAD:agent.py")).split()), ["reset", "train.py"], CHANGED),
    "another HEAD": (lambda c: c.git("checkout", "main"), ["checkout", "autoresearch/t"], "with it: git checkout a"),
}


@pytest.mark.parametrize("what", WAITS)
def test_branch_and_checkout_wait_for_the_user_while_rows_go_on(checkout, server, capsys, what):
    (meddle, undo, words), seen = WAITS[what], []

    def look():
        seen.append((checkout.text(), checkout.git("diff", "--cached"), head(checkout, "autoresearch/t")))

    def undone():
        look()
        assert seen[0] == seen[1] and len(checkout.rows()) == 3  # the row in between was recorded
        checkout.git(*undo)

    meddling = after(lambda: (meddle(checkout), look()), scored(1.04))
    llm(checkout, server, scored(1.05), meddling, after(undone, scored(1.2)), tag="t")
    assert facts(checkout, "status") == ["keep", "keep", "keep", "discard"]
    assert head(checkout) == commits(checkout)[2] and clean(checkout)
    assert "BPB = 1.04" in checkout.text()
    assert words in capsys.readouterr().out


def test_a_branch_that_was_reset_is_put_back_and_that_is_said(checkout, server, capsys):
    meddle = after(lambda: checkout.git("reset", "-q", "--hard", "main"), scored(1.2))
    llm(checkout, server, scored(1.05), meddle, tag="t")
    keep = commits(checkout)[1]
    assert head(checkout) == keep and clean(checkout) and "BPB = 1.05" in checkout.text()
    assert head(checkout, f"{commits(checkout)[2]}^") == keep
    out = capsys.readouterr().out
    assert keep[:7] in out and "git checkout HEAD~1 -- train.py && git commit -m back" in out
    checkout.git("reset", "-q", "--hard", "main")  # between two sessions it is the same
    llm(checkout, server, scored(1.3), experiments=1)
    assert head(checkout) == keep and "git checkout HEAD~1" in capsys.readouterr().out


OWN = {
    "a commit": lambda c: c.commit(c.text().replace("BPB = 1.05", "BPB = 1.08")),
    "a reset and a commit": lambda c: c.git("reset", "--hard", "main") and c.commit(c.text().replace("None", "1.08")),
    "a keep taken back": lambda c: c.git("checkout", "HEAD~1", "train.py") or c.git(*USER, "commit", "-m", "back"),
}


@pytest.mark.parametrize("what", OWN)
def test_a_commit_of_the_users_begins_a_new_search_with_the_old_history(checkout, server, what):
    llm(checkout, server, scored(1.05), after(lambda: OWN[what](checkout), scored(1.04)), experiments=4, tag="t")
    mine = head(checkout, "HEAD~2")
    assert checkout.git("show", "-s", "--format=%s", mine) == ("back" if "back" in what else "mine")
    value = "1.056169" if "back" in what else "1.080000"
    rows = facts(checkout, "id", "status", "val_bpb", "proposer", "parent")
    assert rows[2] == f"0003 keep {value} baseline {mine[:7]}" and rows[3].startswith("0004 keep 1.040000 llm")
    assert head(checkout) == commits(checkout)[3] and clean(checkout) and len(rows) == 4


def test_what_the_user_staged_changed_or_set_stays(checkout, server):
    (checkout.root / "train.py").chmod(0o755)
    checkout.git(*USER, "commit", "-qam", "executable")
    (checkout.root / "notes.txt").write_text("mine\n")
    (checkout.root / "program.md").write_text("Staged words.\n")
    checkout.git("add", "notes.txt", "program.md")
    (checkout.root / "program.md").write_text("Only the rate.\n")
    before = (checkout.root / "program.md").stat()
    (hooks := checkout.root / ".git" / "hooks").mkdir(exist_ok=True)
    for name in ("post-checkout", "reference-transaction", "post-commit", "pre-commit", "post-index-change"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {checkout.root}/ran\n")
        (hooks / name).chmod(0o755)
    llm(checkout, server, scored(1.05), scored(1.04))
    assert not (checkout.root / "ran").exists()  # before a git command of the user's runs them
    found = checkout.git("status", "--porcelain").splitlines()
    assert [line.split()[-1] for line in found] == ["notes.txt", "program.md", "results.tsv"] and found[0][0] == "A"
    assert checkout.git("show", ":program.md") == "Staged words."
    assert {checkout.git("show", f"{commit}:program.md") for commit in commits(checkout)} == {"Only the rate."}
    now = (checkout.root / "program.md").stat()
    assert (now.st_mtime_ns, now.st_ino) == (before.st_mtime_ns, before.st_ino)  # never written
    modes = {checkout.git("ls-tree", commit, "train.py").split()[0] for commit in commits(checkout)}
    assert modes == {"100755"} and (checkout.root / "train.py").stat().st_mode & 0o777 == 0o755
    (checkout.root / "program.md").write_text("Later words.\n")
    checkout.git("add", "program.md")
    llm(checkout, server, scored(1.2), experiments=1)
    assert checkout.git("show", ":program.md") == "Later words."  # a discard has them too


@pytest.mark.parametrize("how", ["set by .gitattributes", "committed", "committed, and no longer so"])
def test_crlf_line_ends_stay(folder, server, how):
    if how == "set by .gitattributes":
        (folder.root / ".gitattributes").write_text("train.py text eol=crlf\n")
    elif how == "committed, and no longer so":
        (folder.root / ".gitattributes").write_text("train.py text=auto\n")
    text = folder.text().replace("\n", "\r\n")
    (folder.root / "train.py").write_bytes(text.encode())
    commit_all(folder)
    if how == "committed, and no longer so":
        blob = folder.git("hash-object", "-w", "--no-filters", "train.py")
        folder.git("update-index", "--cacheinfo", f"100644,{blob},train.py")
        folder.git(*USER, "commit", "-qm", "with CRLF")
    llm(folder, server, scored(1.05))
    assert folder.rows()[1]["status"] == "keep" and clean(folder)
    wanted = text.replace("BPB = None", "BPB = 1.05").replace('"plain"', "'1.05'")
    assert (folder.root / "train.py").read_bytes().decode() == wanted and head(folder) == commits(folder)[1]


def test_odd_surroundings_stop_no_session(checkout, server, monkeypatch, capsys):
    """Blanks in what is measured on, a tag named like the branch, a brief that is a link, a disk without links."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2,  1")
    (checkout.root / "program.md").rename(checkout.root / "brief.md")
    (checkout.root / "program.md").symlink_to("brief.md")
    checkout.git("add", "-A")
    checkout.git(*USER, "commit", "-qm", "a link")
    checkout.git("tag", "autoresearch/t")
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    llm(checkout, server, scored(1.05), tag="t")
    assert checkout.session(experiments=1) == 0 and facts(checkout, "id") == ["0001", "0002", "0003"]
    assert facts(checkout, "proposer") == ["baseline", "llm", "search"]
    assert "trying again" not in capsys.readouterr().out and head(checkout) in commits(checkout)[1:]
    assert checkout.git("ls-tree", "HEAD", "program.md").startswith("120000")
    assert checkout.git("symbolic-ref", "HEAD") == "refs/heads/autoresearch/t"


def test_what_is_committed_while_the_first_proposal_is_asked_for_is_begun_with(checkout, server):
    more = after(lambda: checkout.commit(checkout.text().replace("DECAY = 0.2", "DECAY = 0.3")), scored(1.05))
    llm(checkout, server, more, tag="t")
    assert facts(checkout, "status") == ["keep", "keep"] and clean(checkout)
    assert "DECAY = 0.3" in checkout.text() and "BPB = 1.05" in checkout.text()
    assert head(checkout, "main") == head(checkout, f"{commits(checkout)[0]}^")


def test_a_row_that_another_clone_brought_meanwhile_is_not_written_over(checkout, server, capsys):
    def fetched():
        wait_for(lambda: list(checkout.root.glob("runs/t/0002/run.log")), "the run")
        text = checkout.git("log", "-1", "--format=%B", "refs/autoresearch/t/0001").replace("Id: 0001", "Id: 0002")
        commit = checkout.git(*USER, "commit-tree", "HEAD^{tree}", "-p", "HEAD", "-m", text)
        checkout.git("update-ref", "refs/autoresearch/t/0002", commit)

    llm(checkout, server, scored(1.05), after(fetched, scored(1.04)), tag="t", prefetch=True, time_budget=0.3)
    assert "0002 is there already" in capsys.readouterr().out
    assert facts(checkout, "id", "description") == ["0001 baseline", "0002 baseline", "0003 score 1.04"]


def test_mix_goes_on_with_the_model_where_the_search_finds_no_step(checkout, server):
    checkout.commit(re.sub(r"\b(RATE|DECAY|ROWS|DEPTH|HEADS)( ?= ?)([\d.]+)", r"\1\2abs(\3)", checkout.text()))
    llm(checkout, server, reply("SET NOTE = 'a'"), reply("SET NOTE = 'b'"), tag="t", proposer="mix")
    assert facts(checkout, "proposer") == ["baseline", "llm", "llm"]


def test_a_task_in_a_subfolder_of_a_larger_repository(tmp_path, folder, server):
    big = tmp_path / "big"
    (big / "other").mkdir(parents=True)
    (big / "other" / "file").write_text("mine\n")
    part = make_checkout(big / "part", tmp_path / "cache")
    commit_all(make_checkout(big, tmp_path / "cache"))
    (big / "other" / "file").write_text("changed\n")
    llm(part, server, scored(1.05), tag="t")
    assert part.rows()[1]["status"] == "keep" and head(part) == commits(part)[1]
    assert part.git("diff", "--name-only", "main", "HEAD") == "part/train.py"
    assert part.git("status", "--porcelain", ".") == "M part/results.tsv" and "BPB = 1.05" in part.text()
    assert (big / "other" / "file").read_text() == "changed\n" and "BPB = None" in (big / "train.py").read_text()


@pytest.mark.parametrize("lock", ["index.lock", "refs/heads/autoresearch/t.lock"])
def test_a_lock_file_of_gits_is_named_and_never_deleted(checkout, server, monkeypatch, lock):
    monkeypatch.setattr(agent, "WAIT_S", 0.3)
    path, log, found = checkout.root / ".git" / lock, checkout.root / "runs/t/session.log", []

    def user():
        wait_for(lambda: f"rm {path}" in log.read_text(), "the line")
        found.append(path.exists())
        path.unlink()  # as the line says

    def locking():
        path.touch()
        threading.Thread(target=user, daemon=True).start()

    gone = after(lambda: wait_for(lambda: found, "the user"), scored(1.3))
    llm(checkout, server, scored(1.1), after(locking, scored(1.05)), gone, tag="t")
    assert found == [True] and facts(checkout, "id", "status")[2:] == ["0003 keep", "0004 discard"]
    assert head(checkout) == commits(checkout)[2] and clean(checkout)


# Belief: confirmation, repeats, verification


def test_a_gain_in_doubt_is_confirmed_on_a_second_seed(checkout, server):
    """The baseline's score is 1.056169 under every seed."""
    values = [seeds(s42=1.03, s43=1.09), seeds(s42=1.04, s43=1.05), seeds(s42=1.042, s43=1.044)]
    assert llm(checkout, server, *map(scored, values), confirm="always", tag="t") == 0
    assert facts(checkout, "id", "status", "seed", "val_bpb") == [
        "0001 keep 42 1.056169",
        "0002 maybe 42 1.030000",
        "0003 verify 43 1.056169",  # the best had one run only
        "0004 discard 43 1.090000",
        "0005 maybe 42 1.040000",
        "0006 keep 43 1.050000",
        "0007 maybe 42 1.042000",
        "0008 keep 43 1.044000",  # above the luckiest run of the best, below its mean
    ]
    what = [row["description"] for row in checkout.rows()]
    assert what[1] == f"score {values[0]} (as --confirm asks for)"
    assert what[2] == "repeat of 0001 (to judge 0002 by)" and re.search("confirms 0002; mean of 2.*: 1.060000", what[3])
    assert re.search("^score .*confirms 0005; mean of 2.*: 1.045000, the best's 1.056169", what[5])
    made = commits(checkout)
    assert [head(checkout, f"{made[i]}^") for i in (2, 3, 5, 7)] == [made[0], made[0], made[0], made[5]]
    texts = [head(checkout, f"{c}:train.py") for c in made]
    assert texts[1] == texts[3] and texts[2] == texts[0] and texts[6] == texts[7]
    assert head(checkout) == made[7] and checkout.trailers("0007")["Bar"] == "1.045"
    assert checkout.trailers("0008")["Repeats"] == "0007"


def test_a_confirmation_that_is_cut_off_leaves_no_row_and_is_taken_up_again(checkout, server):
    trap(checkout, 43, STOP)
    server.script.append(scored(1.04, note="trap"))  # in a process, which a signal can end
    done = checkout.run(*"--sandbox off --experiments 2 --confirm always --tag t".split(), OPENAI_BASE_URL=server.url)
    assert done.returncode == 130 and "leaves no row" in done.stdout and clean(checkout)
    assert facts(checkout, "status") == ["keep", "maybe", "verify"]
    llm(checkout, server, scored(1.2), confirm="always", experiments=1)
    assert facts(checkout, "status", "seed")[3:] == ["keep 43", "discard 42"]
    assert checkout.rows()[3]["description"].startswith("score 1.04 (confirms 0002; mean of 2")
    assert head(checkout) == commits(checkout)[3]


def test_a_confirmation_that_crashes_confirms_nothing(checkout, server):
    trap(checkout, 43, FALL)
    llm(checkout, server, scored(1.04, note="trap"), confirm="always", tag="t")
    assert facts(checkout, "status", "seed", "val_bpb")[3:] == ["discard 43 0.000000"]
    assert checkout.rows()[3]["description"] == "score 1.04 (confirms 0002; not confirmed: ValueError: odd)"
    assert head(checkout) == head(checkout, "main")


def test_shorter_code_gets_a_second_chance(checkout, server):
    padding, value = "".join(f"UNUSED_{i} = (1 + 2) * 3 - 4\n" for i in range(5)), seeds(s42=1.051, s43=1.047)
    text = checkout.text().replace("BPB = None", "BPB = {0: 1.05}")
    checkout.commit(text.replace("\n\ndef main", f"{padding}\n\ndef main"))
    same, shorter = scored(value, "\nSET RATE = 2.0"), rewrite(padding, "", f"SET BPB = {value}", description="shorter")
    llm(checkout, server, same, shorter)
    assert facts(checkout, "status", "seed")[1:] == ["discard 42", "maybe 42", "verify 43", "keep 43"]
    assert "UNUSED" not in checkout.text() and "shorter (confirms 0003; mean" in checkout.rows()[4]["description"]


def age(checkout, id, hours):
    """Make the last keep of tag t as old as that: a new commit in its place, on which the branch stands."""
    ref, then = f"refs/autoresearch/t/{id}", datetime.now(timezone.utc) - timedelta(hours=hours)
    text = checkout.git("log", "-1", "--format=%B", ref)
    text = re.sub("\nTime: .*", f"\nTime: {then:%Y-%m-%dT%H:%M:%S+00:00}", text)
    new = checkout.git(*USER, "commit-tree", f"{ref}^{{tree}}", "-p", f"{ref}^", "-m", text)
    checkout.git("update-ref", ref, new)
    checkout.git("update-ref", "refs/heads/autoresearch/t", new)


def test_the_best_runs_again_after_a_while_and_the_branch_goes_back_where_it_disappoints(checkout, server, capsys):
    llm(checkout, server, scored(seeds(s0=1.045)), scored(seeds(s42=1.04, s43=1.06)), tag="t")
    age(checkout, "0003", 0.1)
    llm(checkout, server, scored(1.3), experiments=1)
    age(checkout, "0003", 0.2)
    assert head(checkout) == commits(checkout)[2]
    capsys.readouterr()
    llm(checkout, server, scored(1.046), experiments=1)
    found = facts(checkout, "status", "seed", "val_bpb")[3:]
    assert found == ["discard 42 1.300000", "verify 43 1.060000", "discard 42 1.046000"]  # 1.05 on average
    assert checkout.rows()[4]["description"] == "repeat of 0003 (0.2 h after it ran)"
    keep = commits(checkout)[1]
    assert head(checkout, f"{commits(checkout)[5]}^") == keep == head(checkout)
    assert "BPB = {0: 1.045}" in checkout.text() and clean(checkout)
    assert f"goes to the best, {keep[:7]}" in capsys.readouterr().out.split("0006")[0]


BASE_SCORES = seeds(s42=1.05, s101=1.051, s102=1.049, s103=1.05, s0=1.05)
BEST_SCORES = seeds(s42=1.02, s101=1.031, s102=1.029, s103=1.03, s0=1.03)


def test_a_long_session_ends_with_the_verification_and_one_sentence(checkout, server, capsys):
    checkout.commit(checkout.text().replace("BPB = None", f"BPB = {BASE_SCORES}"))
    assert llm(checkout, server, scored(BEST_SCORES), verify=True, tag="t") == 0
    base, best, *_ = commits(checkout)
    found = facts(checkout, "status", "parent", "seed")[2:]
    assert found == [f"verify {p[:7]} {seed}" for seed in (101, 102, 103) for p in (best, base)]
    held = json.loads(checkout.trailers("0003")["Held"])
    assert held.keys() == {"val", "test"} and len(held["test"]) == 20
    report = (checkout.root / "runs/t/report.md").read_text()
    for text in (capsys.readouterr().out, report, checkout.run("--status").stdout):
        assert re.search("On 3 fresh seeds and .*test data .*never used, val_bpb is better by 0.0200 .95 % in", text)
        assert "The search had seen 0.0300: 0.0100 of it was luck." in text
    assert head(checkout) == best and clean(checkout)
    llm(checkout, server, scored(1.2), experiments=1, verify=True)
    assert len(checkout.rows()) == 9 and checkout.trailers("0009")["Bar"] == "1.02"  # enters no mean, is not run again


def test_a_verification_that_was_cut_off_is_completed_in_pairs(checkout, server, capsys):
    """The baseline's run on seed 102 stops the session; the best crashes on seed 103."""
    trap(checkout, 103, FALL)
    trap(checkout, 102, STOP, BASE_SCORES, "plain")
    server.script.append(scored(BEST_SCORES, note="trap"))
    done = checkout.run(*"--sandbox off --experiments 2 --verify --tag t".split(), OPENAI_BASE_URL=server.url)
    assert done.returncode == 130 and facts(checkout, "seed")[2:] == ["101", "101", "102"]
    assert llm(checkout, server, scored(1.2), experiments=1, verify=True) == 0
    assert facts(checkout, "seed")[5:] == ["42", "102", "102", "103", "103"]
    assert facts(checkout, "status", "val_bpb")[-2] == "verify 0.000000"
    assert "On 2 fresh seeds" in capsys.readouterr().out


# Time, tasks, and what stops a start


def test_the_session_ends_at_its_deadline(checkout, capsys):
    assert checkout.session(hours=0.05 / 3600) == 0 and "no time is left for a run" in capsys.readouterr().out
    began = time.monotonic()
    assert checkout.session(hours=5 / 3600) == 0
    assert 1 < time.monotonic() - began < 20 and len(checkout.rows()) >= 2


@pytest.mark.slow
def test_time_is_kept_for_the_verification_and_used_for_nothing_else(checkout, server):
    """What it was expected to take is more than it takes: its runs begin at once."""
    late = "    import os, time; time.sleep(1 * (len(os.environ['AUTORESEARCH_SEED']) < 3))\n"
    text = checkout.text().replace("BPB = None", f"BPB = {BASE_SCORES}")
    checkout.commit(text.replace("def main():\n", f"def main():\n{late}"))
    more = {"proposer": "mix", "experiments": None, "hours": 55 / 3600, "verify": True, "time_budget": 0.5}
    llm(checkout, server, scored(BEST_SCORES), **more)
    found = facts(checkout, "seed")
    assert (
        found[-6:] == ["101", "101", "102", "102", "103", "103"]
        and {len(seed) for seed in found[:-6]} == {2}
        and len(found) > 8
    )


def test_a_task_may_have_another_metric_that_is_higher_better_and_without_noise(folder, server, capsys):
    path = folder.root / "prepare.py"
    more = '"metric": "accuracy", "lower_is_better": False, "budget_s": 0.1, "suspicious": 0.01'
    path.write_text(path.read_text().replace('"metric": "val_bpb"', more).replace('"TOY_NOISE", "0.006"', '"-", "0"'))
    commit_all(folder)
    script = [scored(1.2), scored(1.1), scored(1.2, "\nSET RATE = 2.0"), scored(1.3)]
    llm(folder, server, *script, confirm="always", time_budget=0.0, tag="t")
    found = facts(folder, "status", "accuracy")[1:]  # 14 % at once: without noise that is no reason to doubt
    assert found == ["keep 1.200000", "discard 1.100000", "discard 1.200000", "keep 1.300000"]
    assert folder.trailers("0005")["Conditions"].startswith("accuracy (higher is better)")
    asked = server.asked(3)
    assert asked.index("0004 discard: score 1.2") < asked.index("0003 discard: score 1.1")  # the nearest miss first
    assert "EXPECTED: +0.001" in asked
    assert "best 1.300000 (0005, " in (out := capsys.readouterr().out) and "0.243831 better than the baseline" in out
    assert "+0.100000  score 1.3" in out and head(folder) == commits(folder)[4]


def test_the_readmes_line_for_the_morning_works_as_typed_also_with_a_brief_edited_since(checkout, server):
    llm(checkout, server, scored(1.05), tag="t")
    (checkout.root / "program.md").write_text("Another brief.\n")
    line = re.search(r"\*\*To have the result\*\*: `(.+?)`", (ROOT / "README.md").read_text())[1].replace("<tag>", "t")
    done = subprocess.run(["sh", "-c", line], cwd=checkout.root, env=checkout.env(), capture_output=True, text=True)
    assert done.returncode == 0 and checkout.git("symbolic-ref", "--short", "HEAD") == "main", done
    assert "BPB = 1.05" in checkout.text() and "Another brief." in checkout.git("stash", "show", "-p")


def test_a_session_may_start_on_a_detached_head_and_only_one_at_a_time(checkout, server):
    checkout.git("checkout", "-q", "--detach")

    done, args = [], ("--proposer", "search", "--sandbox", "off")
    llm(checkout, server, scored(1.05), after(lambda: done.append(checkout.run(*args)), scored(1.04)), tag="t")
    assert done[0].returncode == 2 and "running in this checkout already" in done[0].stderr
    assert len(checkout.rows()) == 3 and checkout.git("symbolic-ref", "--short", "HEAD") == "autoresearch/t"


# With torch: the real train.py and prepare.py


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A checkout of the real files on a small data set; no compiler on the path, so that nothing waits for it."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "texts").mkdir()
    for path in [*sorted(Path(json.__file__).parent.parent.glob("[c-d]*.py")), ROOT / "agent.py", ROOT / "prepare.py"]:
        shutil.copy(path, folder / "texts")
    words = [sys.executable, ROOT / "prepare.py", "--dataset", folder / "texts", "--preset", "cpu"]
    subprocess.run([*words, "--cache", folder / "cache"], check=True, capture_output=True)
    checkout = make_checkout(folder / "checkout", folder / "cache", source=ROOT)
    commit_all(checkout)
    (folder / "tools").mkdir()
    for name in ("git", "cp", "rm", "chmod"):
        (folder / "tools" / name).symlink_to(shutil.which(name))
    return checkout, str(folder / "tools")


SUMMARY = "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth"


def test_the_real_files_train_and_score(real, patient, monkeypatch):
    checkout, tools = real
    monkeypatch.setenv("PATH", tools)
    how = {"experiments": 1, "tag": "short", "time_budget": 1.0, "startup_s": 0.0, "sandbox": "auto"}
    assert checkout.session(**how) == 0
    row, found = checkout.rows()[-1], checkout.trailers("0001", "short")
    assert row["status"] == "keep" and 1 < float(row["val_bpb"]) < 12 and int(row["steps"]) > 0
    assert float(found["Tokens-M"]) > 0 and "preset cpu" in found["Conditions"]
    log = (checkout.root / "runs/short/0001/score.log").read_text()
    assert " ".join(re.findall(r"^(\w+): ", log, re.M)[:9]) == SUMMARY and row["val_bpb"] in log


@pytest.mark.slow
def test_a_session_on_real_training(real, server):
    """Baseline, a SET of a size with a block of code, and a leak that the probe at the start finds."""
    checkout, tools = real
    checkout.git("checkout", "-q", "main")
    line = next(line for line in checkout.text().splitlines() if "data.start(model)" in line)
    small = rewrite(line, f"    print('hello from the edit')\n{line}", "SET DEPTH = 3", description="three blocks")
    leak = "    class Leak(GPT):\n        def forward(self, idx):\n"
    leak += "            return super().forward(idx) + 20.0 * F.one_hot(idx.roll(-1, 1), vocab_size)\n"
    model = "    return GPT(vocab_size, seq_len, SimpleNamespace(**SIZES[prepare.active_preset()]))"
    server.script += [small, rewrite(model, leak + model.replace("GPT", "Leak"))]
    words = "--experiments 3 --time-budget 2 --tag long --confirm never".split()
    done = checkout.run(*words, PATH=tools, OPENAI_BASE_URL=server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in checkout.rows() if row["tag"] == "long"]
    assert rows[0]["status"] == "keep" and rows[-1]["status"] == "invalid" and "looks ahead" in rows[-1]["description"]
    log = (checkout.root / "runs/long/0002/run.log").read_text()
    assert rows[1]["status"] in ("keep", "discard", "maybe") and "hello from the edit" in log and "3 blocks" in log
    command = [sys.executable, "prepare.py", *"sample runs/long/best --prompt import".split()]
    done = subprocess.run(command, cwd=checkout.root, env=checkout.env(), capture_output=True, text=True)
    assert done.returncode == 0 and "import" in done.stdout, done.stderr
