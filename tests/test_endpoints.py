"""The model's endpoint misbehaves: errors, outages, hangs, odd answers, limits: pytest tests/test_endpoints.py"""

import email.utils
import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import NamedTuple

import pytest
from conftest import reply

import agent

slow = pytest.mark.slow   # here: a further case of what another test shows, or several seconds of waiting
KEY = "sk-proj-4fZ19c7e51aQ"
NEVER_S = 12   # what "for ever" is here, so that a client that waits for ever fails and does not hang

# ----------------------------------------------------------------------------------------------------------------------
# A server that misbehaves. A step is a function of the connection; it answers, or does not


class Asked(NamedTuple):
    """One request as it came in; `at` by the monotonic clock, `clock` by the wall's."""

    body: dict
    headers: dict
    at: float
    clock: float

    @property
    def text(self):
        return "".join(message["content"] for message in self.body["messages"])

    @property
    def last(self):
        return self.body["messages"][-1]["content"]

    @property
    def tokens(self):
        """What said() counts for this request and its reply."""
        return len(self.text) // 4 + 10


class Rough:
    """A chat completions server. Requests for a proposal take the script's steps, then `after`; short ones take those
    of `short`, its last one for good. While `down` is set, it is the answer to all. `silent` steps end with `over`."""

    def __init__(self):
        self.script, self.after, self.down = [], answers(500, error("the script is over")), None
        self.short = [answers(503, error("not yet"))]
        self.asked, self.background, self.over = [], [], threading.Event()
        self.models = answers(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})
        self.port = 0
        self.listen()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def listen(self):
        self.http = QuietServer(("127.0.0.1", self.port), handler_of(self))
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        """Nobody listens any more: connections are refused."""
        self.http.shutdown()
        self.http.server_close()

    def step(self, asked):
        """What to do with a request, by its size: one for a proposal shows the whole train.py."""
        long = len(asked.text) > 1000
        (self.asked if long else self.background).append(asked)
        if self.down:
            return self.down
        if not long:
            return self.short.pop(0) if len(self.short) > 1 else self.short[0]
        return self.script.pop(0) if self.script else self.after


class QuietServer(ThreadingHTTPServer):
    request_queue_size = 50

    def handle_error(self, request, client_address):
        pass   # a client that hung up


def handler_of(rough):
    class Handler(BaseHTTPRequestHandler):
        over = rough.over

        def do_GET(self):
            (rough.down or rough.models)(self)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.asked = Asked(body, {k.lower(): v for k, v in self.headers.items()}, time.monotonic(), time.time())
            step = rough.step(self.asked)
            (said(step) if isinstance(step, str) else step)(self)

        def log_message(self, *args):
            pass

    return Handler


def answers(status, body, **headers):
    """A step: status, headers, body; a body that is no text is sent as JSON."""

    def step(handler):
        kind = "text/html" if isinstance(body, str) and body.startswith("<") else "application/json"
        data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return step


def error(message, code=None, **more):
    return {"error": {"message": message, "type": "x", "code": code, **more}}


def completion(message, finish="stop", usage=None):
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}
    more = {} if usage is None else {"usage": usage}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice], **more}


def said(text, finish="stop"):
    """A step: a reply with an honest count of tokens."""

    def step(handler):
        total = handler.asked.tokens
        usage = {"prompt_tokens": total - 10, "completion_tokens": 10, "total_tokens": total}
        answers(200, completion({"content": text}, finish, usage))(handler)

    return step


def idea(n):
    """The n-th of many replies that apply."""
    return reply(f"SET RATE = {2 + n / 100}", description=f"idea {n}")


def ideas():
    """A step that answers with another idea each time."""
    numbers = iter(range(50, 90))
    return lambda handler: said(idea(next(numbers)))(handler)


def closes(handler):
    """No answer at all: the connection ends in order."""


def resets(handler):
    """The connection is reset in the middle of the body."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "10000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"index": 0, ')
    time.sleep(0.1)   # the client reads this part
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.connection.close()


def silent(handler):
    """Never an answer."""
    handler.over.wait(NEVER_S)


def drips(handler, status=200):
    """A byte of white space every 0.2 s, for ever: each single read succeeds."""
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    for _ in range(5 * NEVER_S):
        if not handler.over.wait(0.2):
            handler.wfile.write(b" ")


def drips_an_error(handler):
    drips(handler, 500)


def drips_headers(handler):
    """The same before the body begins."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
    for _ in range(5 * NEVER_S):
        if not handler.over.wait(0.2):
            handler.wfile.write(b"x")


