"""What a night's record says at length: pytest tests/test_report.py"""

import os
import re
import signal
from dataclasses import replace

import pytest
from conftest import ROOT
from test_belief import BASE, row
from test_group import BRIEF
from test_loop import llm, rewrite, scored

import agent

# Themes


def test_a_theme_is_the_heading_that_most_of_an_edit_stands_under():
    text = (ROOT / "train.py").read_text()

    def with_change(*changes):
        new = text
        for old, replacement in changes:
            assert new.count(old) == 1
            new = new.replace(old, replacement)
        return agent.theme(text, new)

    head_lr, warmdown = ("HEAD_LR = 0.01", "HEAD_LR = 0.02"), ("WARMDOWN = 0.75", "WARMDOWN = 0.5")
    assert with_change(head_lr) == "AdamW" and with_change(warmdown) == "Schedule"
    assert with_change(("MLP_RATIO = 4.0", "MLP_RATIO = 3.0")) == "Architecture"
    assert with_change(("DEPTH=4, HEADS=2, HEAD_DIM=64", "DEPTH=4, HEADS=3, HEAD_DIM=64")) == "Hyperparameters"
    block = ("        x = x + self.att", "        y = x\n        z = y\n        x = z + self.att")
    assert with_change(head_lr, block) == "Model"
    assert with_change(("import copy\n", "")) == "the beginning"
    assert agent.theme(text, text) == "nothing" and agent.theme("", "A = 1\n") == "the beginning"


# Intervals


def test_intervals_of_a_share_and_of_a_rate():
    assert agent.wilson(0, 10) == pytest.approx((0, 0.278), abs=1e-3)  # a textbook's
    assert agent.wilson(5, 10) == pytest.approx((0.237, 0.763), abs=1e-3)
    rows = [row(i, 0.99 if i % 10 == 0 else 1.1, bar=1.0, wall_s=360.0, status="keep" if i % 10 == 0 else "discard")
            for i in range(2, 102)]
    hours = {r.commit: 0.1 for r in rows}
    rate, low, high = map(float, re.findall(r"[\d.]+", agent.gain_an_hour(rows, hours)))
    assert rate == 0.01 and 0.003 < low < 0.007 and 0.013 < high < 0.019
    assert agent.gain_an_hour(rows[:40], hours) == "0.0100 (too few keeps)"


def test_an_hour_is_by_the_clock_with_waits_and_repeats_but_without_pauses():
    def at(minute, number, **more):
        return row(number, time=f"2026-01-01T{minute // 60:02}:{minute % 60:02}:00Z", wall_s=300.0, **more)

    rows = [at(5, 1, proposer="baseline"), at(12, 2), at(17, 3, status="verify"), at(322, 4),
            at(327, 5, status="verify", seed=101), at(500, 6, tag="other")]
    found = agent.hours_of(rows)
    assert {id: round(60 * hours) for id, hours in found.items()} == {"c1": 5, "c2": 12, "c4": 15, "c6": 5}


# Anomalies


def test_anomalies_are_told_and_nothing_else():
    assert agent.anomalies([BASE]) == []
    rows = [
        replace(BASE, time="2026-01-01T00:05:14Z"),
        row(2, 1.1, status="discard", time="2026-01-01T00:10:28Z", refused=3, repeats=2),
        row(3, None, status="crash", reason="out of memory", time="2026-01-01T00:15:42Z"),
        row(4, None, status="invalid", reason="looks ahead", time="2026-01-01T02:20:56Z", stood_in="503: busy"),
        row(5, 1.0, status="verify", text_key="key1", seed=43, tokens_M=45.0, time="2026-01-01T02:26:10Z"),
        row(6, 1.0, status="verify", text_key="key1", seed=44, time="2026-01-01T02:31:24Z"),
    ]
    rows[0] = replace(rows[0], text_key="key1")
    assert agent.anomalies(rows) == [
        "3 replies were refused before training, 2 of them as repeats",
        "1 invalid (0004): 1 x looks ahead",
        "1 crash (0003): 1 x out of memory",
        "drift: 0005, a repeat of 0001, saw -10.0% tokens",
        "1 proposed by the search in the model's place: 1 x 503: busy",
        "nothing ran for 2.0 h before 0004",
    ]


