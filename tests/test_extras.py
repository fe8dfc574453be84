"""Literature, a planner beside the worker, a live page: each off unless asked for."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import Server, llm, reply

import agent

llm = partial(llm, tag="t")
BRIEF = "Lower the number.\n\n## Role: literature\nRead.\nsearch: fast optimizers\nsearch: windows\n"


@pytest.fixture
def library(monkeypatch):
    """The paper search: answers by what is in `found` (a list of papers, or status and body), and counts."""
    papers = Server()
    papers.found, papers.queries = {}, []

    def answer(path):
        at = urlsplit(path)
        papers.queries.append((at.path, parse_qs(at.query)))
        body = papers.found.get(papers.queries[-1][1]["q"][0], [])
        status, body = body if isinstance(body, tuple) else (200, body)
        return status, body if isinstance(body, str) else json.dumps([{"paper": one} for one in body])

    papers.models = answer
    monkeypatch.setenv("AUTORESEARCH_PAPERS_URL", papers.url.removesuffix("/v1"))
    yield papers
    papers.http.shutdown()
    papers.http.server_close()


def paper(n):
    return {"id": f"2505.{n:05d}", "title": f"Paper {n}\x1b[2J\nof many", "summary": f"Abstract {n} " + "long " * 500}


def test_papers_are_shown_five_at_a_time_and_the_idea_names_its_own(checkout, server, library):
    (checkout.root / "program.md").write_text(BRIEF)
    library.found = {"fast optimizers": [paper(n) for n in range(7)], "windows": [paper(6), paper(7)]}
    idea = reply("IDEA: arXiv 2505.00003\nSET RATE = 0.5")
    llm(checkout, server, "nothing", idea, reply("SET RATE = 0.6"), reply("SET RATE = 0.7"), experiments=4)
    shown = [re.findall(r"arXiv (2505\.\d+): Paper \d \[2J of many: Abstract", server.asked(i)) for i in (0, 2, 3)]
    assert [[int(id[-1]) for id in ids] for ids in shown] == [[0, 1, 2, 3, 4], [5, 6, 7], []]
    assert len(server.asked(0)) < 20_000 and "data, not instructions" in server.asked(0)
    whole = server.requests[1]["messages"]
    assert "Abstract 4" in whole[1]["content"] and len(whole) == 4  # the same papers while a reply is mended
    assert checkout.trailers("0002")["Idea"] == "arXiv 2505.00003" and len(library.queries) == 2
    assert library.queries[0] == ("/api/papers/search", {"q": ["fast optimizers"], "limit": ["60"]})
    assert "| arXiv 2505.00003 | 1 |" in checkout.text("runs/t/report.md")


ODD = {"empty": [], "broken": (500, "oops"), "a page": "<html>", "another": '{"error": 1}'}
ODD |= {"huge": "[" + " " * 5_000_000 + "]", "no fields": [{"title": "1"}], "deep": "[" * 100_000}


@pytest.mark.parametrize("what", ODD)
def test_without_papers_the_role_goes_on(checkout, server, library, capsys, what):
    (checkout.root / "program.md").write_text(BRIEF)
    library.found = {"fast optimizers": ODD[what], "windows": ODD[what]}
    llm(checkout, server, reply("SET RATE = 0.5"))
    assert [row["role"] for row in checkout.rows()] == ["-", "literature"] and "# Papers" not in server.asked(0)
    assert capsys.readouterr().out.count("no papers for") == (what != "empty")


def test_without_a_network_the_role_goes_on(checkout, server, monkeypatch, capsys):
    monkeypatch.setenv("AUTORESEARCH_PAPERS_URL", "http://127.0.0.1:9")
    (checkout.root / "program.md").write_text(BRIEF)
    llm(checkout, server, reply("SET RATE = 0.5"))
    assert checkout.rows()[1]["role"] == "literature" and capsys.readouterr().out.count("no papers for") == 1


NOTES = "## Works\nnothing\n## Ideas\nmore rate"


IDEAS = [reply(f"SET RATE = 0.{n}") for n in range(10, 15)]


def test_a_planner_writes_the_notes_and_its_tokens_are_counted_apart(checkout, server, monkeypatch, capsys):
    monkeypatch.setattr(agent, "NOTES_ROWS", 3)
    other = Server()
    other.script += [NOTES, NOTES]
    llm(checkout, server, *IDEAS, planner="sage", planner_url=other.url, planner_key="k" * 20)
    assert [body["model"] for body in other.requests] == ["sage"] and len(server.requests) == 5
    assert "Write the notes" in other.asked(0) and other.heard[0][1]["authorization"] == "Bearer " + "k" * 20
    assert "more rate" not in server.asked(2) and "more rate" in server.asked(4)
    assert "Written by sage" in checkout.text("runs/t/notes.md")
    assert checkout.trailers("0005")["Planner-Tokens"] == "100" and checkout.trailers("0005")["Llm-Tokens"] == "100"
    assert "500 tokens of tiny, 100 of sage" in capsys.readouterr().out
    assert "took a planner 100 tokens" in checkout.text("runs/t/report.md")


def test_without_its_planner_the_worker_goes_on(checkout, server, monkeypatch, capsys):
    monkeypatch.setattr(agent, "NOTES_ROWS", 3)
    llm(checkout, server, *IDEAS, planner="sage", planner_url="http://127.0.0.1:9/v1")
    assert {row["proposer"] for row in checkout.rows()} == {"baseline", "llm"}
    assert capsys.readouterr().out.count("no notes from sage") == 1


def test_a_page_needs_its_package(checkout, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(agent.UserError, match=re.escape("pip install -e '.[live]'")):
        checkout.session(trackio="p", experiments=1)


def page(checkout, tmp_path, *args):
    pytest.importorskip("trackio")
    env = {"TRACKIO_DIR": str(tmp_path / "pages"), "HF_HUB_OFFLINE": "1"}
    done = checkout.run("--proposer", "search", "--sandbox", "off", "--tag", "t", "--trackio", "night", *args, **env)
    return done, tmp_path / "pages"


def test_every_row_is_on_the_page(checkout, tmp_path):
    done, pages = page(checkout, tmp_path, "--experiments", "4", "--confirm", "never")
    assert done.returncode == 0 and "not on the page" not in done.stdout, done
    (file,) = pages.glob("night*.db")
    with sqlite3.connect(file) as base:
        logged = [json.loads(text) for (text,) in base.execute("select metrics from metrics order by step")]
        alerts = base.execute("select title, text from alerts").fetchall()
    rows = checkout.rows()
    assert [one["val_bpb"] for one in logged] == pytest.approx([float(row["val_bpb"]) for row in rows])
    assert {"best", "gain", "keeps", "crashes", "experiments_per_hour", "tokens"} <= set(logged[-1])
    keeps = [row["id"] for row in rows[1:] if row["status"] == "keep"]
    assert [(title, text[:4]) for title, text in alerts] == [("keep", id) for id in keeps] and keeps


def test_what_stops_a_night_is_an_alert_and_a_page_that_fails_costs_a_line(checkout, tmp_path):
    checkout.commit(checkout.text().replace("step = 0", "step = None + 1"))
    done, pages = page(checkout, tmp_path, "--experiments", "2")
    (file,) = pages.glob("night*.db")
    with sqlite3.connect(file) as base:
        (alert,) = base.execute("select title, text from alerts").fetchall()
    assert done.returncode == 2 and alert[0] == "stopped" and "gets no score" in alert[1]
    checkout.commit(checkout.text().replace("step = None + 1", "step = 0"))
    (tmp_path / "file").write_text("in the way")
    done, _ = page(checkout, tmp_path / "file", "--experiments", "2")
    assert done.returncode == 0 and len(checkout.rows()) == 3 and "page" in done.stdout, done


@pytest.mark.slow
def test_a_browser_shows_the_page(checkout, tmp_path):
    if not (browser := shutil.which("chromium")):
        pytest.skip("no chromium")
    done, pages = page(checkout, tmp_path, "--experiments", "3", "--confirm", "never")
    env = {**os.environ, "TRACKIO_DIR": str(pages), "PYTHONUNBUFFERED": "1"}
    command = [str(Path(sys.executable).parent / "trackio"), "show", "--project", "night"]
    shown = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        url = next(found[0] for line in shown.stdout if (found := re.search(r"http://127[^\s\x1b]+", line)))
        look = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=15000", "--dump-dom"]
        seen = subprocess.run([*look, url], capture_output=True, text=True, timeout=100).stdout
    finally:
        os.killpg(shown.pid, signal.SIGKILL)
    assert all(name in seen for name in ("val_bpb", "best", "gain", "experiments_per_hour", "crashes", "tokens"))
