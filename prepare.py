"""
Data, clock and scoring: what no experiment may change.

    python prepare.py                                    # data for this machine: download, tokenizer, rows to score on
    python prepare.py --dataset builtin --preset cpu     # needs no network
    python prepare.py --dataset my_texts/                # a file or folder of .txt .md .py .jsonl .parquet
    python prepare.py score RUN_DIR [--split val|test]   # bits per byte of RUN_DIR/train.py with RUN_DIR/checkpoint.pt
    python prepare.py sample RUN_DIR [--prompt TEXT]     # how that model goes on

train.py imports load(), the Data it returns, and finish(). Cache: $AUTORESEARCH_CACHE, else ~/.cache/autoresearch.
Exit codes: 2 something the user must fix, 3 a model whose score would not be an honest one.
"""

import argparse
import base64
import codecs
import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

IMPORTED_AT = time.monotonic()  # before torch, whose import is part of a run's total time

import numpy as np
import torch
from numpy.random import default_rng  # the system seeds it: no seed of a run foretells it
# The arithmetic of a score is bound before train.py is imported. All are C functions: they call none that it could set
from torch import Tensor, abs_, amax, amin, clone, empty, float32, gather, index_select, log_softmax, masked_fill
from torch import stack, sub
from torch._C import DisableTorchFunction, _len_torch_dispatch_stack as active_dispatch_modes

to_cpu, to_numpy, LN_2 = Tensor.cpu, Tensor.numpy, math.log(2)

class Preset(NamedTuple):
    device: str      # torch device type
    dataset: str     # prepared when none is named
    vocab_size: int  # special tokens included
    seq_len: int     # tokens
    val_tokens: int  # targets in val; test has as many

PRESETS = {
    "datacenter": Preset("cuda", "climbmix", 8192, 2048, 20_971_520),
    "consumer": Preset("cuda", "climbmix", 8192, 1024, 4_194_304),
    "mac": Preset("mps", "climbmix", 4096, 512, 1_048_576),
    "cpu": Preset("cpu", "builtin", 2048, 256, 98_304),
}
HUB = "https://huggingface.co/datasets"
SHARDS = {  # data set -> its folder on the hub, training files, held-out file
    "climbmix": ("karpathy/climbmix-400b-shuffle/resolve/main",
                 [f"shard_{i:05d}.parquet" for i in range(6542)], "shard_06542.parquet"),
    "tinystories": ("roneneldan/TinyStories/resolve/main/data",
                    [f"train-0000{i}-of-00004-{name}.parquet" for i, name in enumerate(
                        ("2d5a1467fff1081b", "5852b56a2bd28fd9", "a26307300439e943", "d243063613e5a057"))],
                    "validation-00000-of-00001-869c898b519ad725.parquet"),
}
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
SPLITS = ("val", "test")
RETRY_PAUSES_S = (1, 2, 4, 8, 16, 0)  # after each attempt to download a file
FORMAT = 1                   # of the cache folder; another one counts as not prepared
TIME_BUDGET_S = 300.0        # seconds of training
SPLIT_PATTERN = (            # GPT-4's, but digits at most two at a time
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")  # the last ids; no bytes
TOKENIZER_CHARS, TOKENIZER_DOC_CHARS = 10**9, 10_000  # the tokenizer's training text: in all, of one document
BYTES_PER_TOKEN = 4          # a guess: text is held out before there is a tokenizer
HELD_SHARE = 10              # val and test each take at most one byte in this many
MIN_ROWS = 8                 # fewer rows in val or test are no measurement
PACK_DOCS, PACK_REFILL = 1000, 128  # documents the packing chooses among, and how many come at a time
PROBED_ROWS, STRIDE = 68, 64  # at least so many rows are asked again; every position modulo STRIDE is cut after
START_BATCHES, START_BATCH_ROWS = 18, 4  # of dummy rows, probed at start
TOLERANCE = 1e-3             # nats that a log probability may move by rounding (an FFT, a scan)
GPU_TOLERANCE = 0.25         # nats; bf16 logits, summed in another order: four units in the last place of 8 to 16
MEAN_TOLERANCE = 5e-3        # nats that the next token may lose: on average rounding vanishes, a small leak does not
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # bytes; of glibc's mallopt
PLAUSIBLE_BPB = (0.01, 100.0)  # what lies outside is no measurement of a language model

def stop(message: str, code: int = 2) -> NoReturn:
    """Ends the process with one line on stderr that says what to do, or what is wrong with the model (code 3)."""
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)

# ----------------------------------------------------------------------------------------------------------------------
# Files of the cache

def cache_root() -> Path:
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")

def write_text(path: Path, text: str) -> None:
    """Replaces the file at once: a reader sees the old text or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is none."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}

def current() -> tuple[Path, dict]:
    """Folder and meta.json of the session's data set, by hand of the one prepared last. Exit 2 if there is none."""
    with contextlib.suppress(OSError):
        name = os.environ.get("AUTORESEARCH_DATA") or (cache_root() / "current").read_text(encoding="utf-8").strip()
        folder = cache_root() / name
        meta = read_json(folder / "meta.json")
        if meta.get("format") == FORMAT:
            return folder, meta
    stop(f"No data in {cache_root()}: run `python prepare.py` first.")

def active_preset() -> str:
    """Name of the preset of the data set prepared last. Exit 2 if there is none."""
    return current()[1]["preset"]

def sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()

# ----------------------------------------------------------------------------------------------------------------------
# Texts

class Corpus(NamedTuple):
    name: str
    folder: str                         # its folder's name in the cache, without the preset
    signature: str                      # of its text; when it changes, the data are prepared anew
    texts: Callable[[], Iterator[str]]  # the documents, read anew at every call
    urls: dict[Path, str] = {}          # files to download first
    held: Path | None = None            # the one of them that val and test are cut from

