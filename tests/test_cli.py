"""agent.py as a person uses it: a terminal, a pipe, Ctrl-C, a wrong command line: pytest tests/test_cli.py"""

import os
import pty
import re
import select
import signal
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
from conftest import ROOT, reply, rewrite, streamed, wait_for

SEARCH = ["--proposer", "search", "--sandbox", "off"]


def is_untouched(checkout):
    changed = checkout.git("status", "--porcelain") or checkout.refs() or list(checkout.root.glob("runs/[a-z]*"))
    return not changed and checkout.git("branch", "--format=%(refname:short)") == "main"


def one_line(done, *words):
    """Whether a command ended with exit status 2 and one line that has these words."""
    assert done.returncode == 2 and re.fullmatch("agent.py: .*\n", done.stderr), done.stderr
    return all(word in done.stderr for word in words)


# What is printed


def test_help_and_the_docs_name_every_option_and_importing_does_nothing(checkout):
    shown = checkout.run("--help")
    assert shown.returncode == 0 and "python agent.py --ask" in shown.stdout
    options = "hours experiments tag proposer model planner trackio time-budget max-llm-tokens prefetch confirm verify"
    options += " sandbox status report ask share agent workers task"
    assert re.findall(r"^  --([a-z-]+)", shown.stdout, re.M) == options.split()
    assert set(re.findall(r"--no-[a-z]+", shown.stdout)) == {"--no-prefetch", "--no-verify"}
    code = "import sys, agent; print([m for m in ('torch', 'openai', 'matplotlib', 'psutil') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_a_pipe_gets_plain_lines_and_the_tag_is_the_date(checkout):
    checkout.pictures = True
    done = checkout.run(*SEARCH, "--experiments", "3")
    assert done.returncode == 0 and done.stderr == "" and not re.search(r"[\x1b\r]", done.stdout)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("NO SANDBOX (as asked for). What the model writes runs with your rights")
    tag = checkout.rows()[0]["tag"]
    assert tag in {f"{datetime.now() - timedelta(hours=h):%b%d}".lower() for h in (0, 1)}
    what = "val_bpb (lower is better), preset cpu, data toy f00d, 0.03 s of training"
    assert lines[1].startswith(f"autoresearch/{tag}: {what}, ") and lines[1].endswith("; proposals by search")
    assert lines[2] == "0001  keep      1.056169             baseline"
    assert re.match(r"0003  (keep|discard) +1\.\d{6} +[-+]0\.\d{6}  [A-Z]+ \S+ -> ", lines[4])
    assert lines[5].startswith(f"3 rows in this session. autoresearch/{tag}: {what}, ")
    assert re.match(r"best 1.\d+ .*, 0.\d+ better than the", lines[6])
    assert f"runs/{tag}/: report.md, progress.png, best/" in done.stdout
    assert (checkout.root / "runs" / tag / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert lines[2] in (checkout.root / "runs" / tag / "session.log").read_text()


def in_a_terminal(checkout, *args, **env):
    """What agent.py writes into a terminal."""
    ours, theirs = pty.openpty()
    options = {"cwd": checkout.root, "env": checkout.env(TERM="xterm", COLUMNS="160", **env)}
    process = subprocess.Popen(checkout.command(*args), stdin=theirs, stdout=theirs, stderr=theirs, **options)
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 30)[0]:
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    assert process.wait(60) == 0
    return shown.decode()


def test_a_terminal_gets_a_live_line(checkout):
    shown = in_a_terminal(checkout, *SEARCH, "--experiments", "2", "--hours", "1", "--time-budget", "1.5")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    live = r"0002 [A-Z]+ \S+ -> .*: training \d+%, loss \d\S+ \| lr 1.00 \| tok/s 1000; 0:59:\d\d left; best 1\.\d+"
    assert re.search(live, text) and "\x1b[K" in shown
    assert text.count("0001  keep") == 1


def test_a_terminal_shows_how_much_of_a_reply_has_come(checkout, server):
    server.script, server.pause_s = [streamed(reply("SET RATE = 1.1"))], 0.4
    shown = in_a_terminal(checkout, "--sandbox", "off", "--experiments", "2", OPENAI_BASE_URL=server.url)
    assert re.search(r"asking tiny, \d+ s, \d\.\d kB have come", shown) and "0002  " in shown


def test_status_and_report_work_at_any_time(checkout):
    assert one_line(checkout.run("--status"), "no experiments are recorded here")
    process = checkout.started(*SEARCH, "--time-budget", "0.5", "--tag", "a")
    try:
        wait_for(lambda: len(checkout.refs()) >= 2, "two rows")
        during = checkout.run("--status")
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "an experiment that was under way leaves no row" in out
    assert during.returncode == 0 and re.search(r"^0001  keep", during.stdout, re.M) and "0.5 s of tr" in during.stdout
    checkout.git("checkout", "-q", "main")
    (checkout.root / "results.tsv").unlink()
    (checkout.root / "runs/a/report.md").unlink()
    for words in (["--status"], ["--status", "--tag", "a"], ["--report"]):
        shown = checkout.run(*words)
        assert shown.returncode == 0 and "autoresearch/a" in shown.stdout and shown.stderr == "", words
        assert re.search(r"noise of a seed 0.00[^\0]*0001  keep      1\.056169 .*baseline", shown.stdout)
    assert one_line(checkout.run("--status", "--tag", "b"), "under the tag b")
    assert shown.stdout.strip() == checkout.text("runs/a/report.md").strip()


