"""The data: texts, splits, tokens, rows, downloads, interruptions, bad input: pytest tests/test_data.py"""

import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import resource
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare

PREPARE = Path(prepare.__file__)
WORDS = "der die das Ölfeld 火曜日 naïve 🙂🙃 model loss token gradient schedule warm-down window stream value".split()


def documents(count: int, seed: int = 0, words: int = 60) -> list[str]:
    rng = random.Random(seed)
    lengths = [words * rng.randrange(1, 4) for _ in range(count)]
    return [" ".join(rng.choice(WORDS) + str(rng.randrange(30)) for _ in range(length)) + "\n" for length in lengths]


def write_parquet(path: Path, texts: list, column: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path, row_group_size=300)
    return path


def write_texts(folder: Path) -> Path:
    """300 kB of documents in every format, some of them more than once."""
    (folder / "deep").mkdir(parents=True)
    texts = documents(300)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts[:200]))
    write_parquet(folder / "deep" / "b.parquet", texts[100:] * 2)
    (folder / "deep" / "c.md").write_text("\n".join(documents(20, seed=1)), newline="")
    (folder / "d.txt").write_bytes("\r\n\r\n".join(documents(20, seed=2)).encode())
    return folder


def start(cache: Path, *arguments) -> subprocess.Popen:
    command = [sys.executable, PREPARE, "--preset", "cpu", "--cache", cache, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, texts_folder) -> tuple[Path, dict]:
    """Folder and meta.json of those texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(tmp_path_factory.mktemp("prepared")))
        prepare.prepare(str(texts_folder), "cpu", 10)
        return prepare.current()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def command(cache, monkeypatch, capsys):
    """prepare.py's command line, in this process: (exit code, stdout, stderr)."""

    def run(*words, preset="cpu"):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--preset", preset, *map(str, words)])
        capsys.readouterr()
        try:
            code = prepare.main() or 0
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def rows_of(folder: Path, meta: dict, split: str) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", np.uint16).reshape(-1, meta["seq_len"] + 1)


def split_texts(folder: Path, meta: dict) -> dict[str, list[str]]:
    """The documents of every split, decoded; the last one of val and of test may be cropped."""
    encoding, rows = prepare.load_tokenizer(folder), {split: rows_of(folder, meta, split) for split in prepare.SPLITS}
    streams = {name: np.concatenate([array[0, :1], array[:, 1:].ravel()]) for name, array in rows.items()}
    streams["train"] = np.fromfile(folder / "train.bin", np.uint16)
    parts = {name: np.split(s, np.flatnonzero(s == meta["vocab_size"] - 4))[1:] for name, s in streams.items()}
    texts = {name: [encoding.decode_bytes(part[1:].tolist()) for part in split] for name, split in parts.items()}
    return {name: [text.decode("utf-8", "replace") for text in split] for name, split in texts.items()}


def test_no_training_token_is_lost_and_nothing_is_in_two_splits(prepared, texts_folder):
    folder, meta = prepared
    split, texts = split_texts(folder, meta), list(prepare.open_corpus(str(texts_folder), 10).texts())
    assert set(documents(300)) <= set(texts) and min(len(split["val"]), len(split["test"])) > 5
    for name, others in (("val", {*split["train"], *split["test"]}), ("test", {*split["train"], *split["val"]})):
        *whole, cropped = split[name]
        assert set(whole) <= set(texts) and any(text.startswith(cropped.rstrip("\ufffd")) for text in texts)
        assert not {*whole, cropped} & others
    held = set(texts) - set(split["train"])
    assert split["train"] == [text for text in texts if text not in held] and len(held) < len(set(texts)) / 4
    for rows in (rows_of(folder, meta, name) for name in prepare.SPLITS):
        assert (rows[1:, 0] == rows[:-1, -1]).all() and rows[0, 0] == meta["vocab_size"] - 4
    starts, stream = np.load(folder / "train_docs.npy"), np.fromfile(folder / "train.bin", np.uint16)
    assert (np.flatnonzero(stream == meta["vocab_size"] - 4) == starts).all()
    assert (meta["train_docs"], meta["train_tokens"]) == (len(split["train"]), len(stream))


