"""
Preparation: texts, splits, tokens, rows, downloads, interruptions, bad input.

    pytest tests/test_prepare.py
"""

import hashlib
import http.server
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_loop import slow

import prepare

PREPARE = Path(prepare.__file__)
WORDS = "der die das Ölfeld 火曜日 naïve 🙂🙃 model loss token gradient schedule warm-down window stream value".split()


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(30)) for _ in range(words)) + "\n"


def documents(count: int, seed: int = 0, words: int = 60) -> list[str]:
    rng = random.Random(seed)
    return ["".join(sentence(rng, words) for _ in range(rng.randrange(1, 4))) for _ in range(count)]


def write_parquet(path: Path, texts: list[str], column: str = "text", row_group_size: int = 300) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts_folder(tmp_path) -> Path:
    """300 kB of documents in every format, some of them more than once."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    texts = documents(300)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts[:200]))
    write_parquet(folder / "deep" / "b.parquet", texts[100:] * 2)
    (folder / "deep" / "c.md").write_text("\n".join(documents(20, seed=1)), newline="")
    (folder / "d.txt").write_bytes("\r\n\r\n".join(documents(20, seed=2)).encode() + b"broken \xe7\x81")
    return folder


def split_texts(folder: Path) -> dict[str, list[str]]:
    """The documents of every split, decoded; the last one of val and of test may be cropped."""
    meta, encoding = json.loads((folder / "meta.json").read_text()), prepare.load_tokenizer(folder)
    rows = {name: np.fromfile(folder / f"{name}.bin", np.uint16) for name in prepare.SPLITS}
    rows = {name: array.reshape(-1, meta["seq_len"] + 1) for name, array in rows.items()}
    streams = {name: np.concatenate([array[0, :1], array[:, 1:].ravel()]) for name, array in rows.items()}
    streams["train"] = np.fromfile(folder / "train.bin", np.uint16)
    bos = meta["vocab_size"] - 4
    parts = {name: np.split(stream, np.flatnonzero(stream == bos))[1:] for name, stream in streams.items()}
    return {name: [encoding.decode_bytes(part[1:].tolist()).decode("utf-8", "replace") for part in split]
            for name, split in parts.items()}


def current(cache: Path) -> tuple[Path, dict]:
    folder = cache / (cache / "current").read_text()
    return folder, json.loads((folder / "meta.json").read_text())


def start(cache: Path, *arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, PREPARE, "--preset", "cpu", *arguments], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "AUTORESEARCH_CACHE": str(cache)}, **options)


# ---------------------------------------------------------------------------
# Splits, tokens, rows
# ---------------------------------------------------------------------------


def test_no_training_token_is_lost_and_nothing_is_in_two_splits(cache, texts_folder):
    prepare.prepare(str(texts_folder), "cpu", 10)
    folder, meta = current(cache)
    split = split_texts(folder)
    corpus = prepare.open_corpus(str(texts_folder), 10)
    originals, held = list(corpus.texts()), prepare.hold_out(corpus, prepare.PRESETS["cpu"])[0]
    held = {*held["val"], *held["test"]}
    assert split["train"] == [text for text in originals if text not in held] and len(held) < len(originals) / 4
    for name, other in (("val", "test"), ("test", "val")):
        assert len(split[name]) > 5 and set(split[name][:-1]) <= held
        assert any(text.startswith(split[name][-1].rstrip("\ufffd")) for text in held)
        assert not set(split[name]) & {*split["train"], *split[other]}
    assert meta["train_docs"] == len(split["train"])
    starts, stream = np.load(folder / "train_docs.npy"), np.fromfile(folder / "train.bin", np.uint16)
    assert (np.flatnonzero(stream == meta["vocab_size"] - 4) == starts).all() and len(stream) == meta["train_tokens"]


def test_bytes_of_a_split_are_counted_by_token_even_inside_a_character(cache, texts_folder):
    prepare.prepare(str(texts_folder), "cpu", 10)
    folder, meta = current(cache)
    encoding = prepare.load_tokenizer(folder)
    targets = np.fromfile(folder / "val.bin", np.uint16).reshape(-1, meta["seq_len"] + 1)[:, 1:].ravel().tolist()
    stream = encoding.decode_bytes([token for token in targets if token < meta["vocab_size"] - 4])
    assert meta["bytes"]["val"] == len(stream)
    sizes, original = prepare.token_bytes(encoding), prepare.token_bytes(encoding, original=True)
    lone_byte = encoding.encode_single_token(b"\xe7")
    assert (sizes[lone_byte], original[lone_byte]) == (1, 3)
    assert sizes[-4:].tolist() == [0] * 4 and len(sizes) == meta["vocab_size"] and sizes[:-4].min() == 1


def test_special_tokens_in_a_text_are_ordinary_text(cache, texts_folder):
    prepare.prepare(str(texts_folder), "cpu", 10)
    encoding = prepare.load_tokenizer(current(cache)[0])
    tokens = prepare.encode(encoding, "a <|bos|> b")
    assert tokens[0] == encoding.n_vocab - 4 and tokens[1:].max() < encoding.n_vocab - 4
    assert encoding.decode(tokens[1:].tolist()) == "a <|bos|> b"


def test_rows_continue_each_other(cache, texts_folder):
    prepare.prepare(str(texts_folder), "cpu", 10)
    folder, meta = current(cache)
    for split in prepare.SPLITS:
        rows = np.fromfile(folder / f"{split}.bin", np.uint16).reshape(-1, meta["seq_len"] + 1)
        assert len(rows) == meta["rows"][split] and (rows[1:, 0] == rows[:-1, -1]).all()
        assert rows[0, 0] == meta["vocab_size"] - 4


def test_the_same_text_gives_the_same_fingerprint_and_another_text_another(tmp_path, cache, texts_folder, monkeypatch):
    prepare.prepare(str(texts_folder), "cpu", 10)
    first = current(cache)[1]
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "other"))
    prepare.prepare(str(texts_folder.rename(tmp_path / "moved")), "cpu", 10)
    assert current(tmp_path / "other")[1]["fingerprint"] == first["fingerprint"]
    (tmp_path / "moved" / "new.txt").write_text("".join(documents(5, seed=9)))
    prepare.prepare(str(tmp_path / "moved"), "cpu", 10)
    assert current(tmp_path / "other")[1]["fingerprint"] != first["fingerprint"]
    folder, meta = current(tmp_path / "other")
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_a_long_file_is_cut_into_pieces_that_make_it_whole_again(tmp_path):
    text = "\r\n".join(sentence(random.Random(i), 12) for i in range(400)) + "no line end"
    (tmp_path / "book.txt").write_bytes(text.encode())
    pieces = list(prepare.read_texts([tmp_path / "book.txt"]))
    assert "".join(pieces) == text and len(pieces) > 50
    one_line = tmp_path / "line.txt"
    one_line.write_text("x" * 5000)
    assert [len(piece) for piece in prepare.pieces(one_line, 2000)] == [2000, 2000, 1000]


# ---------------------------------------------------------------------------
# The original's packing
# ---------------------------------------------------------------------------


def test_best_fit_packing_by_hand(monkeypatch):
    docs = [np.full(length, i) for i, length in enumerate([4, 7, 3, 10, 6, 2, 12, 13])]
    rows = [row.tolist() for row in prepare.pack_best_fit([docs[:4], docs[4:]], 10)]
    assert rows == [[3] * 10, [1] * 7 + [2] * 3, [4] * 6 + [0] * 4, [5] * 2 + [6] * 8, [7] * 10]
    monkeypatch.setattr(prepare, "PACK_DOCS", 2)  # the 10 comes into sight only when a place is free
    rows = [row.tolist() for row in prepare.pack_best_fit([docs[:1], docs[1:3], docs[3:4], docs[4:]], 10)]
    assert rows == [[1] * 7 + [2] * 3, [3] * 10, [4] * 6 + [0] * 4, [5] * 2 + [6] * 8, [7] * 10]


def test_parquet_is_read_by_row_group_in_batches_of_128(tmp_path):
    texts = documents(700, words=3)
    batches = list(prepare.parquet_batches(write_parquet(tmp_path / "a.parquet", texts)))
    assert [len(batch) for batch in batches] == [128, 128, 44, 128, 128, 44, 100]
    assert [text for batch in batches for text in batch] == texts


def test_datacenter_rows_of_climbmix_are_packed_from_the_held_out_shard(cache, shards, monkeypatch, tmp_path):
    monkeypatch.setitem(prepare.PRESETS, "datacenter", prepare.Preset("cuda", "climbmix", 300, 128, 128 * 40))
    prepare.prepare(None, "datacenter", 2)
    folder, meta = current(cache)
    encoding = prepare.load_tokenizer(folder)
    rows = np.concatenate([np.fromfile(folder / f"{split}.bin", np.uint16) for split in prepare.SPLITS])
    rows = rows.reshape(-1, 129)
    assert meta["rows"] == {"val": 40, "test": 40} and (rows[:, 0] == meta["vocab_size"] - 4).all()
    held = [prepare.encode(encoding, text).tolist() for text in shards.texts["shard_06542.parquet"]]
    assert rows.tolist() == packed_plainly(held, 129, 300)[:80]


def packed_plainly(documents, capacity, row_group_size):
    """The original's rows by the words of its description, in lists."""
    groups = [documents[i : i + row_group_size] for i in range(0, len(documents), row_group_size)]
    refills = [group[i : i + 128] for group in groups for i in range(0, len(group), 128)]
    buffer, rows, row = [], [], []
    while buffer or refills:
        while len(buffer) < 1000 and refills:
            buffer += refills.pop(0)
        fitting = [document for document in buffer if len(document) <= capacity - len(row)]
        chosen = max(fitting, key=len) if fitting else min(buffer, key=len)
        buffer.remove(chosen)
        row += chosen[: capacity - len(row)]
        if len(row) == capacity:
            rows.append(row)
            row = []
    return rows