def test_the_report_says_which_brief_model_and_role_found_how_much_in_how_many_tries(checkout, server):
    crash = rewrite("    step = 0", "    raise TypeError('no')", description="bad | worse")
    gone = 404, {"error": {"message": "gone"}}
    edits = ["SET BPB = 1.05", "SET BPB = 1.2", "SET BPB = 1.2"]
    server.script += [*map(reply, edits), crash, gone, gone]
    checkout.run("--sandbox", "off", "--experiments", "5", "--tag", "r", OPENAI_BASE_URL=server.url)
    text = checkout.text("runs/r/report.md")
    assert text.startswith("# autoresearch/r\n") and "![progress](progress.png)" in text
    found = {row[1].strip(): row[2:5] for line in text.splitlines() if len(row := line.split("|")) > 5}
    assert found["tiny"] == found["generalist"] == [" 3 ", " 1 ", " 1 "] and found["search"][0] == " 1 "
    assert found[checkout.git("rev-parse", "HEAD:program.md")[:10]][0] == " 4 "  # tried, kept, crashed
    anomalies = text.split("## Anomalies")[1]
    assert all(words in anomalies for words in ("1 replies were refused", "crash: TypeError: no", "404 - gone"))


def test_ask_prints_request_and_reply_and_changes_nothing(checkout, server):
    server.script += [reply("SET RATE = 2.0", description="faster"), reply("SET NO = 1")]
    shown = checkout.run("--ask", OPENAI_BASE_URL=server.url)
    assert shown.returncode == 0 and "Lower the number." in shown.stdout and "def build_model" in shown.stdout
    assert "tokens in all, applies: faster" in shown.stdout and "SET RATE = 2.0" in shown.stdout
    shown = checkout.run("--ask", "--time-budget", "9", OPENAI_BASE_URL=server.url)
    assert "SET NO = 1" in shown.stdout and "Did you mean NOTE" in shown.stdout
    assert one_line(shown, "1 replies in a row could not be used") and is_untouched(checkout)


# What the user must fix: one line, exit 2, nothing changed

WRONG = {
    "--hours 0": "--hours must be a positive number",
    "--experiments -1": "--experiments must be a positive number",
    "--time-budget nan": "--time-budget must be a positive number",
    "--max-llm-tokens 0": "--max-llm-tokens must be a positive number",
    "--hours 0.001 --time-budget 60": "--hours 0.001 is shorter than one run of 60 s",
    "--tag ../x": "--tag ../x: use letters, digits, - and _",
    "--share . --agent a-b": "--agent a-b: use letters, digits and _",
    "--tag x.lock": "--tag x.lock: use letters",
    "--share nowhere": "nowhere",
    "--share . --agent a..b": "use letters, digits",
    "--agent a": "--share .",
}


@pytest.mark.parametrize("args", WRONG)
def test_a_wrong_command_line_is_one_line(checkout, args):
    assert one_line(checkout.run(*SEARCH, *args.split()), WRONG[args]) and is_untouched(checkout)


def test_verify_alone_verifies_and_says_where_there_is_nothing_to(checkout, server):
    done = checkout.run("--verify", "--sandbox", "off", "--tag", "v")
    assert one_line(done, "nothing was kept") and is_untouched(checkout)
    server.script.append(reply("SET BPB = 1.05"))
    checkout.run("--sandbox", "off", "--experiments", "2", "--tag", "v", OPENAI_BASE_URL=server.url)
    done = checkout.run("--verify", "--sandbox", "off")
    assert done.returncode == 0 and "On 3 fresh seeds" in done.stdout and len(checkout.rows()) == 8


def test_where_no_model_is_configured_both_ways_on_are_named(checkout):
    for args in ((), ("--ask", "--proposer", "search")):
        assert one_line(checkout.run(*args), "OPENAI_API_KEY", "OPENAI_BASE_URL", "--proposer search")
    assert is_untouched(checkout)


@pytest.mark.parametrize("args", ["--hours x", "--proposer magic", "--confirm perhaps", "--sandbox on", "--what"])
def test_an_unknown_option_or_value_is_argparses_own_line(checkout, args):
    done = checkout.run(*args.split())
    assert done.returncode == 2 and args.split()[0] in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_folder_that_is_no_repository_or_has_no_commit_says_what_to_type(folder):
    assert one_line(folder.run(*SEARCH), "git init && git add -A && git commit -m start")
    folder.git("init", "-q")
    assert one_line(folder.run(*SEARCH), "git add -A && git commit -m start")


def test_a_train_py_that_does_not_parse_and_a_branch_elsewhere_are_named(checkout):
    whole = checkout.text()
    checkout.commit(whole + "def (\n")
    assert one_line(checkout.run(*SEARCH), "train.py does not parse: ")
    checkout.commit(whole)
    assert checkout.run(*SEARCH, "--experiments", "1", "--tag", "one").returncode == 0
    checkout.git("checkout", "-q", "main")
    assert one_line(checkout.run(*SEARCH, "--tag", "one"), "git checkout autoresearch/one", "--tag NAME")


@pytest.mark.parametrize("name, value", [("BASE_URL", "localhost:8000"), ("BASE_URL", "ftp://x"), ("API_KEY", "sk x")])
def test_a_wrong_environment_is_one_line(checkout, name, value):
    words = "is no URL; it looks like http://localhost:8000/v1" if name == "BASE_URL" else "OPENAI_API_KEY has blanks"
    assert one_line(checkout.run("--model", "m", **{f"OPENAI_{name}": value}), words) and is_untouched(checkout)