# The whole


def table_of(text, head):
    """Rows of the table of a report whose first column has this name, as lists of cells."""
    lines = text.split(f"\n| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_report_is_made_from_the_record_alone(checkout, server, capsys):
    (checkout.root / "program.md").write_text(BRIEF)
    repeat = scored(1.05)
    crash = rewrite("    step = 0", "    raise TypeError('no')", description="bad | worse")
    script = scored(1.05), repeat, crash, "no mending", "no", "no", "no", scored(1.2), scored(1.04)
    assert llm(checkout, server, *script, experiments=5, tag="r") == 0
    path = checkout.root / "runs/r/report.md"
    first = path.read_text()
    assert "report: runs/r/report.md" in capsys.readouterr().out
    for name in ("results.tsv", "runs/r/report.md", "runs/r/session.log"):
        (checkout.root / name).unlink()
    assert agent.show_report(checkout.config()) == 0
    text = path.read_text()
    assert text == first == capsys.readouterr().out and text.startswith("# autoresearch/r\n\nNot verified")
    assert [cells[:3] for cells in table_of(text, "id")] == [
        ["0001", "1.056169", "-"], ["0002", "1.050000", "0.006169, within the noise"],
        ["0005", "1.040000", "0.010000"]]
    themes = {cells[0]: cells[1:] for cells in table_of(text, "theme")}
    assert sum(int(cells[0]) for cells in themes.values()) == 4 and sum(int(cells[2]) for cells in themes.values()) == 1
    roles = {cells[0]: cells[1:] for cells in table_of(text, "role")}
    assert {name: cells[:2] for name, cells in roles.items()} == {"architecture": ["2", "1"], "optimizer": ["2", "1"]}
    assert table_of(text, "proposer") == [["tiny", "4", "2", "1", "0", "0.0162", "+0.1500", "900"]]
    assert table_of(text, "asked for")[0][:2] == ["an experiment", "4"]
    assert "* 1 crash (0003): 1 x TypeError: no" in text and "of them as repeats" in text
    brief = checkout.git("rev-parse", f"{checkout.record()[-1].commit}:program.md")[:7]
    (cells,) = table_of(text, "brief")
    assert cells[:4] == [brief, "tiny", "r/0005", "4"] and cells[4].startswith("2 (50%, 15% to 85%)")
    assert "In words" not in text and "Verification" not in text and "![progress](progress.png)" in text


@pytest.mark.slow
def test_briefs_of_several_branches_are_compared(checkout, server):
    assert llm(checkout, server, scored(1.05), scored(1.2), tag="one") == 0
    checkout.git("checkout", "-q", "main")
    (checkout.root / "program.md").write_text("Raise the number.\n")
    assert llm(checkout, server, scored(1.3), tag="two") == 0
    assert checkout.session(proposer="search", experiments=2, tag="two") == 0
    table = table_of((checkout.root / "runs/two/report.md").read_text(), "brief")
    assert [cells[1:4] for cells in table] == [["tiny", "one/0003", "2"], ["tiny", "two/0002", "1"],
                                               ["search", "two/0004", "2"]]
    assert table[0][0] != table[1][0] and table[2][0] == "any"
    assert float(table[0][5].split()[0]) > 0 and float(table[1][5].split()[0]) == 0


def test_refusals_are_counted_once_whoever_asks_and_whatever_crashes(checkout, server, monkeypatch):
    crash = rewrite("    step = 0", "    raise TypeError('no')", description="bad")
    script = scored(1.2), scored(1.2), crash, "no edit", scored(1.3), scored(1.2), scored(1.2), scored(1.4)
    assert llm(checkout, server, *script, experiments=4, tag="a") == 0
    assert [(r.refused, r.repeats) for r in checkout.record()] == [(None, None), (None, None), (2, 1), (1, 1)]
    checkout.git("checkout", "-q", "main")
    script = scored(1.05), scored(1.3), *[scored(1.3)] * 2, scored(1.4)
    assert llm(checkout, server, *script, experiments=4, tag="b", prefetch=True) == 0
    mine = [r for r in checkout.record() if r.tag == "b"]
    assert [(r.refused, r.repeats) for r in mine] == [(None, None)] * 3 + [(2, 2)]


@pytest.mark.slow
def test_what_stands_in_for_a_silent_model_is_in_the_record(checkout, server):
    gone = [(404, {"error": {"message": "no such model"}})]
    assert llm(checkout, server, scored(1.05), *gone, experiments=3, tag="s") == 0
    assert [r.stood_in for r in checkout.record()] == [None, None, "404: no such model"]
    assert "1 proposed by the search in the model's place: 1 x 404: no such model" in (
        checkout.root / "runs/s/report.md").read_text()


def test_prose_comes_from_the_model_where_there_is_one_and_stays(checkout, server, monkeypatch, capsys):
    monkeypatch.setattr(agent, "NOTES_ROWS", 3)
    monkeypatch.setattr(agent, "notes_due", lambda s: False)
    words = "<think>hm</think># Big words\nIt went well.\n## The way to hell\nMore."
    assert llm(checkout, server, scored(1.05), scored(1.2), words, experiments=3, tag="p") == 0
    path = checkout.root / "runs/p/report.md"
    said = "## In words\n\nBy tiny, after 0003; not checked.\n\nBig words\nIt went well.\nThe way to hell\nMore.\n\n"
    assert said + "## The way to the best" in path.read_text()
    asked = server.requests[-1]["messages"][1]["content"]
    assert "## What was tried" in asked and re.search("p/0003 +discard", asked) and "Big words" not in asked
    assert agent.show_report(checkout.config()) == 0 and path.read_text().count(said) == 1
    assert agent.show_report(checkout.config(base_url=server.url)) == 0  # the script is over
    found = capsys.readouterr()
    assert path.read_text().count(said) == 1 and "no new words of a model: 500: the script is over" in found.err
    unknown = (400, {"error": {"message": "Unsupported parameter: max_tokens", "param": "max_tokens"}})
    server.script += [unknown, "Less well."]   # many models have another name for it
    assert agent.show_report(checkout.config(base_url=server.url)) == 0
    assert "Less well." in path.read_text() and "Big words" not in path.read_text()


def test_ctrl_c_leaves_a_report_and_no_question(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "NOTES_ROWS", 1)
    monkeypatch.setattr(agent, "notes_due", lambda s: False)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # whatever started the tests may ignore it

    def interrupt(body):
        os.kill(os.getpid(), signal.SIGINT)
        return scored(1.3)

    assert llm(checkout, server, scored(1.05), interrupt, experiments=5, tag="c") == 130
    assert len(server.requests) == 2 and "0002" in (checkout.root / "runs/c/report.md").read_text()


def test_from_the_command_line(checkout):
    shown = checkout.run("--report")
    assert (shown.returncode, shown.stdout) == (2, "") and shown.stderr == (
        "agent.py: there is nothing to report: no experiment is recorded\n")
    checkout.session(experiments=2, tag="mine")
    shown = checkout.run("--report", "--tag", "mine")   # another one has the checkout, or none
    assert shown.returncode == 0 and shown.stderr == "" and shown.stdout.startswith("# autoresearch/mine\n")
    assert (checkout.root / "runs/mine/progress.png").stat().st_size > 10_000


def test_a_table_holds_any_description():
    assert agent.markdown_table(["a", "b"], [["x | y", "two\nlines"]]).splitlines()[2] == "| x / y | two lines |"


def test_reply_field_idea_ends_the_field_before_it():
    found = agent.parse_reply("HYPOTHESIS: it helps\nIDEA: 3\nDESCRIPTION: d\nSET RATE = 2")
    assert (found.hypothesis, found.idea, found.description) == ("it helps", "3", "d")