def open_corpus(dataset: str, num_shards: int) -> Corpus:
    """The corpus of that name or path. Exit 2 where there is no text."""
    if dataset == "builtin":
        return Corpus(dataset, dataset, "", builtin_texts)
    if dataset in SHARDS:
        folder, names, held = SHARDS[dataset]
        store, base = cache_root() / "downloads" / dataset, os.environ.get("AUTORESEARCH_DATA_URL", HUB)
        files = [store / name for name in names[:max(1, num_shards)]]
        urls = {file: f"{base}/{folder}/{file.name}" for file in [*files, store / held]}
        return Corpus(dataset, dataset, str(len(files)), partial(read_texts, files), urls, store / held)
    root = Path(dataset).resolve()
    files = text_files(root)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(str(root).encode()).hexdigest()[:8]
    return Corpus(str(root), f"{root.stem}-{key}", hashlib.sha256(repr(stats).encode()).hexdigest(),
                  partial(read_texts, files))

def builtin_texts() -> Iterator[str]:
    """Source files of the running Python's standard library.

    Without tests, idlelib and the code tables of `encodings`: near-copies on both sides of a split would make
    memorizing look like learning.
    """
    left_out = {"test", "tests", "idle_test", "idlelib", "encodings", "lib2to3", "site-packages", "dist-packages"}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts) and (text := path.read_bytes().decode("utf-8", "replace")):
            yield text

def text_files(root: Path) -> list[Path]:
    """The file, or the text files of a folder and all below it. Exit 2 if there are none."""
    if not root.exists():
        stop(f"{root} does not exist; a data set is builtin, climbmix, tinystories or a path.")
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    files = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    if not files:
        stop(f"No text in {root}: wanted are files ending in {' '.join(TEXT_SUFFIXES)}.")
    return files