def test_bytes_are_counted_by_token_even_inside_a_character(prepared):
    folder, meta = prepared
    encoding, last = prepare.load_tokenizer(folder), meta["vocab_size"] - 4
    for split in prepare.SPLITS:
        targets = [token for token in rows_of(folder, meta, split)[:, 1:].ravel().tolist() if token < last]
        pieces = [encoding.decode_single_token_bytes(token) for token in targets]
        original = sum(len(piece.decode("utf-8", "replace").encode()) for piece in pieces)
        assert meta["bytes"][split] == len(b"".join(pieces)) <= original == meta["original_bytes"][split]
    ((tokens,),) = prepare.encoded(encoding, [["a <|bos|> b"]])  # what looks like a special token is text
    assert tokens[0] == last > tokens[1:].max() and encoding.decode(tokens[1:].tolist()) == "a <|bos|> b"


def test_meta_tells_the_loop_what_it_must_know(prepared):
    folder, meta = prepared
    told = {"format": 2, "preset": "cpu", "device": "cpu", "noise": 0.006, "suspicious": 0.05, "budget_s": 300}
    assert told.items() <= meta.items() and (meta["metric"], meta["lower_is_better"]) == ("val_bpb", True)
    assert meta["handed"] == ["train.bin", "train_docs.npy"] and meta["judged"]["test"] == ["test.bin"]
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert {*meta["sha256"], "meta.json"} == {path.name for path in folder.iterdir()}


def test_another_text_or_format_is_prepared_anew(tmp_path, cache, prepared, command, monkeypatch):
    folder = write_texts(tmp_path / "moved")
    monkeypatch.setitem(prepare.TASK, "suspicious", 0.5)
    monkeypatch.setitem(prepare.PRESETS, "cpu", prepare.PRESETS["cpu"]._replace(noise=1.0))
    assert command("--dataset", folder)[0] == 0 and prepare.active_preset() == "cpu"
    path, meta = prepare.current()
    assert meta["fingerprint"] == prepared[1]["fingerprint"]  # of the text alone
    assert (meta["noise"], meta["suspicious"]) == (1.0, 0.5)
    (path / "meta.json").write_text(json.dumps(meta | {"format": 1}))
    code, _, errors = command("score", path)
    assert code == 2 and "run `python prepare.py`" in errors
    assert command("--dataset", folder)[0] == 0 and prepare.current()[1] == meta
    (folder / "new.txt").write_text("".join(documents(5, seed=9)))
    assert command("--dataset", folder)[0] == 0
    assert prepare.current()[1]["fingerprint"] != meta["fingerprint"]


def test_a_long_file_is_cut_into_pieces_that_make_it_whole_again(tmp_path):
    text = "\r\n".join(documents(400, words=6)) + "no line end"
    (tmp_path / "book.txt").write_bytes(text.encode())
    assert "".join(pieces := list(prepare.read_texts([tmp_path / "book.txt"]))) == text and len(pieces) > 50