def test_the_factor_to_the_originals_byte_count(cache, shards, monkeypatch, capsys):
    monkeypatch.setitem(prepare.PRESETS, "datacenter", prepare.Preset("cuda", "climbmix", 300, 128, 128 * 40))
    prepare.prepare(None, "datacenter", 2)
    folder, meta = current(cache)
    targets = np.fromfile(folder / "val.bin", np.uint16).reshape(-1, 129)[:, 1:].ravel().tolist()
    encoding = prepare.load_tokenizer(folder)
    pieces = [encoding.decode_single_token_bytes(t) for t in targets if t < meta["vocab_size"] - 4]
    original = sum(len(piece.decode("utf-8", "replace").encode()) for piece in pieces)
    capsys.readouterr()
    prepare.print_summary({"split": "val", "val_bpb": 1.0, "seconds": 0.0}, {}, meta)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == f"original_factor:  {sum(map(len, pieces)) / original:.6f}" and original > sum(map(len, pieces))


def test_the_tokenizer_sees_the_beginning_of_each_text_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(prepare, "TOKENIZER_DOC_CHARS", 5)
    monkeypatch.setattr(prepare, "TOKENIZER_CHARS", 12)
    assert list(prepare.first_chars(["abcdefgh", "ij", "klmnopqr", "never"])) == ["abcde", "ij", "klmno"]


