"""The model: what it is asked, what a reply leads to, a server that misbehaves: pytest tests/test_model.py

Every test is a session on the toy task whose model is a real HTTP server that answers from a script.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from itertools import pairwise

import pytest
from conftest import ROOT, completion, llm, reply, rewrite, scored, streamed, wait_for

import agent

KEY = "sk-proj-4fZ19c7e51aQ"
AWAY = "192.0.2.1"  # an address that nobody has
NOTE = 'NOTE = "plain"  # no number'
llm = partial(llm, tag="t")
LONG_BRIEF = "Lower the number.\n" * 800


@pytest.fixture(autouse=True)
def every_request_is_well_formed(server):
    """What many servers insist on: turns that alternate, none of them empty."""
    yield
    for body in server.requests:
        roles = [message["role"] for message in body["messages"]]
        assert roles == ["system"] + (["user", "assistant"] * len(roles))[: len(roles) - 1] and roles[-1] == "user"
        assert all(message["content"].strip() for message in body["messages"])


@pytest.fixture
def never(server):
    """A step that gives no answer before the test is over."""
    over = threading.Event()
    yield lambda body: (over.wait(20), (500, {}))[1]
    over.set()


def idea(n):
    """The n-th of many replies that apply, and gain nothing."""
    return reply(f"SET RATE = {0.3 + n / 100:.2f}", description=f"idea {n}")


def broken(n, old="    step = 0"):
    return rewrite(old, f"    raise ValueError({n})", description=f"try {n}")


def said(message, finish="stop", **usage):
    """A reply in another shape."""
    body = completion("", 100) | ({"usage": usage} if usage else {"usage": None})
    body["choices"] = [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}]
    return 200, body


def error(status, message, code=None, **headers):
    return status, {"error": {"message": message, "type": "x", "code": code}}, headers


def descriptions(checkout):
    return [row["description"] for row in checkout.rows()]


def proposers(checkout):
    return " ".join(row["proposer"] for row in checkout.rows())


def gaps(server):
    return [after - before for (before, _), (after, _) in pairwise(server.heard)]


def cannot_start(checkout, url, **more):
    """The one line of a session that ends before it has begun, with nothing changed."""
    with pytest.raises(agent.UserError) as caught:
        checkout.session(**{"proposer": "llm", "base_url": url, "model": "tiny", "experiments": 2, **more})
    assert "\n" not in str(caught.value) and url in str(caught.value)
    assert checkout.git("branch", "--format=%(refname:short)") == "main" and not checkout.refs()
    assert checkout.git("status", "--porcelain") == ""
    return str(caught.value)


# At the start


@pytest.mark.parametrize("models, words", [(["a", "b"], "['a', 'b']"), ([], "none"), (None, ""), ((401, {}), "401")])
def test_no_model_that_can_be_chosen_ends_the_start_with_what_is_listed(checkout, server, models, words):
    server.models = models
    told = cannot_start(checkout, server.url, model="")
    assert words in told and ("--model" in told or "did not list" in told) and not server.requests


REFUSALS = [
    error(401, f"Incorrect API key provided: {KEY}"),
    error(402, "Insufficient Balance"),
    error(403, "Country not supported"),
    error(404, "model 'tiny' not found"),
    error(400, "messages: malformed"),
    error(429, "You exceeded your current quota", "insufficient_quota"),
    error(200, "No auth credentials found", 401),
    (200, "<html>\n<title>Log in</title>\n</html>"),
]


@pytest.mark.parametrize("step", REFUSALS, ids=["401", "402", "403", "404", "400", "quota", "401 in a 200", "page"])
def test_a_refusal_at_the_start_ends_at_once_with_the_servers_words_and_without_the_key(checkout, server, step):
    server.script = [step] * 4
    told = cannot_start(checkout, server.url, api_key=KEY)
    server.requests[2:] = [server.requests[0]] * len(server.requests[2:])  # that one is of another shape
    words = step[1]["error"]["message"].replace(KEY, "***") if isinstance(step[1], dict) else "/v1"
    assert words in told and KEY not in told and "--proposer search" in told
    assert server.heard[0][1]["authorization"] == f"Bearer {KEY}"
    again = step[0] in (400, 402) or not isinstance(step[1], dict)  # in a simpler form, or a little later
    assert len(server.requests) in ((2, 4) if again else (1,))


@pytest.mark.parametrize("model", ["tiny", ""])
def test_a_server_that_is_away_at_the_start_is_said_within_seconds(checkout, model):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    began = time.monotonic()
    assert "--proposer search" in cannot_start(checkout, url, model=model, outage_s=60.0)
    assert time.monotonic() - began < 20


def test_a_server_that_drips_at_the_start_is_given_up_after_the_limit_of_a_reply(checkout, monkeypatch):
    """A byte every tenth of a second: each single read succeeds."""
    monkeypatch.setattr(agent, "REPLY_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(200):
                    time.sleep(0.1)
                    connection.sendall(b" ")

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        assert "no answer within" in cannot_start(checkout, f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        assert time.monotonic() - began < 15


# A server that misbehaves


def test_passing_troubles_are_waited_out_with_growing_waits(checkout, server):
    """At the start too; each conversation begins anew with the shortest wait."""
    card = "You exceeded your current quota of requests per min. Please retry in 14 s, or add a payment method."
    troubles = [error(429, card, "rate_limit_exceeded"), (502, "<html>\nBad Gateway</html>"), "nothing"]
    odd = [error(200, "upstream is gone", 529), (200, {"choices": []}), "nothing"]
    llm(checkout, server, *troubles, *odd, error(503, "overloaded"), idea(1), experiments=2, outage_s=60.0)
    assert proposers(checkout) == "baseline llm" and len(server.requests) == 8
    assert all(wait > least for wait, least in zip(gaps(server), (0.45, 0.95, 0, 0.45, 0.95, 0, 0.45), strict=True))


def test_retry_after_is_obeyed_and_beyond_the_patience_the_search_stands_in_at_once(checkout, server):
    busy = (error(429, "busy", **{"Retry-After": after}) for after in ("1.2", "3600"))
    server.script = [next(busy), idea(1), next(busy)]
    began = time.monotonic()
    llm(checkout, server, idea(2), experiments=4, outage_s=30.0)
    assert gaps(server)[0] >= 1.2 and time.monotonic() - began < 25
    assert proposers(checkout) == "baseline llm search llm"


def test_what_refuses_later_is_one_line_and_the_search_stands_in_each_time(checkout, server, capsys):
    down = [error(401, f"key {KEY} revoked"), error(403, "Log in"), error(503, f"down, {KEY}")]
    server.script = [idea(1), *down[:2], idea(2), *down[2:] * 9]
    assert llm(checkout, server, experiments=6, outage_s=0.7, api_key=KEY) == 0
    assert proposers(checkout) == "baseline llm search search llm search"
    told = [line for line in capsys.readouterr().out.splitlines() if "the search makes this one" in line]
    assert len(told) == 3 and "key *** revoked" in told[0] and "down, ***" in told[2]
    assert "revoked" in checkout.trailers("0003")["Instead"]
    written = [path.read_text(errors="replace") for path in checkout.root.rglob("*") if path.is_file()]
    assert any("down, ***" in text for text in written) and not any(KEY in text for text in written)
    assert KEY not in checkout.git("log", "-p", "--glob=refs/autoresearch/*")


def test_a_server_that_hangs_is_given_up_after_what_is_usual_for_it(checkout, server, never, monkeypatch):
    monkeypatch.setattr(agent, "REPLY_S", 1.5)
    began = time.monotonic()
    llm(checkout, server, idea(1), never, idea(2), outage_s=1.5)
    assert proposers(checkout) == "baseline llm search llm" and time.monotonic() - began < 15


def test_a_slow_model_is_not_a_silent_one(checkout, server):
    """Each reply takes longer than an outage, and the first is of no use."""
    late = [lambda body, text=text: (time.sleep(0.8), text)[1] for text in ("nothing", idea(1), idea(2))]
    llm(checkout, server, *late, experiments=3, outage_s=0.4)
    assert proposers(checkout) == "baseline llm llm"


def test_a_server_that_hangs_holds_up_neither_ctrl_c_nor_the_deadline(checkout, server, never, capsys):
    began = time.monotonic()
    assert llm(checkout, server, never, experiments=None, hours=3 / 3600) == 0 and time.monotonic() - began < 18
    assert "leaves no row" in capsys.readouterr().out and not checkout.refs()
    server.script.append(never)
    process = checkout.started("--hours", "1", OPENAI_BASE_URL=server.url)
    wait_for(lambda: len(server.requests) > 1, "the request")
    process.send_signal(signal.SIGINT)
    began, (out, _) = time.monotonic(), process.communicate(timeout=60)
    assert time.monotonic() - began < 18  # then it would answer
    assert process.returncode == 130 and "leaves no row" in out and not checkout.refs()


@pytest.mark.slow
def test_a_model_that_is_too_slow_does_not_eat_the_verifications_time(checkout, server, never, capsys):
    """The session waits for it while there is time for another run, and no longer."""
    more = {"experiments": None, "hours": 25 / 3600, "verify": True, "time_budget": 0.5}
    assert llm(checkout, server, scored(1.05), never, **more) == 0
    assert [row["status"] for row in checkout.rows()] == ["keep", "keep"] + ["verify"] * 6
    assert "On 3 fresh seeds" in capsys.readouterr().out


def test_a_refused_limit_of_the_reply_is_renamed_then_made_smaller_and_that_is_remembered(checkout, server):
    old = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    poor = error(402, "You requested up to 32000 tokens, but can only afford 4096")
    llm(checkout, server, error(400, old), idea(1), poor, idea(2), idea(3), experiments=4)
    found = [[body[name] for name in body if name.startswith("max_")] for body in server.requests]
    assert found == [[32000], [32000], [32000], [8000], [8000]] and "max_completion_tokens" in server.requests[1]
    assert proposers(checkout) == "baseline llm llm llm"


@pytest.mark.parametrize("words", ["System role not supported", "Conversation roles must alternate user/assistant"])
def test_a_refused_system_message_goes_into_the_users_once_and_remembered(checkout, server, words):
    refuse = lambda body: error(400, words) if body["messages"][0]["role"] == "system" else idea(1)  # noqa: E731
    llm(checkout, server, refuse, refuse, "nothing", idea(2), experiments=3)
    assert proposers(checkout) == "baseline llm llm" and len(server.requests) == 4
    whole, roles = server.requests[1]["messages"][0]["content"], [m["role"] for m in server.requests[3]["messages"]]
    assert "DESCRIPTION: at most 80" in whole and "# Now" in whole and roles == ["user", "assistant", "user"]
    server.requests.clear()  # of another shape than the others


def test_a_reply_is_asked_for_as_a_stream_and_taken_in_either_form(checkout, server):
    usage = {"prompt_tokens": 700, "completion_tokens": 77, "total_tokens": 777}
    script = [streamed(idea(1), usage=usage), idea(2), streamed(idea(3), finish=None), streamed(idea(4), end="")]
    llm(checkout, server, *script)
    assert descriptions(checkout)[1:] == [f"idea {n}" for n in range(1, 5)]
    assert checkout.rows()[1]["llm_tokens"] == "777" and all(body["stream"] for body in server.requests)
    assert all(body["model"] == "tiny" and "temperature" not in body for body in server.requests)
    assert checkout.trailers("0002")["Model"] == "tiny"


def test_after_three_replies_that_were_cut_off_the_search_proposes(checkout, server):
    cut = said({"content": "<think>" + "and so on " * 2000}, finish="model_length")
    llm(checkout, server, idea(1), cut, cut, cut, experiments=3)
    assert proposers(checkout) == "baseline llm search" and len(server.requests) == 4
    assert sum(len(message["content"]) for message in server.requests[3]["messages"][2:]) < 1000  # without the thoughts


def test_a_stream_that_breaks_off_or_fails_is_asked_for_again_and_one_at_its_limit_goes_back(checkout, server):
    begun = streamed(idea(9), finish=None, end="")
    cut = 200, [*begun[1], 'data: {"choices": [{"del']  # within a line
    failed = 200, [*begun[1], 'data: {"error": {"message": "worker died", "code": 502}}\n\n']
    script = [streamed(idea(1)), cut, streamed(idea(2)), begun, failed]
    script += [streamed(idea(3), finish="length"), streamed(idea(4))]
    llm(checkout, server, *script, experiments=4, outage_s=20.0)
    assert descriptions(checkout)[1:] == ["idea 1", "idea 2", "idea 4"] and "was cut off after" in server.asked(6)
    assert "worker died" in (checkout.root / "runs" / "t" / "0004" / "llm.md").read_text()


@pytest.mark.parametrize("how", ["a stream called plain", "plain called a stream", "a line separator"])
def test_an_answer_is_known_by_what_it_is_and_not_by_what_it_is_called(checkout, server, how):
    called = {"Content-Type": "application/json" if how == "a stream called plain" else "text/event-stream"}
    answer = completion(idea(1)) if how == "plain called a stream" else streamed(idea(1).replace(" ", "\u2028", 1))[1]
    llm(checkout, server, (200, answer, called))
    assert proposers(checkout) == "baseline llm" and len(server.requests) == 1


def test_a_form_that_is_refused_in_whatever_words_is_made_simpler(checkout, server):
    words = "Developer instruktion is not enabled for models/tiny"
    refuse = lambda body: error(400, words) if body["messages"][0]["role"] == "system" else idea(1)  # noqa: E731
    llm(checkout, server, refuse, refuse, refuse, refuse, idea(2), experiments=3)
    assert proposers(checkout) == "baseline llm llm" and len(server.requests) == 5
    assert [len(body["messages"]) for body in server.requests] == [2, 2, 2, 1, 1]
    server.requests.clear()  # of another shape than the others


@pytest.mark.parametrize("status, words", [(400, "stream is not supported"), (422, "stream_options: extra inputs")])
def test_a_server_that_refuses_streams_or_their_options_is_asked_without_from_then_on(checkout, server, status, words):
    llm(checkout, server, error(status, words), idea(1), idea(2), experiments=3)
    assert proposers(checkout) == "baseline llm llm"
    then = (None if status == 400 else True, False)
    assert [(b.get("stream"), "stream_options" in b) for b in server.requests] == [(True, True), then, then]


SURROUNDINGS = {
    "a proxy without its package": {"ALL_PROXY": "socks5://127.0.0.1:9", "OPENAI_BASE_URL": f"http://{AWAY}/v1"},
    "no such certificates": {"SSL_CERT_FILE": "/nowhere", "OPENAI_BASE_URL": f"https://{AWAY}/v1"},
    "an odd port": {"OPENAI_BASE_URL": f"http://{AWAY}:80x/v1"},
    "an open bracket": {"OPENAI_BASE_URL": f"http://[{AWAY}/v1"},
}


@pytest.mark.parametrize("what", SURROUNDINGS)
def test_odd_surroundings_are_one_line(checkout, what):
    done = checkout.run("--sandbox", "off", **SURROUNDINGS[what])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and AWAY in done.stderr, done.stderr


def test_a_server_on_this_machine_is_reached_without_the_proxy_and_a_url_may_end_in_white_space(checkout, server):
    server.script = [(400, {"detail": "no such thing"})] * 4
    done = checkout.run("--sandbox", "off", HTTP_PROXY="http://127.0.0.1:9", OPENAI_BASE_URL=f"{server.url} \r")
    assert done.returncode == 2 and "no such thing" in done.stderr and len(server.requests) == 4
    del server.requests[3]  # without a system message


TOO_LONG = {
    "Chinese": error(422, "\u8f93\u5165\u8fc7\u957f"),
    "a proxy": (413, "<html>Request Entity Too Large</html>"),
    "a crash": error(500, "CUDA error: an illegal memory access was encountered"),
}


@pytest.mark.parametrize("words", ["a crash", "Chinese"])
def test_a_request_that_is_too_long_in_whatever_words_is_shortened(checkout, server, words):
    """By its oldest diffs and rows."""
    lines = [NOTE, *(f"{NOTE}\n" + "# a long remark of the model's\n" * 120 + f"K{i} = 0" for i in range(2))]
    keeps = [rewrite(lines[0], lines[i], description=f"keep {i}") + f"SET BPB = {1.05 - i / 100}\n" for i in (1, 2)]
    llm(checkout, server, *keeps, TOO_LONG[words], idea(1), idea(2), experiments=5, outage_s=0.5)
    assert proposers(checkout) == "baseline llm llm llm llm" and len(server.requests) == 5
    whole, short = server.asked(2), server.asked(3)
    assert len(whole) > 12_000 and "0002 keep: keep 1\n" in whole
    assert len(short) < len(whole) - 3000 and "0002 keep: keep 1\n" not in short and "0003 keep: keep 2\n" in short
    assert "Lower the number." in short and "def build_model" in short and "# Now" in short
    assert ("0002 keep: keep 1\n" in server.asked(4)) == (words == "a crash")  # which may have been a passing one


def test_a_request_that_stays_too_long_is_left_to_the_search(checkout, server):
    (checkout.root / "program.md").write_text(LONG_BRIEF)
    llm(checkout, server, idea(1), *[TOO_LONG["a proxy"]] * 5, idea(2), experiments=4)
    assert proposers(checkout) == "baseline llm search llm" and len(server.requests) == 7
    streamed = [bool(body.get("stream")) for body in server.requests[1:6]]
    assert streamed == [True, True, True, False, False]  # as it was, with half the history, in three other forms
    del server.requests[5]  # without a system message


# What becomes of a reply


def test_the_reply_is_found_in_whatever_shape_and_its_tokens_counted_or_estimated(checkout, server):
    parts = [{"type": "text", "text": text} for text in (idea(3)[:40], idea(3)[40:])]
    odd = "t\tab \x00 café ∞ " + "x" * 100
    shapes = [
        {"content": "", "reasoning": idea(1)},
        {"content": None, "reasoning_content": idea(2)},
        {"content": parts},
        {"content": f"<think>Perhaps\nSET DECAY = 0.9\n</think>\n{idea(4)}", "reasoning": idea(9)},
        {"content": reply("SET NOTE = 'é∞'\nSET RATE = 0.5", description=odd)},
    ]
    counted = said(shapes.pop(), prompt_tokens=1200, completion_tokens=34, total_tokens=0)
    llm(checkout, server, *map(said, shapes), counted)
    rows = checkout.rows()[1:]
    assert [r["description"] for r in rows[:4]] == ["idea 1", "idea 2", "idea 3", "idea 4"]
    assert rows[4]["description"] == ("t ab café ∞ " + "x" * 100)[:80] and rows[4]["llm_tokens"] == "1234"
    assert "'é∞'" in checkout.git("show", f"{rows[4]['commit']}:train.py")
    chars = sum(len(message["content"]) for message in server.requests[0]["messages"]) + len(idea(1))
    assert int(rows[0]["llm_tokens"]) == pytest.approx(chars / 4, rel=0.05)


def test_a_reply_of_no_use_goes_back_with_a_lesson(checkout, server, capsys):
    """After three of them the conversation begins anew."""
    missing = rewrite("    step = 1\n    while not data.expired:", "    pass").replace("<<<", "SET RATE = 0.7\n<<<", 1)
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": ""}}
    tool = said({"content": None, "tool_calls": [call]})
    replies = [missing, said({"content": idea(1)}, "length"), tool, reply("SET NAME = value"), idea(2)]
    llm(checkout, server, *replies, experiments=2)
    assert [len(body["messages"]) for body in server.requests] == [2, 4, 6, 8, 4]
    lessons = [server.asked(i) for i in (1, 2, 3, 4)]
    assert "    while not data.expired():" in lessons[0] and "These did apply: SET RATE" in lessons[0]
    assert "cut off" in lessons[1] and "no tools are called here" in lessons[2] and "not an edit" in lessons[3]
    assert all("every edit of it" in lesson for lesson in lessons)
    assert server.requests[1]["messages"][2] == {"role": "assistant", "content": missing.strip()}
    assert descriptions(checkout) == ["baseline", "idea 2"]
    assert checkout.trailers("0002")["Refused"] == "4" and capsys.readouterr().out.count("refused before training") == 4
    kept = (checkout.root / "runs" / "t" / "0002" / "llm.md").read_text()
    assert "Lower the number." in kept and missing in kept and idea(2) in kept and lessons[3] in kept


def test_a_repeat_is_refused_with_the_earlier_row_also_by_a_hairs_breadth(checkout, server):
    near = reply("SET RATE = 0.3102", description="nearly")
    llm(checkout, server, idea(1), idea(1), near, rewrite(NOTE, NOTE + "  # really"), idea(2), experiments=3)
    assert re.search(r"repeats experiment (t/)?0002 +discard +1\.\d+ .* idea 1", server.asked(2))
    assert re.search(r"repeats experiment (t/)?0002", server.asked(3)) and "nothing but comments" in server.asked(4)
    assert descriptions(checkout) == ["baseline", "idea 1", "idea 2"]


def test_twenty_useless_replies_hand_this_one_to_the_search_and_the_next_is_asked_for_as_ever(checkout, server):
    llm(checkout, server, idea(1), *["nothing"] * 20, idea(2), experiments=4, outage_s=60.0)
    assert proposers(checkout) == "baseline llm search llm" and len(server.requests) == 22
    assert checkout.trailers("0003")["Instead"] == "20 replies in a row could not be used"
    first, second, anew = (body["messages"] for body in server.requests[1:4])  # the same again ends a conversation
    assert len(first) == len(anew) == 2 and len(second) == 4 and first != anew  # and has another example


def test_a_first_reply_of_no_use_to_a_request_that_was_counted_short_gets_a_guess(checkout, server, capsys):
    (checkout.root / "program.md").write_text(LONG_BRIEF)
    counted = {"prompt_tokens": 500, "completion_tokens": 5, "total_tokens": 505}
    useless = [said({"content": text}, **counted) for text in ("nothing", "no")]
    llm(checkout, server, *useless, idea(1), experiments=2)
    assert proposers(checkout) == "baseline llm" and capsys.readouterr().out.count("perhaps the server cuts") == 1
    llm(checkout, server, said({"content": idea(2)}, **counted), experiments=1)  # a good reply is used
    assert descriptions(checkout)[-1] == "idea 2" and "perhaps the server cuts" not in capsys.readouterr().out


def test_after_max_llm_tokens_the_search_goes_on_alone(checkout, server):
    llm(checkout, server, idea(1), "nothing", "nothing", idea(2), experiments=4, max_llm_tokens=250)
    assert proposers(checkout) == "baseline llm search search" and len(server.requests) == 3  # in mid-conversation
    assert "--max-llm-tokens" in checkout.trailers("0003")["Instead"]


def test_a_crash_goes_back_with_diff_and_log_and_is_one_row(checkout, server):
    first = rewrite("    step = 0", "    print('before the fall')\n    step = None + 1", description="first try")
    second = rewrite("    step = None + 1", "    step = 0 + 0", description="second try")
    llm(checkout, server, first, second, experiments=2)
    crash = server.asked(1)
    assert "+    step = None + 1" in crash and "> before the fall" in crash and "TypeError" in crash
    (row,) = checkout.rows()[1:]
    assert (row["status"], row["description"], row["llm_tokens"]) == ("discard", "second try", "200")
    folder = checkout.root / "runs" / "t" / "0002"
    names = ("crash1-train.py", "crash1-run.log", "train.py", "llm.md")
    crashed, log, mended, exchange = ((folder / name).read_text() for name in names)
    assert "None + 1" in crashed and "TypeError" in log and "None + 1" not in mended and "second try" in exchange


def test_after_two_repairs_or_where_none_comes_the_crash_stands(checkout, server):
    two = [broken(1), broken(2, "    raise ValueError(1)"), broken(3, "    raise ValueError(2)")]
    llm(checkout, server, *two, broken(4), error(401, "revoked"), idea(1), experiments=4)
    assert descriptions(checkout) == ["baseline", "try 3 (ValueError: 3)", "try 4 (ValueError: 4)", "idea 1"]
    assert [r["status"] for r in checkout.rows()] == ["keep", "crash", "crash", "discard"] and len(server.requests) == 6


def test_mix_takes_turns(checkout, server):
    llm(checkout, server, idea(1), idea(2), proposer="mix", experiments=4)
    assert proposers(checkout) == "baseline llm search llm"


# What is asked


BRIEF = "Lower the number.\n\n## Role: architecture\n\nLook at the blocks.\n\n## Hints\n\nAll may read this.\n\n"
BRIEF += "## Role: optimizer\nLook at the rates.\n### A detail\nof the optimizer\n"


def test_roles_take_turns_and_a_changed_brief_counts_from_the_next_request(checkout, server):
    (checkout.root / "program.md").write_text(BRIEF)

    def change(body):
        (checkout.root / "program.md").write_text(BRIEF + "\n## Role: data\nLook at the rows.\n## End\nThe end.\n")
        return idea(3)

    llm(checkout, server, idea(1), idea(2), change, scored(1.05))
    turns = " ".join(row["role"] for row in checkout.rows())
    assert turns == "- architecture optimizer architecture architecture"  # of three by then, the fourth is the first's
    first, second = server.asked(0), server.asked(1)
    assert "Look at the blocks." in first and "Look at the rates" not in first and "All may read this." in first
    assert "Look at the rates.\n### A detail\nof the optimizer" in second and "Look at the blocks" not in second
    assert os.path.commonprefix([first, second]).count("All may read this.") == 1
    assert "The end." not in server.asked(2) and "The end." in server.asked(3)
    last = [checkout.git("show", f"{row['commit']}:program.md") for row in checkout.rows()[-2:]]
    assert all("The end." in brief for brief in last)


def test_the_request_holds_the_record_failures_notes_near_misses_log_and_role_in_order(checkout, server, monkeypatch):
    """What stays the same longest comes first, so that prompt caches hit."""
    monkeypatch.setattr(agent, "REPAIR_TRIES", 0)
    (checkout.root / "program.md").write_text(BRIEF)
    (checkout.root / "runs" / "t").mkdir(parents=True)
    (checkout.root / "runs" / "t" / "notes.md").write_text("## Works\nnothing so far\n")
    llm(checkout, server, scored(1.05), broken(1), scored(1.3), idea(1))
    system, user = (message["content"] for message in server.requests[-1]["messages"])
    parts = ["Lower the number.", "preset cpu, data toy", "\nBPB = 1.05 ", "+BPB = 1.05 ", "nothing so far"]
    parts += ["t/0001  keep ", "t/0002  keep      1.050000  +0.006169  score 1.05\n"]
    parts += ["t/0003  crash            -             try 1 (ValueError: 1)\n"]
    parts += ["t/0004  discard   1.300000  -0.250000  score 1.3\n", "+BPB = 1.3 ", "# The last run, 0004"]
    parts += ["Loss by share", "> step ", "Look at the rates.", "noise of a seed", "SET "]
    places = [user.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), dict(zip(parts, places))
    assert 1 <= user.count("> step ") <= 5  # the curve tells of the others
    assert "SEARCH" in system and all(body["messages"][0]["content"] == system for body in server.requests)
    same = os.path.commonprefix([server.asked(2), server.asked(3)])
    assert "t/0003  crash" in same  # of two requests on one best, all up to the new row
    names = [re.fullmatch(r"SET (\w+) = [\d.]+", text.splitlines()[-1])[1] for text in map(server.asked, range(4))]
    assert {*names} <= {"RATE", "DECAY", "ROWS", "DEPTH", "HEADS", "BPB"} and len({*names}) > 1  # a whole example


def lengthen(checkout, count):
    """Put a record of so many rows under refs/autoresearch/t/, one in fifteen a keep, as copies of the second one."""
    (base, two), text = sorted(checkout.refs().items()), checkout.text()
    message, stream = checkout.git("log", "-1", "--format=%B", two[1]), []
    for i in range(3, count + 1):
        value, status, size = (1.05 - i / 1e5, "keep", 80) if i % 15 == 0 else (1.06 + i / 1e5, "discard", 400)
        new = {"Id": f"{i:04d}", "Status": status, "Score": value, "Text": f"{i:040x}", "Program": f"p{i}"}
        about = message.replace("idea 1", f"{i} " + "a long description of what was tried "[:36] * 2)
        for name, to in new.items():
            about = re.sub(rf"^{name}: .*$", f"{name}: {to}", about, flags=re.M)
        body = text + "".join(f"# remark {i} {k} of the model, which likes to talk at length\n" for k in range(size))
        about, body = (f"data {len(part.encode())}\n{part}\n" for part in (about, body))
        stream.append(f"commit refs/autoresearch/t/{i:04d}\ncommitter u <u@u> 1700000000 +0000\n{about}")
        stream.append(f"from {base[1]}\nM 100644 inline train.py\n{body}")
    subprocess.run(["git", "fast-import", "--quiet"], cwd=checkout.root, input="".join(stream), text=True, check=True)


def test_a_request_is_bounded_though_the_record_is_long(checkout, server):
    """300 rows, a train.py and a brief of the real size: 24,000 tokens, at four characters each."""
    (checkout.root / "program.md").write_text((ROOT / "program.md").read_text())
    checkout.commit(checkout.text() + "# as long as the real one\n" * 1000)
    llm(checkout, server, idea(1))
    lengthen(checkout, 300)
    notes = "## Works\n" + "- a long note of what works, and of what does not\n" * 60
    llm(checkout, server, notes, idea(2), idea(3), idea(4), experiments=3)
    text, later = server.asked(3), server.asked(4)
    assert text.count("\nt/0") == 301 and "a long note" in text and "# Near misses" in text
    assert len(text) + len(server.requests[3]["messages"][0]["content"]) < 4 * 24_000
    assert len(os.path.commonprefix([text, later])) > 0.7 * len(text)


def test_every_ten_rows_the_model_renews_its_notes_which_say_whose_they_are(checkout, server, monkeypatch):
    monkeypatch.setattr(agent, "NOTES_ROWS", 1)
    notes, ideas, asked = iter(["## Works\nalpha", "no heading", "## Works\ngamma"]), iter(range(1, 20)), []

    def answer(body):
        asked.append("Write the notes" in body["messages"][-1]["content"])
        return next(notes) if asked[-1] else idea(next(ideas))

    llm(checkout, server, *[answer] * 20, experiments=5)
    assert asked == [False] + [True, False] * 3
    runs, shown = checkout.root / "runs" / "t", [server.asked(i) for i in range(7)]
    text = (runs / "notes.md").read_text()
    assert text.startswith("<!-- Written by tiny after experiment 0004") and "program.md" in text and "gamma" in text
    assert ["alpha" in part for part in shown] == [False] * 2 + [True] * 4 + [False] and "gamma" in shown[6]
    assert "alpha" in (runs / "0004" / "notes.md").read_text()  # the former ones, of that row's folder


def test_after_eight_misses_the_question_changes_and_again_with_each_further_one(checkout, server, monkeypatch):
    shutil.copy(ROOT / "program.md", checkout.root)
    monkeypatch.setattr(agent, "STUCK_ROWS", 1)
    llm(checkout, server, *map(idea, range(1, 5)), scored(1.05), idea(7))
    found = [re.search(r"# Nothing was kept for (\d+) experiments?\n\n(.+)\n", server.asked(i)) for i in range(6)]
    assert [m and m[1] for m in found] == [None, "1", "2", "3", "4", None] and len({m[2] for m in found if m}) == 4


# Asked ahead


@pytest.mark.parametrize("where", ["on this machine", "elsewhere"])
def test_the_next_is_asked_for_while_one_trains_if_the_model_is_away(checkout, server, tmp_path, monkeypatch, where):
    """Such a server is reached through a proxy, which here answers itself."""
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    flag, seen = tmp_path / "asked", []

    def second(body):
        seen.extend(row["id"] for row in checkout.rows())
        flag.touch()
        return idea(2)

    ahead = where == "elsewhere"
    url = f"http://{AWAY}/v1" if ahead else server.url
    lines = f"import os, time\n    until = time.monotonic() + 4\n    while not os.path.exists({str(flag)!r})"
    wait = f"    {lines} and time.monotonic() < until:\n        time.sleep(0.01)\n    step = 0"
    first = rewrite("    step = 0", wait, description="waits") if ahead else idea(1)
    llm(checkout, server, first, second, base_url=url, guard=False)
    assert seen == ["0001"] + ["0002"] * (not ahead) and len(checkout.rows()) == 3 and len(server.requests) == 2
    assert ("# Running now" in server.asked(1)) == ahead


def test_what_was_asked_ahead_is_applied_to_the_best_as_it_is_by_then(checkout, server):
    llm(checkout, server, scored(1.05), reply("SET DECAY = 0.1", description="next"), prefetch=True)
    assert "\nBPB = None" in server.asked(1) and "+BPB = 1.05" in server.asked(1)
    _, keep, last = checkout.rows()
    assert (keep["status"], last["status"], last["parent"]) == ("keep", "discard", keep["commit"])
    text = checkout.git("show", f"{last['commit']}:train.py")
    assert "\nBPB = 1.05" in text and "\nDECAY = 0.1" in text


@pytest.mark.parametrize("how", ["a whole file", "a block", "the same"])
def test_what_does_not_fit_the_new_best_is_dropped_and_asked_for_anew(checkout, server, capsys, how):
    late = {
        "a whole file": reply(f"```python\n{checkout.text().replace('DECAY = 0.2', 'DECAY = 0.1')}```"),
        "a block": rewrite(NOTE, "NOTE = 'late'"),
        "the same": reply("SET NOTE = 'kept'"),
    }[how]
    llm(checkout, server, scored(1.05, note="kept"), late, idea(3), prefetch=True, experiments=3)
    assert capsys.readouterr().out.count("dropped before training") == 1 and len(server.requests) == 3
    _, keep, last = checkout.rows()
    assert last["description"] == "idea 3" and last["parent"] == keep["commit"]


def test_what_repeats_the_running_one_goes_back(checkout, server):
    llm(checkout, server, idea(1), idea(1), idea(2), prefetch=True, experiments=3)
    assert "repeats experiment" in server.asked(2) and "that runs now" in server.asked(2)
    assert descriptions(checkout) == ["baseline", "idea 1", "idea 2"]


def test_the_key_does_not_reach_a_run(checkout, server, monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, KEY)
    spy = rewrite("    step = 0", "    import os\n    print('seen', dict(os.environ))\n    step = 0")
    llm(checkout, server, spy, guard=False, api_key=KEY)
    log = (checkout.root / "runs" / "t" / "0002" / "run.log").read_text()
    assert "seen {" in log and KEY not in log and "OPENAI" not in log