def stalls(handler):
    """A beginning after a while, and then nothing more."""
    time.sleep(0.8)
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{")
    silent(handler)


def late(seconds, step):
    def wait(handler):
        time.sleep(seconds)
        (said(step) if isinstance(step, str) else step)(handler)

    return wait


@pytest.fixture
def rough():
    rough = Rough()
    yield rough
    rough.over.set()
    rough.down, rough.short = None, ["OK"]   # so that a session's background request comes to its end
    closing = threading.Timer(3, rough.close)
    closing.daemon = True
    closing.start()


def run(checkout, rough, experiments=2, **more):
    """A session with this server; experiments=2 is the baseline and one proposal."""
    given = {"proposer": "llm", "base_url": rough.url, "model": "tiny", "budget_s": 0.03}
    return checkout.session(**{**given, "experiments": experiments, **more})


def ask(checkout, rough, capsys, **more):
    """What --ask prints: one request, nothing trained."""
    config = checkout.config(**{"proposer": "llm", "base_url": rough.url, "model": "tiny", **more})
    assert agent.show_request(config) == 0
    return capsys.readouterr().out


def cannot_start(checkout, url, **more):
    """The one line of a session that ends before it has begun, with nothing changed; test_cli.py shows that it is
    exit 2."""
    with pytest.raises(agent.UserError) as caught:
        checkout.session(**{"proposer": "llm", "base_url": url, "model": "tiny", "experiments": 2, **more})
    assert "\n" not in str(caught.value) and url in str(caught.value)
    assert checkout.git("branch", "--format=%(refname:short)") == "main" and not checkout.record()
    assert checkout.git("status", "--porcelain") == "" and not checkout.rows()
    return str(caught.value)


def proposers(checkout):
    return [r.proposer for r in checkout.record()]


def lines_with(capsys, *words):
    return [line for line in capsys.readouterr().out.splitlines() if all(word in line for word in words)]


def gaps(asked):
    return [round(b.at - a.at, 2) for a, b in pairwise(asked)]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------------------------
# At the start


@pytest.mark.parametrize(
    "step, why",
    [
        (answers(401, error("Incorrect API key provided")), "Incorrect API key"),
        (answers(402, error("Insufficient Balance")), "Insufficient Balance"),
        (answers(403, error("Country not supported")), "Country not supported"),
        (answers(404, error("model 'tiny' not found")), "'tiny' not found"),
        (answers(400, error("messages: malformed")), "messages: malformed"),
        (answers(429, error("You exceeded your quota", "insufficient_quota")), "exceeded your quota"),
        (answers(200, error("No auth credentials found", 401)), "No auth credentials"),
        (answers(200, "<html>\n<title>Log in</title>\n</html>"), ""),
    ],
    ids=["401", "402", "403", "404", "400", "quota", "401 in a 200", "HTML"],
)
def test_a_refusal_at_the_start_ends_at_once(checkout, rough, step, why):
    rough.script, began = [step], time.monotonic()
    assert why in cannot_start(checkout, rough.url)
    assert len(rough.asked) == 1 and time.monotonic() - began < 2


def test_a_redirect_to_a_page_at_the_start_ends_at_once(checkout, rough):
    rough.models = answers(200, "<html>Log in</html>")
    rough.script = [answers(302, "<html>moved</html>", Location="/login")]
    cannot_start(checkout, rough.url)
    assert len(rough.asked) == 1


@pytest.mark.parametrize("how", ["refused", "reset", pytest.param("no such host", marks=slow)])
def test_a_server_that_cannot_be_reached_is_tried_for_a_while_at_the_start(checkout, rough, how):
    """min(5, outage_s) seconds, here 1, then exit 2."""
    rough.after, url = resets, rough.url
    if how == "refused":
        rough.close()
    began = time.monotonic()
    cannot_start(checkout, "http://no-such-host.invalid/v1" if how == "no such host" else url, outage_s=1.0)
    assert 0.4 < time.monotonic() - began < 4
    assert how != "reset" or len(rough.asked) > 1


@pytest.mark.parametrize("model", ["", pytest.param("tiny", marks=slow)], ids=["model asked for", "model named"])
def test_a_server_that_is_just_starting_is_waited_for(checkout, rough, capsys, model):
    rough.close()
    rough.script = [idea(1)]
    threading.Timer(0.7, rough.listen).start()
    assert "The reply applies: idea 1" in ask(checkout, rough, capsys, model=model, outage_s=4.0)


# ----------------------------------------------------------------------------------------------------------------------
# Waiting out

ADD_A_CARD = ("Rate limit reached on requests per min. Please try again in 20s. You can increase your rate limit by "
              "adding a payment method to your account at https://platform.openai.com/account/billing.")


@pytest.mark.parametrize(
    "step",
    [
        answers(429, error(ADD_A_CARD, "rate_limit_exceeded")),
        pytest.param(answers(529, error("overloaded")), marks=slow),
        *(pytest.param(answers(status, error("busy")), marks=slow) for status in (429, 500, 502, 503)),
        answers(200, error("upstream is gone", 502)),
        pytest.param(answers(200, {"choices": []}), marks=slow),
    ],
    ids=["429 that advertises", "529", "429", "500", "502", "503", "502 in a 200", "no choices"],
)
def test_a_passing_error_is_waited_out_even_at_the_start(checkout, rough, capsys, step):
    rough.script = [step, idea(1)]
    assert "The reply applies: idea 1" in ask(checkout, rough, capsys, outage_s=5.0)
    assert 0.45 < gaps(rough.asked)[0] < 0.9


PASSING = {
    "reset": resets,
    "closed": closes,
    "a page": answers(200, "<html>\nwelcome to\nthe hotel</html>"),
    "an error page": answers(502, "<html>\n<h1>Bad\nGateway</h1></html>"),
    "half of the JSON": answers(200, '{"choices": [{"index": 0, "mess'),
    "null": answers(200, "null"),
    "no JSON": answers(200, "[" * 100_000),
    "broken gzip": answers(200, b"no gzip", Content_Encoding="gzip"),
    "no UTF-8": answers(200, b'{"choices": "\xff\xfe"}'),
    "an error without a code": answers(200, error("upstream")),
    "an error of a proxy": answers(200, {"error": "upstream"}),
    "no message": answers(200, {"choices": [{"index": 0, "message": None}]}),
}


@slow
@pytest.mark.parametrize("names", [list(PASSING)[:3], list(PASSING)[3:]], ids=["no answer", "odd answer"])
def test_troubles_in_mid_session_are_waited_out(checkout, rough, capsys, names):
    """Each meets the request after an unusable reply."""
    rough.script = ["nothing"]
    for name in names:
        rough.script += [PASSING[name], "nothing"]
    rough.after = said(idea(1))
    assert run(checkout, rough, outage_s=60.0) == 0 and proposers(checkout) == ["baseline", "llm"]
    waits = dict(zip(names, gaps(rough.asked)[1::2], strict=True))
    assert all(0.45 < wait < 1.2 for wait in waits.values()), waits
    assert len(rough.asked) == 2 * len(names) + 2 and not lines_with(capsys, "no answer")


@slow
def test_waits_double(checkout, rough, capsys):
    rough.script = [answers(503, error("busy")), answers(429, error("busy")), idea(1)]
    ask(checkout, rough, capsys, outage_s=5.0)
    assert gaps(rough.asked) == pytest.approx([0.5, 1.0], abs=0.3)


@pytest.mark.parametrize("status", [429, pytest.param(503, marks=slow)])
def test_retry_after_in_seconds(checkout, rough, capsys, status):
    rough.script = [answers(status, error("busy"), Retry_After="1"), idea(1)]
    ask(checkout, rough, capsys, outage_s=5.0)
    assert 1.0 <= gaps(rough.asked)[0] < 1.35


def in_a_while(seconds):
    """An HTTP date, rounded to whole seconds as such dates are."""
    return email.utils.formatdate(int(time.time() + seconds), usegmt=True)


@slow
def test_retry_after_as_a_date(checkout, rough, capsys):
    when = in_a_while(2.2)
    rough.script = [answers(429, error("busy"), Retry_After=when), idea(1)]
    ask(checkout, rough, capsys, outage_s=6.0)
    late_s = rough.asked[1].clock - email.utils.parsedate_to_datetime(when).timestamp()
    assert -0.05 <= late_s < 1.3


ODD = "soon", "-5", "1e999", "", "Wed, 21 Oct 2015 07:28:00 GMT"


@pytest.mark.parametrize("value", ["nan", *(pytest.param(value, marks=slow) for value in ODD)])
def test_an_odd_retry_after_is_no_reason_to_stop(checkout, rough, capsys, value):
    """A date that has passed may be asked again at once, what is no time after the ordinary wait."""
    rough.script = [answers(429, error("busy"), Retry_After=value), idea(1)]
    assert "The reply applies: idea 1" in ask(checkout, rough, capsys, outage_s=5.0)
    assert gaps(rough.asked)[0] < 1.0


@pytest.mark.parametrize(
    "value, first",
    [pytest.param("3600", False, marks=slow), pytest.param("tomorrow", True, marks=slow), ("99999999999", True)],
    ids=["an hour", "a day", "for ever"],
)
def test_a_retry_after_beyond_the_limit_is_not_waited_for(checkout, rough, capsys, value, first):
    """The search proposes at once, and nobody asks before that moment: not in the background either."""
    value = in_a_while(86_400) if value == "tomorrow" else value
    rough.script = ([] if first else [idea(1)]) + [answers(429, error("busy"), Retry_After=value)]
    began = time.monotonic()
    run(checkout, rough, experiments=4 if first else 5, outage_s=0.5)
    assert proposers(checkout) == ["baseline"] + ["llm"] * (not first) + ["search"] * 3
    assert len(rough.asked) == 2 - first and not rough.background and time.monotonic() - began < 8
    assert len(lines_with(capsys, "no answer from tiny (")) == 1


@slow
def test_after_such_a_retry_after_the_model_is_asked_again(checkout, rough, capsys):
    rough.script = [idea(1), answers(429, error("busy"), Retry_After="1")]
    rough.after, rough.short = ideas(), ["OK"]
    run(checkout, rough, experiments=8, outage_s=0.4)
    found = proposers(checkout)
    assert found[:3] == ["baseline", "llm", "search"] and found[-1] == "llm"
    assert min(asked.at for asked in rough.asked[2:] + rough.background) - rough.asked[1].at >= 1.0
    assert len(lines_with(capsys, "tiny answers again")) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Requests that hang


@pytest.mark.parametrize(
    "hang",
    [
        drips,
        pytest.param(stalls, marks=slow),
        pytest.param(drips_headers, marks=slow),
        pytest.param(drips_an_error, marks=slow),
        pytest.param(silent, marks=slow),
    ],
)
def test_a_request_is_over_after_its_limit_whatever_drips(checkout, rough, capsys, hang):
    rough.script = [hang, idea(1)]
    assert "The reply applies: idea 1" in ask(checkout, rough, capsys, reply_s=1.0, outage_s=6.0)
    assert 1.3 < gaps(rough.asked)[0] < 2.1   # the limit, and a wait of 0.5 s


@slow
def test_a_slow_model_is_given_three_times_its_slowest_reply(checkout, rough):
    """The first reply may take longer than an outage; 1.6 s are within three times its 0.7 s."""
    rough.script = [late(0.7, idea(1)), late(1.6, idea(2))]
    run(checkout, rough, experiments=3, outage_s=0.5)
    assert proposers(checkout) == ["baseline", "llm", "llm"] and len(rough.asked) == 2


@slow
@pytest.mark.parametrize("hang", [silent, drips], ids=["silent", "drips"])
def test_a_quick_model_that_hangs_is_given_up_after_an_outage(checkout, rough, capsys, hang):
    """Not after reply_s, which is 900 s."""
    rough.script, rough.after, began = [idea(1), hang], hang, time.monotonic()
    run(checkout, rough, experiments=3, outage_s=1.0)
    assert proposers(checkout) == ["baseline", "llm", "search"] and time.monotonic() - began < 7
    assert len(lines_with(capsys, "no answer from tiny (")) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Outages


def back_with_the_search(checkout, rough, repair):
    """Mend the server, in a thread, once the search has made a row."""

    def watch():
        with_search = [row for row in checkout.rows() if row["proposer"] == "search"]
        return bool(with_search) or rough.over.is_set()

    def mend():
        wait_for(watch)
        repair()

    threading.Thread(target=mend, daemon=True).start()


@pytest.mark.parametrize("how", ["refused", pytest.param("503", marks=slow), pytest.param("silent", marks=slow)])
def test_an_outage_is_bridged_by_the_search(checkout, rough, capsys, how):
    down = {"503": answers(503, error("down for maintenance")), "silent": silent, "refused": None}[how]

    def goes_away(handler):
        said(idea(1))(handler)
        rough.down = down
        if how == "refused":
            rough.close()

    def comes_back():
        rough.down = None
        if how == "refused":
            rough.listen()

    rough.script, rough.after, rough.short = [goes_away], ideas(), ["OK"]
    back_with_the_search(checkout, rough, comes_back)
    assert run(checkout, rough, experiments=7, outage_s=0.5) == 0
    found = "".join(proposer[0] for proposer in proposers(checkout))
    assert re.fullmatch("bls+l+", found), found
    out = capsys.readouterr().out
    gone = re.findall(r"^      no answer from tiny \((.+)\); the search proposes until it answers again$", out, re.M)
    assert len(gone) == 1 and out.count("no answer from") == 1 and (how != "503" or "down for maintenance" in gone[0])
    assert re.findall(r"^.*answers again$", out, re.M)[1:] == ["      tiny answers again"]
    assert out.index("no answer from") < out.index("0003  ") < out.index("      tiny answers again")


@slow
def test_the_background_request_is_small_and_delays_nothing(checkout, rough):
    """Two experiments end while it hangs. It comes once in outage_s seconds, one short message of the user."""
    took = []

    def hangs(handler):
        began, rows = time.monotonic(), len(checkout.rows())
        wait_for(lambda: len(checkout.rows()) >= rows + 2 or handler.over.is_set())
        took.append(time.monotonic() - began)
        silent(handler)

    rough.script, rough.after, rough.short = [idea(1)], answers(503, error("down")), [hangs]
    run(checkout, rough, experiments=9, outage_s=1.0, reply_s=30.0)
    assert proposers(checkout)[2:] == ["search"] * 7 and took and took[0] < 1.8
    (message,) = rough.background[0].body["messages"]
    assert message["role"] == "user" and len(message["content"]) < 200 and rough.background[0].body["model"] == "tiny"
    assert all(gap > 0.8 for gap in gaps(rough.background))


@slow
@pytest.mark.parametrize(
    "step",
    [
        answers(401, error("key revoked")),
        answers(429, error("key revoked", "insufficient_quota")),
        answers(402, error("key revoked")),
        answers(403, error("key revoked")),
    ],
    ids=["401", "quota", "402", "403"],
)
def test_a_refusal_in_mid_session_is_one_line_and_no_wait(checkout, rough, capsys, step):
    rough.script, rough.after, rough.short = [idea(1)], step, [step]
    began = time.monotonic()
    assert run(checkout, rough, experiments=5, outage_s=20.0) == 0
    assert proposers(checkout) == ["baseline", "llm"] + ["search"] * 3 and time.monotonic() - began < 10
    (line,) = lines_with(capsys, "no answer from")
    assert line.startswith("      no answer from tiny (") and "key revoked" in line and len(rough.asked) == 2


@slow
@pytest.mark.parametrize("step", [answers(401, error("key revoked")), resets], ids=["401", "reset"])
def test_a_session_that_began_in_an_outage_is_not_at_its_start_any_more(checkout, rough, capsys, step):
    """No reply was ever heard, and yet a refusal does not end what runs already."""
    rough.script, rough.after, rough.short = [answers(503, error("down"))] * 2, step, ["OK"]
    assert run(checkout, rough, experiments=12, outage_s=0.5) == 0
    assert len(rough.asked) > 2 and proposers(checkout) == ["baseline"] + ["search"] * 11


@slow
def test_twenty_unusable_replies_in_a_row_bring_the_search(checkout, rough, capsys):
    """After them one conversation of four for each proposal, until a reply is usable; the tokens are in the rows."""
    rough.script = ["nothing"] * 24 + [idea(1)] + ["nothing"] * 20
    run(checkout, rough, experiments=5, outage_s=60.0)
    assert proposers(checkout) == ["baseline", "search", "search", "llm", "search"] and len(rough.asked) == 45
    assert len(lines_with(capsys, "      20 unusable replies in a row from tiny; the search proposes this one")) == 2
    spent = [sum(asked.tokens for asked in rough.asked[a:b]) for a, b in ((0, 20), (20, 24), (24, 25), (25, 45))]
    assert [r.llm_tokens for r in checkout.record()[1:]] == spent


# ----------------------------------------------------------------------------------------------------------------------
# Parameters, windows, cut replies


OLD_LIMIT = ("Unsupported parameter: 'max_tokens' is not supported with this model. "
             "Use 'max_completion_tokens' instead.")


def limits(asked):
    return [{k: v for k, v in a.body.items() if k in ("max_tokens", "max_completion_tokens")} for a in asked]


def test_a_refused_max_tokens_is_renamed_from_then_on(checkout, rough):
    rough.script = [answers(400, error(OLD_LIMIT, "unsupported_parameter", param="max_tokens")), idea(1), idea(2)]
    run(checkout, rough, experiments=3)
    n = rough.asked[0].body["max_tokens"]
    new = {"max_completion_tokens": n}
    assert n >= 1000 and limits(rough.asked) == [{"max_tokens": n}, new, new]
    assert gaps(rough.asked)[0] < 0.4   # nothing to wait for
    kept = [a.body.keys() - {"max_tokens", "max_completion_tokens"} for a in rough.asked]
    assert kept[0] == kept[1] == kept[2] and "temperature" not in kept[0]


@pytest.mark.parametrize(
    "message",
    ["Unrecognized request argument supplied: max_completion_tokens", "max_tokens is too large: this model supports 9"],
    ids=["unknown", "too large"],
)
def test_a_limit_that_is_refused_under_both_names_is_left_out(checkout, rough, capsys, message):
    """The second message is what OpenAI answers to either name when the number is too large."""
    rough.script = [answers(400, error(OLD_LIMIT)), answers(400, error(message)), idea(1)]
    assert "The reply applies: idea 1" in ask(checkout, rough, capsys)
    assert [list(limit) for limit in limits(rough.asked)] == [["max_tokens"], ["max_completion_tokens"], []]


def test_a_parameter_that_is_never_accepted_ends_the_start(checkout, rough):
    rough.after = answers(400, error(OLD_LIMIT))
    assert "max_tokens" in cannot_start(checkout, rough.url) and len(rough.asked) <= 3


TOO_LONG = {
    "code": error("Please reduce the length of the messages.", "context_length_exceeded"),
    "vLLM": error("This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (4904 in the "
                  "messages, 4096 in the completion). Please reduce the length of the messages or completion.", 400),
    "vLLM, new": error("'max_tokens' or 'max_completion_tokens' is too large: 4096. This model's maximum context "
                       "length is 8192 tokens and your request has 4904 input tokens (4096 > 8192 - 4904).", 400),
}


@pytest.mark.parametrize("form", TOO_LONG)
def test_a_request_that_is_too_long_is_sent_without_a_limit_of_the_reply(checkout, rough, capsys, form):
    rough.script = [answers(400, TOO_LONG[form]), idea(1)]
    assert "The reply applies: idea 1" in ask(checkout, rough, capsys)
    assert limits(rough.asked) == [{"max_tokens": rough.asked[0].body["max_tokens"]}, {}]
    assert rough.asked[0].text == rough.asked[1].text and gaps(rough.asked)[0] < 0.4


@slow
def test_a_request_that_is_still_too_long_loses_rows_and_diffs(checkout, rough):
    refusal = answers(400, TOO_LONG["vLLM"])
    rough.script = [*map(idea, range(1, 6)), refusal, refusal, idea(6)]
    run(checkout, rough, experiments=7)
    assert proposers(checkout) == ["baseline"] + ["llm"] * 6
    whole, unlimited, short = rough.asked[5:]
    assert unlimited.text == whole.text and "+RATE = 2.01" in whole.text
    assert len(short.text) < len(whole.text) and "+RATE = 2.01" not in short.text
    assert "def build_model" in short.text and "Lower the number." in short.text and "Propose experiment" in short.text


def test_a_request_that_stays_too_long_ends_the_start(checkout, rough):
    rough.after = answers(400, TOO_LONG["vLLM"])
    assert "too long" in cannot_start(checkout, rough.url) and 2 <= len(rough.asked) <= 3


@slow
def test_a_request_that_stays_too_long_later_is_left_to_the_search(checkout, rough):
    rough.script, rough.after = [idea(1)], answers(400, TOO_LONG["code"])
    assert run(checkout, rough, experiments=3) == 0
    assert proposers(checkout) == ["baseline", "llm", "search"] and len(rough.asked) == 4


def test_a_server_that_cuts_the_prompt_is_found_out(checkout, rough):
    (checkout.root / "program.md").write_text("Lower the number.\n" * 2000)
    checkout.git("-c", "user.name=u", "-c", "user.email=u@u", "commit", "-qam", "a long brief")
    cut = {"prompt_tokens": 4096, "completion_tokens": 10, "total_tokens": 4106}
    rough.script = [answers(200, completion({"content": idea(1)}, usage=cut))]
    assert "cut the prompt" in cannot_start(checkout, rough.url) and len(rough.asked[0].text) > 8 * 4096


def test_a_reply_that_is_cut_off_is_not_applied(checkout, rough):
    rough.script = [said(idea(1), finish="length"), idea(2)]
    run(checkout, rough)
    assert checkout.record()[1].description == "idea 2"
    assert "cut off" in rough.asked[1].last and "short" in rough.asked[1].last


# ----------------------------------------------------------------------------------------------------------------------
# What a reply is


@pytest.mark.parametrize(
    "message",
    [
        {"content": "", "reasoning": idea(1)},
        {"content": None, "reasoning_content": idea(1)},
        {"content": idea(1), "reasoning": idea(2), "reasoning_content": idea(2)},
        {"content": f"<think>Perhaps\nSET NO_SUCH = 0.9\n</think>\n{idea(1)}"},
        {"content": f"Perhaps\nSET NO_SUCH = 0.9\n</think>\n{idea(1)}"},
        {"content": [{"type": "text", "text": idea(1)[:40]}, {"type": "text", "text": idea(1)[40:]}]},
    ],
    ids=["reasoning", "reasoning_content", "both", "think", "end of think", "parts"],
)
def test_the_reply_is_found(checkout, rough, capsys, message):
    rough.script = [answers(200, completion(message))]
    out = ask(checkout, rough, capsys)
    assert "The reply applies: idea 1" in out


def test_unusable_replies_go_back_with_a_lesson(checkout, rough):
    """Thoughts without an end, nothing at all: none of them is applied, each is answered."""
    contents = [f"<think>Perhaps\n{idea(1)}", "", None]
    rough.script = [*(answers(200, completion({"content": content})) for content in contents), idea(2)]
    run(checkout, rough)
    assert checkout.record()[1].description == "idea 2"
    assert [len(asked.body["messages"]) for asked in rough.asked] == [2, 4, 6, 8]


def test_tokens_are_estimated_where_the_server_does_not_count(checkout, rough):
    """And a count that is missing is no sign of a cut prompt."""
    texts, zeros = ["nothing", "nothing", idea(1)], {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    usages = (None, {}, zeros, {"prompt_tokens": 1200, "completion_tokens": 34})
    replies = zip([*texts, idea(2)], usages, strict=True)
    rough.script = [answers(200, completion({"content": text}, usage=usage)) for text, usage in replies]
    run(checkout, rough, experiments=3)
    chars = sum(map(len, texts)) + sum(len(asked.text) for asked in rough.asked[:3])
    assert checkout.record()[1].llm_tokens == pytest.approx(chars / 4, rel=0.1)
    assert checkout.record()[2].llm_tokens == 1234   # no sum of its own


# ----------------------------------------------------------------------------------------------------------------------
# The budget for tokens, the record of exchanges, the key


@slow
def test_the_budget_for_tokens_ends_the_asking(checkout, rough, capsys):
    rough.after, rough.short = ideas(), ["OK"]
    run(checkout, rough, experiments=5, max_llm_tokens=1000, outage_s=0.3)
    spent = [asked.tokens for asked in rough.asked]
    assert spent[0] < 1000 <= sum(spent) and len(spent) == 2 and not rough.background
    assert proposers(checkout) == ["baseline", "llm", "llm", "search", "search"]
    *told, summary = [line for line in capsys.readouterr().out.splitlines() if "token" in line]
    assert len(told) == 1 and str(sum(spent)) in re.sub("[,_]", "", summary)


def test_the_budget_for_tokens_ends_a_conversation(checkout, rough):
    rough.after = said("nothing")
    run(checkout, rough, max_llm_tokens=500)
    assert len(rough.asked) == 1 and [r.proposer for r in checkout.record()] == ["baseline", "search"]
    assert checkout.record()[1].llm_tokens == rough.asked[0].tokens


def test_the_budget_for_tokens_is_an_option(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert agent.configured(agent.parser().parse_args(["--max-llm-tokens", "500"])).max_llm_tokens == 500
    assert agent.configured(agent.parser().parse_args([])).max_llm_tokens is None
    with pytest.raises(agent.UserError, match="--max-llm-tokens"):
        agent.configured(agent.parser().parse_args(["--max-llm-tokens", "0"]))


def test_every_exchange_is_kept_and_counted(checkout, rough):
    """Those that failed too; the search's row has the tokens of the conversation before it."""
    rough.script = [idea(1), answers(503, error("overloaded just now")), "nothing", idea(2), "no edit",
                    answers(401, error("key revoked"))]
    run(checkout, rough, experiments=4, outage_s=3.0)
    assert proposers(checkout) == ["baseline", "llm", "llm", "search"]
    runs, tokens = checkout.root / "runs" / checkout.record()[0].tag, [asked.tokens for asked in rough.asked]
    first, second, third = ((runs / id / "llm.md").read_text() for id in ("0002", "0003", "0004"))
    assert "Lower the number." in first and idea(1) in first
    assert "overloaded just now" in second and "nothing" in second and idea(2) in second
    assert "no edit" in third and "key revoked" in third
    assert [r.llm_tokens for r in checkout.record()[1:]] == [tokens[0], tokens[2] + tokens[3], tokens[4]]
    assert checkout.rows()[3]["llm_tokens"] == str(tokens[4])


def test_the_key_is_written_nowhere(checkout, rough, capfd):
    """Not though the server sends it back, in replies and in errors."""
    echo = reply(f"SET NOTE = 'a {KEY} b'", description=f"note {KEY}", hypothesis=f"The key is {KEY}.")
    rough.script = [echo, answers(503, error(f"busy with {KEY}")), f"no edit but {KEY}", idea(1)]
    rough.after, rough.short = answers(401, error(f"Incorrect API key: {KEY}.")), [answers(401, error(KEY))]
    run(checkout, rough, experiments=5, api_key=KEY, outage_s=2.0)
    assert KEY in rough.asked[0].headers["authorization"] and len(rough.asked) >= 5
    out, err = capfd.readouterr()
    assert "Incorrect API key" in out and "The key is" in checkout.git("log", "--glob=refs/autoresearch")
    assert any("no edit but" in path.read_text() for path in checkout.root.glob("runs/*/*/llm.md"))
    objects = ["git", "cat-file", "--batch-all-objects", "--batch"]
    objects = subprocess.run(objects, cwd=checkout.root, capture_output=True, check=True).stdout
    files = {str(path): path.read_bytes() for path in checkout.root.rglob("*") if path.is_file()}
    assert [name for name, data in files.items() if KEY.encode() in data] == []
    assert KEY.encode() not in objects and KEY not in out + err


@pytest.mark.parametrize("model", ["tiny", ""], ids=["chat", "models"])
def test_the_key_is_not_in_a_refusal_at_the_start(checkout, rough, model):
    rough.models = rough.after = answers(401, error(f"Incorrect API key: {KEY}"))
    told = cannot_start(checkout, rough.url, api_key=KEY, model=model)
    assert "Incorrect API key" in told and KEY not in told


@pytest.mark.parametrize("more", ["\n", "\u2026"], ids=["line end", "ellipsis"])
def test_a_key_that_is_no_header_is_not_printed_either(checkout, rough, capfd, more):
    """A secret that a file gave with its line end, or a page cut short."""
    rough.script = [idea(1)]
    said_why = ""
    try:
        run(checkout, rough, api_key=KEY + more)
    except agent.UserError as error:
        said_why = str(error)
    out, err = capfd.readouterr()
    assert KEY not in said_why + out + err and len(said_why.splitlines()) < 2


def test_the_key_does_not_follow_a_redirect_to_another_server(checkout, rough):
    other = Rough()
    try:
        other.after = answers(401, error("who are you"))
        rough.after = answers(307, "", Location=f"http://localhost:{other.port}/v1/chat/completions")
        cannot_start(checkout, rough.url, api_key=KEY)
        assert other.asked and not any(KEY in str(asked.headers) for asked in other.asked)
    finally:
        other.close()


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C and the deadline


def command(checkout, rough, *args, **env):
    """agent.py as a process that is still running."""
    env = checkout.env(OPENAI_BASE_URL=rough.url, OPENAI_API_KEY=KEY, OPENAI_MODEL="tiny", **env)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(checkout.command(*args), cwd=checkout.root, env=env, **pipes)


@pytest.mark.parametrize(
    "step, number",
    [
        (answers(429, error("busy"), Retry_After="60"), signal.SIGINT),
        pytest.param(silent, signal.SIGINT, marks=slow),
        pytest.param(drips, signal.SIGTERM, marks=slow),
    ],
    ids=["Retry-After", "silent", "drips"],
)
def test_ctrl_c_ends_a_wait(checkout, rough, step, number):
    rough.after = step
    process = command(checkout, rough, "--sandbox", "off")
    wait_for(lambda: rough.asked)
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(process.pid, number)
    process.communicate(timeout=10)
    assert process.returncode == 130 and time.monotonic() - began < 2


@pytest.mark.parametrize("first", [pytest.param(True, marks=slow), False], ids=["at the start", "later"])
def test_a_server_that_never_answers_does_not_hold_the_deadline(checkout, rough, first):
    rough.script, rough.after, began = [] if first else [idea(1)], silent, time.monotonic()
    assert run(checkout, rough, experiments=None, hours=2.2 / 3600, outage_s=180.0) == 0
    assert 2 < time.monotonic() - began < 6 and len(rough.asked) == 2 - first


@slow
def test_an_outage_during_a_repair_is_waited_out_once(checkout, rough):
    """The next experiment is the search's at once, and no second repair is asked for."""
    crash = reply("<<<<<<< SEARCH\n    step = 0\n=======\n    raise TypeError('no')\n>>>>>>> REPLACE")
    rough.script, rough.after, rough.short = [crash], answers(503, error("down")), [answers(503, error("down"))] * 50
    began = time.monotonic()
    run(checkout, rough, experiments=4, outage_s=2.0)
    assert proposers(checkout) == ["baseline", "llm", "search", "search"] and time.monotonic() - began < 7
    assert checkout.record()[1].reason == "TypeError: no"