def read_texts(files: list[Path]) -> Iterator[str]:
    """The documents of text files, none of them empty. Exit 2 for what is not text."""
    piece = min(max(sum(file.stat().st_size for file in files) // 200, 500), 100_000)
    for file in files:
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            texts = (text for batch in parquet_batches(file) for text in batch)
        else:
            texts = jsonl_texts(file) if suffix == ".jsonl" else pieces(file, piece)
        yield from filter(None, texts)

def pieces(file: Path, size: int) -> Iterator[str]:
    """A text file in pieces of about `size` characters, cut at blank lines where there are any, else at line ends."""
    with open(file, encoding="utf-8", errors="replace", newline="") as stream:
        lines, chars = [], 0
        while line := stream.readline(size):
            if "\0" in line:
                stop(f"{file} is binary, not text.")
            lines.append(line)
            chars += len(line)
            if chars >= size or chars >= size // 2 and not line.strip():
                yield "".join(lines)
                lines, chars = [], 0
        yield "".join(lines)

def jsonl_texts(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"] or ""
                yield text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
            except (ValueError, TypeError, KeyError, AttributeError):
                stop(f'{file}, line {number}: not a JSON object with a "text" string.')

def parquet_batches(file: Path) -> Iterator[list[str]]:
    """The "text" column in order, PACK_REFILL documents at a time, fewer at the end of a row group. Exit 2 without."""
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            columns = {column.name: str(column.type) for column in parquet.schema_arrow}
            if columns.get("text") not in ("string", "large_string"):
                names = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
                stop(f'{file} has no column "text" of strings; its columns are {names}.')
            for group in range(parquet.num_row_groups):
                for batch in parquet.iter_batches(PACK_REFILL, [group], ["text"]):
                    yield [text or "" for text in batch.column(0).to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        stop(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}")

# ----------------------------------------------------------------------------------------------------------------------
# Downloads

def download(url: str, path: Path) -> None:
    """Gets a file unless it is there, going on where an earlier attempt stopped. Raises RequestException, one line."""
    import requests
    path.parent.mkdir(parents=True, exist_ok=True)
    part, reason = path.with_suffix(".part"), ""
    for pause_s in () if path.exists() else RETRY_PAUSES_S:
        try:
            fetch(url, part)
            return os.replace(part, path)
        except requests.RequestException as error:
            reason, status = error, getattr(error.response, "status_code", 500)
        if 400 <= status < 500 and status not in (408, 416, 429):
            raise requests.RequestException(f"{url} cannot be downloaded: HTTP {status}.")
        time.sleep(pause_s)
    if reason:
        raise requests.RequestException(
            f"{url} cannot be downloaded ({reason}); the same command goes on where this one stopped.")

def fetch(url: str, part: Path) -> None:
    """Appends to `part` what it lacks. Raises RequestException; what has another hash than promised is deleted."""
    import requests
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == 416:
            part.unlink()
        response.raise_for_status()
        with open(part, "ab" if response.status_code == 206 else "wb") as file:
            for block in response.iter_content(1 << 16):
                file.write(block)
        tags = [answer.headers.get("X-Linked-ETag", "").strip('"') for answer in [*response.history, response]]
    promised = next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), None)
    if not (sha256(part) == promised if promised else parquet_is_whole(part)):
        part.unlink()
        raise requests.RequestException("what came is not the file that the server promised")

def parquet_is_whole(path: Path) -> bool:
    """Whether a parquet file has a footer that can be read: for a server that promises no hash."""
    import pyarrow.parquet
    with contextlib.suppress(pyarrow.ArrowException, OSError):
        return pyarrow.parquet.read_metadata(path).num_rows > 0
    return False

def download_all(urls: dict[Path, str]) -> None:
    """Gets every file, four at a time. Exit 2 at the first that cannot be had."""
    import requests
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(download, urls.values(), urls)
        try:
            for _ in shown(done, "download", len(urls)):
                pass
        except requests.RequestException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            stop(str(error))

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """tiktoken.Encoding of `vocab_size` ids, the last of them special; fewer if the text has no more pairs to merge."""
    import rustbpe
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(first_chars(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    return make_encoding(SPLIT_PATTERN, [bytes(piece) for piece, _ in tokenizer.get_mergeable_ranks()])

def first_chars(texts: Iterable[str]) -> Iterator[str]:
    """The beginning of each text, until there are TOKENIZER_CHARS characters."""
    chars = 0
    for text in texts:
        yield text[:TOKENIZER_DOC_CHARS]
        chars += min(len(text), TOKENIZER_DOC_CHARS)
        if chars >= TOKENIZER_CHARS:
            return

def make_encoding(pattern: str, pieces: list[bytes]):
    """tiktoken.Encoding of the byte strings in the order of their ids."""
    import tiktoken
    special = {name: len(pieces) + i for i, name in enumerate(SPECIAL_TOKENS)}
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    return tiktoken.Encoding("autoresearch", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

def token_pieces(encoding) -> list[bytes]:
    """The byte string of each token that is not special, by id."""
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - len(SPECIAL_TOKENS))]

def save_tokenizer(encoding, folder: Path) -> None:
    merges = [base64.b64encode(piece).decode() for piece in token_pieces(encoding)]
    write_text(folder / "tokenizer.json",
               json.dumps({"pattern": SPLIT_PATTERN, "merges": merges, "special_tokens": SPECIAL_TOKENS}))

def load_tokenizer(folder: Path):
    """tiktoken.Encoding of a prepared folder."""
    saved = read_json(Path(folder) / "tokenizer.json")
    return make_encoding(saved["pattern"], [base64.b64decode(merge) for merge in saved["merges"]])

def token_bytes(encoding, original: bool = False) -> np.ndarray:
    """Bytes of each token (vocab,) int64, 0 for special ones. `original`: with broken UTF-8 replaced first."""
    pieces = token_pieces(encoding)
    if original:
        pieces = [piece.decode("utf-8", "replace").encode() for piece in pieces]
    return np.array([*map(len, pieces), *[0] * len(SPECIAL_TOKENS)])

def encode(encoding, text: str) -> np.ndarray:
    """uint16 tokens of a document, BOS first. What looks like a special token is ordinary text."""
    bos = encoding.n_vocab - len(SPECIAL_TOKENS)
    return np.concatenate([[bos], encoding.encode_to_numpy(text, disallowed_special=())]).astype(np.uint16)

def encoded(encoding, batches: Iterable[list[str]]) -> Iterator[list[np.ndarray]]:
    """The batches' documents as tokens, by all cores: tiktoken lets go of the interpreter's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches:
            yield list(pool.map(partial(encode, encoding), batch))

def in_batches(texts: Iterable[str], size: int = 128) -> Iterator[list[str]]:
    texts = iter(texts)
    return iter(lambda: list(islice(texts, size)), [])

# ----------------------------------------------------------------------------------------------------------------------
# Splits and rows

def digest(text: str) -> int:
    """64 bits that stand for a document."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

def hold_out(corpus: Corpus, preset: Preset) -> tuple[dict[str, list[str]], set[int]]:
    """The documents of val and of test, and the digests of all that must not be trained on.

    They are the first of the corpus' held-out file or, without one, those with the smallest digests, so that equal
    documents fall on the same side. One that is half a split long would not be a sample, and trains instead.
    """
    texts = partial(read_texts, [corpus.held]) if corpus.held else corpus.texts
    sizes = {digest(text): len(text.encode()) for text in texts()}
    share = min(preset.val_tokens * BYTES_PER_TOKEN, sum(sizes.values()) // (2 if corpus.held else HELD_SHARE))
    order = np.array([key for key in (sizes if corpus.held else sorted(sizes)) if sizes[key] <= share // 2], np.uint64)
    end_byte = np.cumsum([sizes[key] for key in order.tolist()])
    keys = {"val": order[end_byte <= share].tolist(),
            "test": order[(end_byte > share) & (end_byte <= 2 * share)].tolist()}
    wanted = {*keys["val"], *keys["test"]}
    found = {key: text for text in texts() if (key := digest(text)) in wanted}
    return {split: [found[key] for key in keys[split]] for split in SPLITS}, set(sizes) if corpus.held else wanted

def without(held: set[int], texts: Callable[[], Iterable[str]]) -> Iterator[str]:
    """The texts whose digests are not held out."""
    return (text for text in texts() if digest(text) not in held)

def contiguous_rows(encoding, texts: list[str], seq_len: int, count: int) -> np.ndarray:
    """uint16 (count or fewer, seq_len + 1) of the texts in one stream; a row begins with the last token before it."""
    documents = [document for batch in encoded(encoding, in_batches(texts)) for document in batch]
    stream = np.concatenate(documents or [np.empty(0, np.uint16)])
    starts = np.arange(min(count, max(0, len(stream) - 1) // seq_len)) * seq_len
    return stream[starts[:, None] + np.arange(seq_len + 1)]

def pack_best_fit(batches: Iterable[list[np.ndarray]], capacity: int) -> Iterator[np.ndarray]:
    """Rows (capacity,) of tokens, packed from batches of documents as the original packs them.

    A row takes the longest document that fits, the first of equals; when none does, the shortest is cropped to fill it.
    """
    batches, documents, row, room = iter(batches), [], [], capacity
    while True:
        while len(documents) < PACK_DOCS and (batch := next(batches, None)):
            documents.extend(batch)
        if not documents:
            return
        lengths = np.fromiter(map(len, documents), dtype=np.int64)
        fits = np.where(lengths <= room, lengths, 0)
        row.append(documents.pop(int(fits.argmax() if fits.any() else lengths.argmin()))[:room])
        room -= len(row[-1])
        if not room:
            yield np.concatenate(row)
            row, room = [], capacity

def scored_as_original(dataset: str, preset_name: str) -> bool:
    """Whether the rows are those that the original is scored on."""
    return (dataset, preset_name) == ("climbmix", "datacenter")

def make_rows(encoding, corpus: Corpus, preset_name: str, texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """uint16 (rows, seq_len + 1) of val and of test. Exit 2 if there is too little text."""
    seq_len, count = PRESETS[preset_name].seq_len, PRESETS[preset_name].val_tokens // PRESETS[preset_name].seq_len
    if scored_as_original(corpus.name, preset_name):
        packed = pack_best_fit(encoded(encoding, parquet_batches(corpus.held)), seq_len + 1)
        rows = {split: np.array(list(islice(packed, count)), dtype=np.uint16) for split in SPLITS}
    else:
        rows = {split: contiguous_rows(encoding, texts[split], seq_len, count) for split in SPLITS}
    if min(map(len, rows.values())) < MIN_ROWS:
        stop(f"Too little text in {corpus.name} to train on, choose by and test on: this preset needs several "
             f"documents, in all about {MIN_ROWS * seq_len * HELD_SHARE * BYTES_PER_TOKEN // 1000} kB.")
    return rows

# ----------------------------------------------------------------------------------------------------------------------
# Preparation

@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Prints what was done and the seconds it took."""
    began = time.monotonic()
    yield
    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)

def shown(items: Iterable, name: str, total: int | None = None) -> Iterable:
    """The items, with a progress bar on a terminal."""
    from rich.progress import track
    return track(items, description=name, total=total, disable=not sys.stdout.isatty(), transient=True)

def write_stream(folder: Path, encoding, texts: Iterable[str]) -> tuple[int, int]:
    """Writes train.bin and train_docs.npy; returns the number of tokens and of documents."""
    lengths = [0]
    with open(folder / "train.bin", "wb") as file:
        for batch in encoded(encoding, in_batches(texts)):
            lengths.extend(map(len, batch))
            file.write(np.concatenate(batch))
    ends = np.cumsum(lengths)
    buffer = io.BytesIO()  # np.save on a file hides the reason when the disk is full
    np.save(buffer, ends[:-1])
    (folder / "train_docs.npy").write_bytes(buffer.getbuffer())
    return int(ends[-1]), len(lengths) - 1

def build(folder: Path, corpus: Corpus, preset_name: str) -> None:
    """Writes every file of the data set into the folder."""
    if corpus.urls:
        with stage("download"):
            download_all(corpus.urls)
    with stage("hold out val and test"):
        texts, held = hold_out(corpus, PRESETS[preset_name])
    train = partial(without, held, corpus.texts)
    with stage("train the tokenizer"):
        texts_all = corpus.texts if scored_as_original(corpus.name, preset_name) else train
        encoding = train_tokenizer(shown(texts_all(), "tokenizer"), PRESETS[preset_name].vocab_size)
        save_tokenizer(encoding, folder)
    with stage("pack val and test"):
        rows = make_rows(encoding, corpus, preset_name, texts)
        for split in SPLITS:
            (folder / f"{split}.bin").write_bytes(rows[split].tobytes())
    with stage("encode the training text"):
        tokens, documents = write_stream(folder, encoding, shown(train(), "encode"))
    targets = {split: np.bincount(rows[split][:, 1:].ravel(), minlength=encoding.n_vocab) for split in SPLITS}
    meta = {
        "format": FORMAT, "preset": preset_name,
        "vocab_size": encoding.n_vocab, "seq_len": PRESETS[preset_name].seq_len,
        "train_tokens": tokens, "train_docs": documents, "rows": {split: len(rows[split]) for split in SPLITS},
        "bytes": {split: int(targets[split] @ token_bytes(encoding)) for split in SPLITS},
        "original_bytes": {split: int(targets[split] @ token_bytes(encoding, original=True)) for split in SPLITS},
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    fingerprint = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    meta |= {"dataset": corpus.name, "signature": corpus.signature, "fingerprint": fingerprint}
    write_text(folder / "meta.json", json.dumps(meta, indent=1))

def build_whole(folder: Path, corpus: Corpus, preset_name: str) -> None:
    """Builds beside the folder, then renames: what is there is whole, and a failure leaves nothing."""
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    try:
        build(partial_folder, corpus, preset_name)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial_folder, folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)

def prepare(dataset: str | None, preset_name: str, num_shards: int) -> None:
    """Makes the data set the current one, and builds it unless it is there. A second process waits for the first."""
    import fcntl
    preset_name = detect_preset() if preset_name == "auto" else preset_name
    corpus = open_corpus(dataset or PRESETS[preset_name].dataset, num_shards)
    folder = cache_root() / f"{corpus.folder}-{preset_name}"
    print(f"{corpus.name} for the {preset_name} preset, in {folder}", flush=True)
    cache_root().mkdir(parents=True, exist_ok=True)
    with open(cache_root() / f"{corpus.folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it, however this process ends
        meta = read_json(folder / "meta.json")
        if (meta.get("format"), meta.get("signature")) != (FORMAT, corpus.signature):
            build_whole(folder, corpus, preset_name)
        write_text(cache_root() / "current", folder.name)
        meta = read_json(folder / "meta.json")
    print(f"Ready: {meta['train_tokens'] / 1e6:.1f} M training tokens, vocabulary {meta['vocab_size']}, "
          f"{meta['rows']['val']} val and {meta['rows']['test']} test rows of {meta['seq_len']}.\n"
          "Next: `python train.py` makes one run, `python agent.py` a session.")

def detect_preset() -> str:
    """The preset for this machine's hardware. Exit 2 if there is a GPU that torch cannot use."""
    if torch.backends.mps.is_available():
        return "mac"
    smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    if not (torch.cuda.is_available() or Path("/dev/nvidia0").exists() or smi and "GPU 0" in smi.stdout):
        return "cpu"
    try:
        torch.ones(1, device="cuda").add_(1)  # a GPU may be seen that this torch has no kernels for
    except (AssertionError, RuntimeError) as error:
        stop(f"There is an NVIDIA GPU, but torch {torch.__version__} cannot use it: {str(error).splitlines()[0]}. "
             "Install a torch build for its driver, or say `--preset cpu`.")
    return "datacenter" if torch.cuda.get_device_properties(0).total_memory >= 40e9 else "consumer"

# ----------------------------------------------------------------------------------------------------------------------
# Log probabilities, and the probes without which they mean nothing

class Invalid(Exception):
    """The model's score would not be an honest one; the message names the rule, in one line."""

class Round(NamedTuple):
    """Some batches, and one more of rows lent by them, in which all tokens after a secret cut are others."""
    order: np.ndarray   # (batches, B): which rows they are
    x: Tensor           # (batches, B, T): their tokens
    y: Tensor           # (batches, B, T, 1): their targets
    lent: list[Tensor]  # for each batch which of its rows it lends; B in all
    first: Tensor       # (B, T): the lent rows
    target: Tensor      # (B, T, 1): their targets
    changed: Tensor     # (B, T): the lent rows, changed after the cut
    cuts: Tensor        # (B, 1, 1): the last position that is as it was
    after: Tensor       # (B, T): whether a position is after the cut

def make_rounds(rows: np.ndarray, batch_rows: int, vocab_size: int, device: torch.device) -> list[Round]:
    """What a model is asked: rows (rows, T + 1) in a secret order, in batches of one shape, and some of them again.

    Every batch lends at least one row, and at least PROBED_ROWS are lent; where there are fewer they come repeatedly.
    """
    rng, batch_rows = default_rng(), min(batch_rows, len(rows))
    batches = math.ceil(len(rows) / batch_rows)
    rounds = math.ceil(max(PROBED_ROWS, batches) / batch_rows)
    order = np.resize(rng.permutation(len(rows)), (max(batches, rounds), batch_rows))
    cuts = spread_cuts(rng, rounds * batch_rows, rows.shape[1] - 1).reshape(rounds, batch_rows, 1)
    return [make_round(rng, rows, part, cut, vocab_size, device)
            for part, cut in zip(np.array_split(order, rounds), cuts)]

def make_round(rng, rows: np.ndarray, order: np.ndarray, cuts: np.ndarray, vocab_size: int, device) -> Round:
    """The round of the batches of rows that order (batches, B) names, with cuts (B, 1)."""
    batches, size = order.shape
    tokens = rows[order].astype(np.int64)
    lender = np.arange(size) * batches // size  # which batch each of the lent rows is of
    which = rng.permuted(np.tile(np.arange(size), (batches, 1)), axis=1)[lender, np.arange(size)]
    first, target = tokens[lender, which, :-1], tokens[lender, which, 1:]
    after = np.arange(first.shape[1]) > cuts
    changed = np.where(after, (first + rng.integers(1, vocab_size, first.shape)) % vocab_size, first)
    lent = [torch.from_numpy(which[lender == batch]).to(device) for batch in range(batches)]
    x, y, *rest = (torch.from_numpy(array).to(device) for array in (
        tokens[..., :-1], tokens[..., 1:, None], first, target[..., None], changed, cuts[..., None], after))
    return Round(order, x, y, lent, *rest)

def spread_cuts(rng, count: int, length: int) -> np.ndarray:
    """(count,) positions in a random order, none the last: the ends, and count permitting all remainders by STRIDE."""
    stride = min(STRIDE, length - 1)
    remainder = np.arange(count) % stride
    cuts = remainder + stride * rng.integers((length - 2 - remainder) // stride + 1)
    ends = [0, length - 2, 1, 2][:max(0, count - stride)]  # with little context a leak pays most
    cuts[stride:stride + len(ends)] = np.minimum(ends, length - 2)
    return rng.permutation(cuts)

def log_probabilities(model: torch.nn.Module, vocab_size: int, x: Tensor) -> Tensor:
    """fp32 (B, T, vocab) for inputs x (B, T), of which the model gets a copy. Raises Invalid."""
    with DisableTorchFunction():
        own = clone(x)
    logits = model(own)
    if type(logits) is not Tensor:
        raise Invalid(f"wrong output: forward must return a plain torch.Tensor, not {type(logits).__name__}")
    if active_dispatch_modes():
        raise Invalid("wrong output: a torch dispatch mode is active")
    with DisableTorchFunction():
        if tuple(logits.shape) != (*x.shape, vocab_size):
            raise Invalid(f"wrong output: forward must return logits of shape (B, T, vocab) = {(*x.shape, vocab_size)}")
        return log_softmax(logits, 2, dtype=float32)

def score_batch(ask: Callable, x: Tensor, y: Tensor, lent: Tensor, kept: Tensor) -> Tensor:
    """Log probabilities (B, T, 1) of the targets y; writes those of all tokens, for the rows lent (n,), to kept."""
    found = ask(x)
    with DisableTorchFunction():
        index_select(found, 0, lent, out=kept)
        return gather(found, 2, y)

def compare(kept: Tensor, again: Tensor, asked: Round) -> tuple[Tensor, Tensor, Tensor]:
    """How far log probabilities moved at most (B, T), 0 after the cut; the fall of the next token's at it (B, 1, 1);
    how far they lie apart. Overwrites kept, to save its size of memory."""
    with DisableTorchFunction():
        spread = sub(amax(kept), amin(kept))
        change = sub(kept, again, out=kept)
        fall = gather(gather(change, 2, asked.target), 1, asked.cuts)
        return masked_fill(amax(abs_(change), 2), asked.after, 0.0), fall, spread

@torch.no_grad()
def examine(model: torch.nn.Module, twin: torch.nn.Module, rounds: list[Round], vocab_size: int) -> np.ndarray:
    """float32 (rows, T): -log p of every target. Raises Invalid if the model does not keep the rules.

    The log probabilities that count must themselves come out again in a later pass, among other rows and before other
    tokens: a model that looks ahead, mixes rows or draws lots cannot know when not to. The later pass goes to its twin,
    which has the same weights and has seen none of these rows. Nothing is read back from the device before the end.
    """
    ask, ask_twin = (partial(log_probabilities, one, vocab_size) for one in (model, twin))
    before, logs, changes = {}, [], []
    kept = empty((*rounds[0].first.shape, vocab_size), dtype=float32, device=rounds[0].x.device)
    for asked in rounds:
        for x, y, lent, part in zip(asked.x, asked.y, asked.lent, kept.split([len(lent) for lent in asked.lent])):
            logs.append(score_batch(ask, x, y, lent, part))
            before = before or copied_state(model)  # only now: a first pass may make tables
        changes.append(compare(kept, ask_twin(asked.changed), asked))
    device_type = kept.device.type
    del kept  # a diagnosis needs the memory
    logs = on_host(logs).reshape(-1, logs[0].shape[1])
    moved, falls, spreads = map(on_host, zip(*changes))
    if not (np.isfinite(logs).all() and np.isfinite(moved).all()):
        raise Invalid("not finite: forward returns NaN or infinite logits; to mask one, subtract 1e4")
    check_changes(ask, rounds, moved, falls, tolerances(device_type, spreads))
    if not has_state(model, before):
        raise Invalid("changes itself: parameters or buffers are not the same after scoring as before")
    order = np.concatenate([asked.order for asked in rounds]).ravel()
    nats = np.empty((order.max() + 1, logs.shape[1]), np.float32)
    nats[order] = -logs
    return nats

def on_host(tensors: Iterable[Tensor]) -> np.ndarray:
    """The tensors, of one shape, in one array."""
    with DisableTorchFunction():
        return to_numpy(to_cpu(stack(list(tensors))))

def tolerances(device_type: str, spreads: np.ndarray) -> np.ndarray:
    """Nats that a log probability may move, for each round: on a GPU the more, the farther they lie apart."""
    return np.clip(spreads / 64, TOLERANCE, TOLERANCE if device_type == "cpu" else GPU_TOLERANCE)

def check_changes(ask, rounds: list[Round], moved: np.ndarray, falls: np.ndarray, allowed: np.ndarray) -> None:
    """Raises Invalid if log probabilities moved (rounds, B, T), or on average fell, by more than rounding explains."""
    most = moved.max(axis=(1, 2))
    worst = int((most - allowed).argmax())
    if most[worst] > allowed[worst]:
        row = int(moved[worst].max(axis=1).argmax())
        raise Invalid(diagnosis(ask, rounds[worst], row, float(most[worst]), float(allowed[worst])))
    if falls.mean() > MEAN_TOLERANCE:
        raise Invalid(f"looks ahead: the next token's log probability falls by {falls.mean():.2g} "
                      "when the tokens after it change")

def diagnosis(ask: Callable, asked: Round, row: int, moved: float, allowed: float) -> str:
    """The rule that a model breaks whose log probabilities of that row of the round moved, in plain words."""
    first = ask(asked.first)
    drift = float((first - ask(asked.first)).abs().max())
    if drift <= allowed:
        others = (asked.first + 1) % first.shape[2]
        others[row] = asked.first[row]
        if (first[row] - ask(others.roll(1, 0)).roll(-1, 0)[row]).abs().max() > allowed:
            return "mixes rows: the output of a row changes with the other rows of its batch"
        ahead = compare(first, ask(asked.changed), asked)[0]
        row, position = divmod(int(ahead.argmax()), ahead.shape[1])
        if ahead[row, position] > allowed:
            return f"looks ahead: log probabilities at {position} change with tokens after {int(asked.cuts[row])}"
    return ("not repeatable: the same tokens give other log probabilities the second time "
            f"(by {max(drift, moved):.2g})")

def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}

def copied_state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state_of(model).items()}

def has_state(model: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether parameters and buffers are as they were; new ones may be there."""
    now = state_of(model)
    return all(name in now and now[name].shape == was.shape
               and bool(((now[name] == was) | (now[name] != now[name]) & (was != was)).all())
               for name, was in before.items())

@contextlib.contextmanager
def for_probing(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, and noise for parameters that are all zero, behind which a leak could not be seen.

    Afterwards modes, parameters, buffers and torch's random streams are as before.
    """
    modes = [(module, module.training) for module in model.modules()]
    zeros = [p for p in model.parameters() if not p.any()]
    saved = [(tensor, tensor.clone()) for tensor in [*model.buffers(), *zeros]]
    streams = [torch, *{"cuda": [torch.cuda], "mps": [torch.mps]}.get(device.type, [])]
    states = [stream.get_rng_state() for stream in streams]
    for p in zeros:
        noise = default_rng().standard_normal(tuple(p.shape))
        p.copy_(torch.as_tensor(noise * (p.shape[-1] if p.dim() else 1) ** -0.5))
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for tensor, before in saved:
            tensor.copy_(before)
        for stream, state in zip(streams, states):
            stream.set_rng_state(state)

# ----------------------------------------------------------------------------------------------------------------------
# A run: what train.py uses

def device_of(preset_name: str) -> torch.device:
    """The preset's device. Exit 2 if the machine has none."""
    kind = PRESETS[preset_name].device
    if not {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}[kind]():
        stop(f"The data are for the {preset_name} preset, but torch finds no {kind} device: run `python prepare.py`.")
    return torch.device(kind)

class Data:
    """A run's data. The training tokens, and the clock, come with start()."""

    def __init__(self, folder: Path, meta: dict):
        self.vocab_size, self.seq_len, self.preset = meta["vocab_size"], meta["seq_len"], meta["preset"]
        self.device = device_of(self.preset)
        self.bos = self.vocab_size - len(SPECIAL_TOKENS)  # the token that leads every document
        self.budget_s = float(os.environ.get("AUTORESEARCH_TIME_BUDGET", TIME_BUDGET_S))
        self._folder, self._started = folder, None
        self._generator = torch.Generator().manual_seed(0)

    def dummy_batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random tokens x, y, int64 (rows, seq_len), to compile and warm up on; no seeded stream moves."""
        tokens = torch.randint(self.vocab_size, (rows, self.seq_len + 1), generator=self._generator).to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def start(self, model: torch.nn.Module) -> None:
        """Probes the model (exit 3 if it fails), fetches the training tokens and starts the clock."""
        plain = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        rows = default_rng().integers(self.vocab_size, size=(START_BATCHES * START_BATCH_ROWS, self.seq_len + 1))
        rounds = make_rounds(rows, START_BATCH_ROWS, self.vocab_size, self.device)
        try:
            with torch.no_grad(), for_probing(plain, self.device):
                examine(plain, plain, rounds, self.vocab_size)
        except Invalid as fault:
            stop(str(fault), 3)
        if under_agent():
            _, (stream, starts) = receive()
        else:
            stream, starts = (open(self._folder / name, "rb") for name in ("train.bin", "train_docs.npy"))
        self._started = time.monotonic()
        tokens = torch.from_numpy(np.memmap(stream, dtype=np.int16, mode="c"))  # no id needs the sixteenth bit
        self._tokens = tokens if self.device.type == "cpu" else tokens.to(self.device)
        self.doc_starts = torch.from_numpy(np.load(starts)).to(self.device)  # int64 (documents,)
        self.num_tokens = len(tokens)

    def gather(self, starts, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows x, y, int64 (B, length), of the stream at starts (B,); y is x one token later.

        Raises ValueError if one leaves the stream. Starts that are on a GPU are not looked at: that would wait for it.
        """
        starts = torch.as_tensor(starts, dtype=torch.int64)
        last = self.num_tokens - length - 1
        if starts.device.type == "cpu" and starts.numel() and not 0 <= starts.min() <= starts.max() <= last:
            raise ValueError(f"gather: windows of {length} tokens start between 0 and {last}, "
                             f"not at {int(starts.min())} to {int(starts.max())}")
        offsets = torch.arange(length + 1, device=self.device)
        windows = self._tokens[starts.to(self.device)[:, None] + offsets].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def elapsed(self) -> float:
        """Seconds since start(); 0 before."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def progress(self) -> float:
        """Share of the time budget that is spent, 0 to 1."""
        return min(1.0, self.elapsed() / self.budget_s)

    def expired(self) -> bool:
        return self.elapsed() >= self.budget_s

_data: Data | None = None  # of this process; finish() reads its clock

def load() -> Data:
    """The run's data; seeds random, numpy and torch. Exit 2 if nothing is prepared or the device is missing."""
    global _data
    keep_memory()
    _data = Data(*current())
    seed = int(os.environ.get("AUTORESEARCH_SEED", 42))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return _data

def keep_memory() -> None:
    """Has glibc keep what is freed: else every step on the CPU gets its large tensors anew, in 10,000 page faults."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        import ctypes
        mallopt = ctypes.CDLL(None).mallopt
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(option, 2**31 - 1)

def under_agent() -> bool:
    return "AUTORESEARCH_HANDOVER_FD" in os.environ

def receive() -> tuple[str, list]:
    """What agent.py hands over, once: a message and open files, to a run its tokens, to the scorer its rows."""
    with socket.socket(fileno=int(os.environ["AUTORESEARCH_HANDOVER_FD"])) as channel:
        channel.sendall(b"start\n")
        message, descriptors, _, _ = socket.recv_fds(channel, 1024, 2)
    if not descriptors:
        stop("agent.py ended before it handed over the data.")
    return message.decode(), [os.fdopen(descriptor, "rb") for descriptor in descriptors]

def finish(model: torch.nn.Module, *, steps: int, tokens: int, **facts) -> None:
    """Writes checkpoint.pt and facts.json into the run's folder, and ends the process; by hand as the scorer does."""
    training_seconds = _data.elapsed()
    folder = Path.cwd() if under_agent() else Path(__file__).resolve().parent / "runs" / "by-hand"
    if not under_agent():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sys.modules["__main__"].__file__, folder / "train.py")
    state = {name.replace("_orig_mod.", ""): tensor.cpu() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
    facts |= {
        "steps": steps, "tokens": tokens, "training_seconds": training_seconds,
        "total_seconds": time.monotonic() - IMPORTED_AT, "peak_vram_mb": peak_memory_mb(_data.device.type),
        "num_params": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if _data.device.type == "cuda" else _data.device.type,
    }
    write_text(folder / "facts.json", json.dumps(facts))
    sys.stdout.flush()
    if under_agent():
        os._exit(0)   # nothing is left to be put in order
    os.execv(sys.executable, [sys.executable, __file__, "score", str(folder)])  # gives the device's memory back

def peak_memory_mb(device_type: str) -> float:
    """MiB in use at most: of device memory, on the CPU of resident memory."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if device_type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

# ----------------------------------------------------------------------------------------------------------------------
# Scoring

def load_model(run_dir: Path, meta: dict) -> torch.nn.Module:
    """The run's model with its weights. What its code raises is not caught."""
    spec = importlib.util.spec_from_file_location("train", run_dir / "train.py")
    sys.modules["train"] = train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    model = train.build_model(meta["vocab_size"], meta["seq_len"])
    model.load_state_dict(torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True))
    return model

def measure(run_dir: Path, split: str) -> dict:
    """The content of score.json; writes the nats of every row beside it. Raises Invalid."""
    began = time.monotonic()
    keep_memory()
    folder, meta = current()
    device, vocab_size, seq_len = device_of(meta["preset"]), meta["vocab_size"], meta["seq_len"]
    secret, (file,) = receive() if under_agent() else ("", [open(folder / f"{split}.bin", "rb")])
    with file:  # under agent.py no path leads to the rows, and a score without its secret does not count
        rows = np.frombuffer(file.read(), dtype=np.int16).reshape(-1, seq_len + 1)
    batch_rows = max(1, (2**22 if device.type == "cpu" else 2**28) // (seq_len * vocab_size))
    rounds = make_rounds(rows, batch_rows, vocab_size, device)  # before train.py is imported
    model, twin = (load_model(run_dir, meta).to(device).eval() for _ in range(2))  # they share nothing, not a module
    has_bytes = rows[:, 1:] < vocab_size - len(SPECIAL_TOKENS)
    nats = (examine(model, twin, rounds, vocab_size) * has_bytes).sum(axis=1, dtype=np.float64)
    bpb = float(nats.sum()) / (LN_2 * meta["bytes"][split])
    if not PLAUSIBLE_BPB[0] < bpb < PLAUSIBLE_BPB[1]:  # NaN, too
        raise Invalid(f"not a plausible score: {bpb:.6f} bits per byte")
    np.save(run_dir / f"{split}_rows.npy", nats)
    return {f"{split}_bpb": bpb, "split": split, "rows": len(rows), "bytes": meta["bytes"][split],
            "nats": float(nats.sum()), "seconds": time.monotonic() - began, "fingerprint": meta["fingerprint"],
            "secret": secret}

def check_run(run_dir: Path) -> None:
    """Exit 2 if a folder does not hold what a run leaves."""
    for name in ("train.py", "checkpoint.pt"):
        if not (run_dir / name).is_file():
            stop(f"No run to load: {run_dir / name} does not exist.")

def score(run_dir: Path, split: str) -> int:
    """Prints the summary, then writes score.json, for test score-test.json. Returns 3 if there is no honest score."""
    check_run(run_dir)
    path = run_dir / {"val": "score.json", "test": "score-test.json"}[split]
    path.unlink(missing_ok=True)
    try:
        result = measure(run_dir, split)
        print_summary(result, read_json(run_dir / "facts.json"), current()[1])
    except Invalid as fault:
        result = {"invalid": str(fault)}
        print(fault, file=sys.stderr, flush=True)
    write_text(path, json.dumps(result))
    return 3 if "invalid" in result else 0

def print_summary(result: dict, facts: dict, meta: dict) -> None:
    """The original's lines. Facts are the run's own claims; one that is missing or no number counts as 0."""
    fact = {name: value for name, value in facts.items() if isinstance(value, (int, float))}.get
    split = result["split"]
    lines = {
        f"{split}_bpb": f"{result[split + '_bpb']:.6f}",
        "training_seconds": f"{fact('training_seconds', 0):.1f}",
        "total_seconds": f"{fact('total_seconds', 0) + result['seconds']:.1f}",
        "peak_vram_mb": f"{fact('peak_vram_mb', 0):.1f}",
        "mfu_percent": f"{fact('mfu_percent', 0):.2f}",
        "total_tokens_M": f"{fact('tokens', 0) / 1e6:.1f}",
        "num_steps": f"{fact('steps', 0):.0f}",
        "num_params_M": f"{fact('num_params', 0) / 1e6:.1f}",
        "depth": f"{fact('depth', 0):.0f}",
    }
    if scored_as_original(meta["dataset"], meta["preset"]):  # val_bpb times this is the number the original prints
        lines["original_factor"] = f"{meta['bytes'][split] / meta['original_bytes'][split]:.6f}"
    print("---", *(f"{name + ':':<17} {value}" for name, value in lines.items()), sep="\n", flush=True)

# ----------------------------------------------------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def sample(run_dir: Path, prompt: str, count: int, temperature: float) -> None:
    """Prints the prompt and up to count tokens more, to the end of a document.

    A folder that holds meta.json and tokenizer.json, such as best/, needs no prepared data. Rows are padded at the end,
    where a causal model does not look.
    """
    check_run(run_dir)
    if (run_dir / "meta.json").is_file():
        os.environ.update(AUTORESEARCH_CACHE=str(run_dir.parent), AUTORESEARCH_DATA=run_dir.name)
    folder, meta = current()
    encoding, device = load_tokenizer(folder), device_of(meta["preset"])
    model, text = load_model(run_dir, meta).to(device).eval(), codecs.getincrementaldecoder("utf-8")("replace")
    last = meta["vocab_size"] - len(SPECIAL_TOKENS)
    tokens = [last, *encoding.encode_ordinary(prompt)]  # the special token that leads every document
    print(prompt, end="", flush=True)
    for _ in range(count):
        row = tokens[-meta["seq_len"]:]
        x = torch.tensor([row + [0] * (meta["seq_len"] - len(row))], device=device)
        logits = model(x)[0, len(row) - 1].float() / temperature
        tokens.append(int(torch.multinomial(logits.softmax(0), 1)))
        if tokens[-1] >= last:
            break
        print(text.decode(encoding.decode_single_token_bytes(tokens[-1])), end="", flush=True)
    print(text.decode(b"", True))

# ----------------------------------------------------------------------------------------------------------------------
# Command line

def positive(word: str) -> float:
    """An argument above 0."""
    if not 0 < (value := float(word)) < math.inf:
        raise ValueError
    return value

def parse_arguments(words: list[str]) -> argparse.Namespace:
    if words[:1] == ["score"]:
        parser = argparse.ArgumentParser(prog="prepare.py score", description="Bits per byte of a finished run.")
        parser.add_argument("run_dir", type=Path, help="folder with train.py and checkpoint.pt")
        parser.add_argument("--split", choices=SPLITS, default="val", help="default: val")
        return parser.parse_args(words[1:])
    if words[:1] == ["sample"]:
        parser = argparse.ArgumentParser(prog="prepare.py sample", description="Text from a finished run.")
        parser.add_argument("run_dir", type=Path, help="folder with train.py and checkpoint.pt, such as runs/TAG/best")
        parser.add_argument("--prompt", default="", metavar="TEXT", help="what it starts with; default: a new document")
        parser.add_argument("--tokens", type=int, default=200, metavar="N", help="at most; default: 200")
        parser.add_argument("--temperature", type=positive, default=0.8, metavar="T", help="default: 0.8")
        return parser.parse_args(words[1:])
    parser = argparse.ArgumentParser(description="Prepares the data; `score RUN_DIR` and `sample RUN_DIR` use a run.")
    parser.add_argument("--dataset", help="builtin, climbmix, tinystories or a path; default: the preset's")
    parser.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="default: by hardware")
    parser.add_argument("--num-shards", type=int, default=10, metavar="N", help="training files to download (10)")
    parser.add_argument("--cache", metavar="DIR", help="default: $AUTORESEARCH_CACHE, else ~/.cache/autoresearch")
    return parser.parse_args(words)

def main() -> None:
    args = parse_arguments(sys.argv[1:])
    try:
        if "prompt" in args:
            return sample(args.run_dir.resolve(), args.prompt, args.tokens, args.temperature)
        if "run_dir" in args:
            os._exit(score(args.run_dir.resolve(), args.split))  # what a model left to do at the exit is not done
        os.environ["AUTORESEARCH_CACHE"] = args.cache or str(cache_root())
        prepare(args.dataset, args.preset, args.num_shards)
    except KeyboardInterrupt:
        stop("Interrupted; the same command goes on.", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        stop(f"No room left for {error.filename or cache_root()}: {error.strerror}.")

if __name__ == "__main__":
    sys.modules["prepare"] = sys.modules["__main__"]  # train.py's `import prepare` must find this very module
    main()