def test_every_kind_of_text_is_read_and_other_files_are_named(tmp_path, cache, command):
    folder, linked, texts = tmp_path / "texts", tmp_path / "linked", ["long " * 30_000, *documents(299)]
    folder.mkdir(), linked.mkdir()
    lines = [json.dumps({"id": 1, "text": text}) for text in texts]
    table = "\ufeffid,text\r\n" + "".join(f'1,"{text}, ""cited"""\r\n' for text in texts[:40])
    (folder / "a.csv").write_text(table, encoding="utf-8", newline="")
    (folder / "c.json").write_text(json.dumps([*texts[40:60], *map(json.loads, lines[60:80])], indent=1))
    (folder / "d.json").write_text("\n".join(lines[80:120]))
    (folder / "e.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines[120:160]).encode())
    (folder / "f.JSONL.gz").write_bytes(gzip.compress("\n".join(lines[160:200]).encode()))
    (folder / "g.ndjson").write_text("\n".join(lines[200:]))
    (linked / "h.txt").write_bytes("\ufeffmarked as UTF-8".encode())
    (linked / "i.md.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "linked").symlink_to(linked)
    (linked / "back").symlink_to(folder)  # a loop of links
    (linked / "gone.txt").symlink_to(tmp_path / "nowhere")
    for name in ("package.json", "numbers.csv", "1.pdf", "2.PDF", "LICENSE"):
        (folder / name).write_text('{"name": "x"}')
    code, output, _ = command("--dataset", folder)
    assert code == 0 and output.splitlines()[0] == "left out: 1 .csv, 1 .json, 2 .pdf, 1 .txt, 1 without an ending"
    read = list(prepare.open_corpus(str(folder), 10).texts())
    assert read == [*(f'{text}, "cited"' for text in texts[:40]), *texts[40:], "marked as UTF-8", "packed"]


@pytest.mark.parametrize("name, encoding", [("a b.txt", "GB18030"), ("c.jsonl.gz", "LATIN1"), ("d.csv", "UTF-16")])
def test_another_encoding_is_never_guessed_but_named_with_what_to_type(tmp_path, cache, command, name, encoding):
    text = "text\n" + "".join(documents(300)).translate(dict.fromkeys(map(ord, "火曜日🙂🙃"))) + "Öl" * 9999
    plain = text.encode(encoding)
    write_texts(tmp_path / "texts")
    (tmp_path / "texts" / name).write_bytes(gzip.compress(plain) if name.endswith("gz") else plain)
    code, _, errors = command("--dataset", tmp_path / "texts")
    assert code == 2 and errors.startswith(f"{tmp_path}/texts/{name} is ") and errors.count("\n") == 1
    advice = re.search("`(.*)`", errors)[1].replace("GB18030", encoding)
    subprocess.run(advice, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "NEW").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_books_are_cut_whatever_they_come_in_and_short_documents_stay_whole(tmp_path, cache, command, kind):
    texts = ["\n".join(documents(90, seed, words=20)) for seed in range(10)] + documents(9, seed=50, words=200)
    lines, table = "\n".join(json.dumps({"text": text}) for text in texts), io.StringIO()
    csv.writer(table).writerows([["text"], *([text] for text in texts)])
    path = write_parquet(tmp_path / f"books.{kind}", texts)
    if kind != "parquet":
        path.write_text({"jsonl": lines, "json": json.dumps(texts), "csv": table.getvalue()}[kind], newline="")
    assert command("--dataset", path)[0] == 0
    corpus, _, held = prepare.hold_out(prepare.open_corpus(str(path), 10), prepare.PRESETS["cpu"])
    documents_now, split = list(corpus.texts()), split_texts(*prepare.current())
    assert "".join(documents_now) == "".join(texts) and documents_now[-9:] == texts[10:] and len(split["val"]) > 5
    assert [text for text in documents_now if prepare.digest(text) not in held] == split["train"]


def test_the_next_command_finds_the_data_in_another_cache(tmp_path, cache, command, texts_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "`python agent.py`" in command("--dataset", texts_folder, "--cache", cache)[1].splitlines()[-1]
    output = command("--dataset", texts_folder, "--cache", "it's here")[1]
    setting, *words = shlex.split(re.findall("`(.*?)`", output.splitlines()[-1])[1])
    assert words == ["python", "agent.py"] and setting == f"AUTORESEARCH_CACHE={tmp_path}/it's here"
    assert (tmp_path / "it's here" / "current").exists()


def packed_plainly(documents, capacity):
    """The original's rows by the words of its description, in lists."""
    groups = [documents[i : i + 300] for i in range(0, len(documents), 300)]
    refills = [group[i : i + 128] for group in groups for i in range(0, len(group), 128)]
    buffer, rows = [], [[]]
    while buffer or refills:
        while len(buffer) < 1000 and refills:
            buffer += refills.pop(0)
        room = capacity - len(rows[-1])
        fitting = [document for document in buffer if len(document) <= room]
        chosen = max(fitting, key=len) if fitting else min(buffer, key=len)
        buffer.remove(chosen)
        rows[-1] += chosen[:room]
        rows += [[]] if len(rows[-1]) == capacity else []
    return rows


def test_datacenter_rows_of_climbmix_are_packed_from_the_held_out_shard(cache, shards, command, monkeypatch, capsys):
    monkeypatch.setitem(prepare.PRESETS, "datacenter", prepare.Preset("cuda", "climbmix", 300, 128, 128 * 40, 0.0006))
    assert command("--num-shards", "2", preset="datacenter")[0] == 0
    folder, meta = prepare.current()
    rows = np.concatenate([rows_of(folder, meta, split) for split in prepare.SPLITS])
    assert meta["rows"] == {"val": 40, "test": 40} and (rows[:, 0] == meta["vocab_size"] - 4).all()
    (held,) = prepare.encoded(prepare.load_tokenizer(folder), [shards.texts["shard_06542.parquet"]])
    assert rows.tolist() == packed_plainly([document.tolist() for document in held], 129)[:80]
    prepare.print_summary({"split": "val", "score": 1.0, "seconds": 0.0}, {}, meta)
    factor = meta["bytes"]["val"] / meta["original_bytes"]["val"]
    assert capsys.readouterr().out.splitlines()[-1] == f"original_factor:  {factor:.6f}" and 0.5 < factor < 1


class Shards(http.server.BaseHTTPRequestHandler):
    """Files with Range and the hub's hash header. `faults` names what to do wrong, one request after another."""

    def do_GET(self):
        name, wanted = self.path.rsplit("/", 1)[1], self.headers["Range"]
        self.log.append((name, wanted))
        fault = self.faults.pop(0) if self.faults else ""
        if name not in self.files or fault in ("404", "503"):
            return self.send_error(int(fault or 404))
        body = self.files[name]
        first = 0 if fault == "ignore range" else int(wanted[6:-1])
        if first >= len(body):
            return self.send_error(416)
        self.send_response(200 if fault == "ignore range" else 206)
        if fault != "no hash":
            digest = hashlib.sha256(body).hexdigest() if fault != "wrong hash" else "0" * 64
            self.send_header("X-Linked-ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        part = body[first:] if fault != "garbage" else b"x" * len(body)
        self.wfile.write(part[: len(part) // 2] if fault == "break" else part)

    def log_message(self, *_):
        pass


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A hub on port 0 with two training shards and the held-out one, which share some documents."""
    held = documents(1200, seed=3, words=8)
    held += documents(1, seed=6, words=4000)  # longer than what can be held out: never cut
    train = [documents(500, seed=4) + held[:3], documents(500, seed=5) + documents(1, seed=7, words=4000)]
    texts = dict(zip(["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"], [*train, held]))
    files = {name: write_parquet(tmp_path / name, content).read_bytes() for name, content in texts.items()}
    handler = type("Handler", (Shards,), {"files": files, "texts": texts, "faults": [], "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("AUTORESEARCH_DATA_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    return handler


def test_a_download_survives(shards, tmp_path):
    path = tmp_path / "store" / "shard_00000.parquet"
    cases = {"": "0", "no hash": "0", "503": "0 0", "break": "0 65536", "break, ignore range": "0 65536"}
    cases |= {"wrong hash": "0 0", "garbage": "0 0", "part of 1000": "1000 0", "part of 1000000": "1000000 0"}
    for faults, tries in cases.items():  # what goes wrong, one request after another -> from where each asks
        shards.faults[:], shards.log[:] = faults.split(", "), []
        if faults.startswith("part"):  # of another file
            path.with_suffix(".part").write_bytes(b"z" * int(faults.split()[-1]))
        prepare.download(f"{os.environ['AUTORESEARCH_DATA_URL']}/{path.name}", path)
        assert path.read_bytes() == shards.files[path.name] and os.listdir(path.parent) == [path.name]
        assert [wanted for _, wanted in shards.log] == [f"bytes={first}-" for first in tries.split()], faults
        path.unlink()
    assert len(shards.files[path.name]) > 2 * 65536


@pytest.mark.parametrize("fault, words", [("404", "404"), ("wrong hash", "not the file that the server promised")])
def test_downloads_that_cannot_succeed_are_one_line(cache, shards, command, fault, words):
    shards.faults[:] = [fault] * 9
    code, _, errors = command("--dataset", "climbmix", "--num-shards", "2")
    assert code == 2 and words in errors and errors.count("\n") == 1
    assert os.listdir(cache / "downloads" / "climbmix") == [] and not list(cache.glob("climbmix-*"))
    assert len(shards.log) == (1 if fault == "404" else 6)


def test_climbmix_in_contiguous_rows(cache, shards, command):
    words = "--dataset", "climbmix", "--num-shards", "2"
    assert command(*words)[0] == 0
    split, held = split_texts(*prepare.current()), shards.texts["shard_06542.parquet"]
    train = shards.texts["shard_00000.parquet"] + shards.texts["shard_00001.parquet"]
    assert split["train"] == [text for text in train if text not in held] and len(train) - len(split["train"]) == 3
    assert split["val"][:-1] == held[: len(split["val"]) - 1]
    requests = len(shards.log)
    code, output, _ = command(*words)  # finds everything done
    assert len(shards.log) == requests == 3 and "tokenizer" not in output and "Ready" in output


@pytest.mark.parametrize("reached", ["tokenizer.json", pytest.param("train.bin", marks=pytest.mark.slow)])
def test_a_killed_preparation_is_done_again_and_by_two_at_once_only_once(cache, texts_folder, reached):
    process = start(cache, "--dataset", texts_folder)
    while process.poll() is None and not list(cache.glob(f"texts-*/{reached}")):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert list(cache.glob(f"texts-*/{reached}"))
    assert not (cache / "current").exists() and not list(cache.glob("*/meta.json"))
    both = [start(cache, "--dataset", texts_folder) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert sorted("training the tokenizer" in output for output, _ in outputs) == [False, True]
    assert all("Ready: " in output and not errors for output, errors in outputs)
    assert split_texts(*prepare.current())["train"]


def test_no_room_left_is_one_line_and_leaves_nothing(cache, texts_folder, command):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, _, errors = command("--dataset", texts_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and errors.startswith("No room left for ") and errors.count("\n") == 1
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, cache, command):
    write_parquet(tmp_path / "body.parquet", documents(3), column="body")
    damaged = bytearray(write_parquet(tmp_path / "whole.parquet", documents(300)).read_bytes())
    damaged[100:2000] = bytes(1900)
    cases = {  # name -> content, None where it is there or is to be missing, and words of the message
        "no such folder": (None, "No text in "),
        "image.txt": (b"\x89PNG\r\n\x00\x00" * 9999, "is binary"),
        "short.txt": ("".join(documents(3)).encode(), "Too little text"),
        "fake.parquet": (b"text", "cannot be read as parquet"),
        "damaged.parquet": (damaged, "cannot be read as parquet"),
        "body.parquet": (None, "only ['body']"),
        "list.jsonl": (b'{"text": "fine"}\n["text"]\n', "record 2"),
        "body.jsonl": (b'{"body": "fine"}\n', '"text" string'),
        "list.json": (b'["fine", {"text": 1}]', "record 2"),
        "wide.csv": (b'text,id\n"fine, too",1\nfine, but,2\n', "record 2"),
        "open.csv": (b'text\nfine\n"and open', "record 2"),
        "about.json": (b'{"name": "no text"}', "record 1: no"),
        "torn.txt.gz": (gzip.compress("".join(documents(300)).encode())[:-99], "cannot be read as txt"),
        "utf16.txt": ("fine\n".encode("utf-16-le") * 99, "is binary"),
        "repeats.jsonl": (b'{"text": "all the same text"}\n' * 9999, "not counting repeats"),
    }
    for name, (content, words) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        code, _, errors = command("--dataset", tmp_path / name)
        assert code == 2 and words in errors and errors.count("\n") == 1, (name, errors)
        assert not cache.exists() or {file.suffix for file in cache.iterdir()} == {".lock"}, name


def test_a_gpu_that_torch_cannot_use_is_never_a_silent_cpu(tmp_path, monkeypatch, command):
    monkeypatch.setattr(prepare.torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(prepare.torch, "ones", lambda *_, **__: prepare.torch.empty(1, device="meta").item())
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, _, errors = command("--dataset", "builtin", preset="auto")
    assert code == 2 and "--preset cpu" in errors and errors.count("\n") == 1


@pytest.mark.slow
def test_builtin(cache):
    assert "Ready" in start(cache).communicate()[0]
    meta = prepare.current()[1]
    assert (meta["dataset"], meta["vocab_size"], meta["rows"]) == ("builtin", 2048, {"val": 384, "test": 384})