# ---------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------


class Shards(http.server.BaseHTTPRequestHandler):
    """Files with Range and the hub's hash header. `faults` names what to do wrong, one request after another."""

    files: dict[str, bytes]
    texts: dict[str, list[str]]
    faults: list[str]
    log: list[tuple[str, str | None]]  # file, Range

    def do_GET(self):
        name, wanted = self.path.rsplit("/", 1)[1], self.headers.get("Range")
        self.log.append((name, wanted))
        fault = self.faults.pop(0) if self.faults else ""
        if name not in self.files or fault == "404":
            return self.send_error(404)
        body = self.files[name]
        first = int(wanted[6:-1]) if wanted and fault != "ignore range" else 0
        if first >= len(body):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        digest = hashlib.sha256(body).hexdigest() if fault != "wrong hash" else "0" * 64
        if fault != "no hash":
            self.send_header("X-Linked-ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        part = body[first:] if fault != "garbage" else b"x" * len(body)
        self.wfile.write(part[:len(part) // 2] if fault == "break" else part)

    def log_message(self, *_):
        pass


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A hub on port 0 with two training shards and the held-out one, which share some documents."""
    held = documents(1200, seed=3, words=8)
    texts = {"shard_00000.parquet": documents(500, seed=4) + held[:3], "shard_00001.parquet": documents(500, seed=5),
             "shard_06542.parquet": held}
    files = {name: write_parquet(tmp_path / name, content).read_bytes() for name, content in texts.items()}
    handler = type("Handler", (Shards,), {"files": files, "texts": texts, "faults": [], "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AUTORESEARCH_DATA_URL", handler.url)
    monkeypatch.setattr(prepare, "RETRY_PAUSES_S", (0, 0, 0))
    yield handler
    server.shutdown()
    server.server_close()


def download(shards, tmp_path) -> Path:
    path = tmp_path / "store" / "shard_00000.parquet"
    assert prepare.download(f"{shards.url}/{path.name}", path) is None
    assert path.read_bytes() == shards.files[path.name] and os.listdir(path.parent) == [path.name]
    return path


@pytest.mark.parametrize("faults, ranges", [
    ([], [None]),
    slow(["no hash"], [None]),
    (["break"], [None, "bytes=65536-"]),
    slow(["break", "ignore range"], [None, "bytes=65536-"]),
    (["wrong hash"], [None, None]),
    slow(["garbage"], [None, None]),
])
def test_a_download_survives(shards, tmp_path, faults, ranges):
    shards.faults[:] = faults
    path = download(shards, tmp_path)
    assert [wanted for _, wanted in shards.log] == ranges and len(shards.files[path.name]) > 2 * 65536


def test_a_part_that_is_too_long_or_from_another_file_is_thrown_away(shards, tmp_path):
    for content in (b"z" * 10**6, b"z" * 1000):
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / "shard_00000.part").write_bytes(content)
        download(shards, tmp_path).unlink()


@pytest.mark.parametrize("fault, line", [("404", "HTTP 404"), ("wrong hash", "not the file that the server promised")])
def test_downloads_that_cannot_succeed_are_one_line(cache, shards, capsys, fault, line):
    shards.faults[:] = [fault] * 9
    with pytest.raises(SystemExit) as stopped:
        prepare.prepare("climbmix", "cpu", 2)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and line in message and message.count("\n") == 1
    assert os.listdir(cache / "downloads" / "climbmix") == [] and not list(cache.glob("climbmix-*"))


def test_climbmix_in_contiguous_rows(cache, shards, capsys):
    prepare.prepare("climbmix", "cpu", 2)
    folder, meta = current(cache)
    split = split_texts(folder)
    held = shards.texts["shard_06542.parquet"]
    train = shards.texts["shard_00000.parquet"] + shards.texts["shard_00001.parquet"]
    assert split["train"] == [text for text in train if text not in held] and len(train) - len(split["train"]) == 3
    assert split["val"][:-1] == held[:len(split["val"]) - 1]
    requests = len(shards.log)
    capsys.readouterr()
    prepare.prepare("climbmix", "cpu", 2)
    assert len(shards.log) == requests == 3 and "tokenizer" not in capsys.readouterr().out


# ---------------------------------------------------------------------------
# Interruptions, company, no room
# ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reached", ["tokenizer.json", "val.bin", "train.bin"])
def test_killed_preparation_is_done_again(tmp_path, cache, texts_folder, reached):
    process = start(cache, "--dataset", str(texts_folder))
    while process.poll() is None and not list(cache.glob(f"*.partial/{reached}")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "current").exists()
    prepare.prepare(str(texts_folder), "cpu", 10)
    assert not list(cache.glob("*.partial")) and (current(cache)[0] / reached).exists()


@pytest.mark.parametrize("name", [slow("tokenizer.json"), slow("meta.json"), "-cpu", slow("current")])
def test_killed_at_a_rename_it_is_done_again(cache, texts_folder, name):
    code = f"""if True:
        import os, signal, prepare
        rename = os.replace
        os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if str(b).endswith({name!r}) else rename(a, b)
        prepare.main()"""
    command = [sys.executable, "-c", code, "--dataset", str(texts_folder), "--preset", "cpu"]
    env = {**os.environ, "AUTORESEARCH_CACHE": str(cache), "PYTHONPATH": str(PREPARE.parent)}
    assert subprocess.run(command, env=env, capture_output=True).returncode == -signal.SIGKILL
    assert not (cache / "current").exists()
    prepare.prepare(str(texts_folder), "cpu", 10)
    assert not list(cache.glob("*.partial")) and split_texts(current(cache)[0])["train"]


def test_two_at_once_build_once(cache, texts_folder):
    both = [start(cache, "--dataset", str(texts_folder)) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("tokenizer" in output for output in outputs) == [False, True]
    assert all("Ready" in output for output in outputs)


def test_no_room_left_is_one_line_and_leaves_nothing(cache, texts_folder):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    process = start(cache, "--dataset", str(texts_folder), preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 2 and errors.startswith("No room left for ") and errors.count("\n") == 1
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_another_format_counts_as_not_prepared(cache, texts_folder, capsys):
    prepare.prepare(str(texts_folder), "cpu", 10)
    folder, meta = current(cache)
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    with pytest.raises(SystemExit) as stopped:
        prepare.active_preset()
    assert stopped.value.code == 2 and "run `python prepare.py`" in capsys.readouterr().err
    prepare.prepare(str(texts_folder), "cpu", 10)
    assert current(cache)[1] == meta and prepare.active_preset() == "cpu"


# ---------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------


def bad_inputs(folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> (path to prepare, words of the message)."""
    (folder / "empty").mkdir(parents=True)
    (folder / "image.txt").write_bytes(b"\x89PNG\r\n\x00\x00" * 9999)
    (folder / "short.txt").write_text("".join(documents(3)))
    (folder / "blank.txt").write_text("")
    (folder / "notes.docx").write_text("text")
    (folder / "fake.parquet").write_text("text")
    (folder / "list.jsonl").write_text('{"text": "fine"}\n["text"]\n')
    (folder / "body.jsonl").write_text('{"body": "fine"}\n')
    write_parquet(folder / "body.parquet", documents(3), column="body")
    write_parquet(folder / "numbers.parquet", [1, 2, 3])
    damaged = bytearray(write_parquet(folder / "damaged.parquet", documents(300)).read_bytes())
    damaged[100:2000] = bytes(1900)
    (folder / "damaged.parquet").write_bytes(damaged)
    return {"missing": ("no such folder", "does not exist"), "folder": ("empty", "No text in"),
            "binary": ("image.txt", "is binary"), "short": ("short.txt", "Too little text"),
            "blank": ("blank.txt", "Too little text"), "kind": ("notes.docx", "No text in"),
            "fake": ("fake.parquet", "cannot be read as parquet"),
            "damaged": ("damaged.parquet", "cannot be read as parquet"),
            "numbers": ("numbers.parquet", "text (int64)"), "line": ("list.jsonl", "line 2"),
            "field": ("body.jsonl", '"text" string'), "column": ("body.parquet", "its columns are body")}


@pytest.mark.parametrize(
    "name", "missing folder binary short blank kind fake damaged numbers line field column".split())
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, cache, capsys, name):
    path, words = bad_inputs(tmp_path / "bad")[name]
    with pytest.raises(SystemExit) as stopped:
        prepare.prepare(str(tmp_path / "bad" / path), "cpu", 10)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and words in message and message.count("\n") == 1
    assert not cache.exists() or [file.suffix for file in cache.iterdir()] == [".lock"]


def test_a_gpu_that_torch_cannot_use_is_never_a_silent_cpu(tmp_path, monkeypatch, capsys):
    if prepare.torch.cuda.is_available() or prepare.torch.backends.mps.is_available():
        pytest.skip("torch can use this machine's GPU")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SystemExit) as stopped:
        prepare.detect_preset()
    assert stopped.value.code == 2 and "--preset cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_builtin(cache):
    output, errors = start(cache).communicate()
    assert "Ready" in output, errors
    meta = current(cache)[1]
    assert (meta["dataset"], meta["vocab_size"], meta["seq_len"]) == ("builtin", 2048, 256)
    assert meta["rows"] == {"val": 384, "test": 384} and meta["train_tokens"] > 10**6
