"""
Data, clock and scoring: what no experiment may change.

    python prepare.py                                    # data for this machine: download, tokenizer, rows to score on
    python prepare.py --dataset builtin --preset cpu     # needs no network
    python prepare.py --dataset my_texts/                # a file or folder of .txt .md .py .jsonl .json .csv .parquet
    python prepare.py score RUN_DIR [--split val|test]   # bits per byte of RUN_DIR/train.py with RUN_DIR/checkpoint.pt
    python prepare.py sample RUN_DIR [--prompt TEXT]     # how that model goes on

train.py imports load(), the Data it returns, and finish(). Cache: $AUTORESEARCH_CACHE, else ~/.cache/autoresearch.
Exit codes: 2 something the user must fix, 3 a model whose score would not be an honest one.
"""

import argparse
import base64
import contextlib
import copy
import csv
import ctypes
import errno
import fcntl
import gc
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, chain, islice, takewhile, tee
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

import numpy as np
import torch
from numpy.random import default_rng  # the system seeds it: no seed of a run foretells it

# The arithmetic of a score is bound before train.py is imported. All are C functions: they call none that it could set
from torch import Tensor, amax, amin, clone, float32, gather, log_softmax, stack, sub
from torch._C import DisableTorchFunction, _len_torch_dispatch_stack as active_dispatch_modes

to_cpu, to_numpy = Tensor.cpu, Tensor.numpy
STARTED_AT = time.monotonic() - time.process_time()  # about when this process began: so far it has only imported


class Preset(NamedTuple):
    device: str  # torch device type
    dataset: str  # prepared when none is named
    vocab_size: int  # special tokens included
    seq_len: int  # tokens
    val_tokens: int  # targets in val; test has as many
    noise: float  # standard deviation of val_bpb over seeds, until a session knows better


PRESETS = {
    "datacenter": Preset("cuda", "climbmix", 8192, 2048, 20_971_520, 0.0006),
    "consumer": Preset("cuda", "climbmix", 8192, 1024, 4_194_304, 0.001),
    "mac": Preset("mps", "climbmix", 4096, 512, 1_048_576, 0.002),
    "cpu": Preset("cpu", "builtin", 2048, 256, 98_304, 0.006),
}
TINYSTORIES = ("2d5a1467fff1081b", "5852b56a2bd28fd9", "a26307300439e943", "d243063613e5a057")
TINYSTORIES = [f"train-0000{i}-of-00004-{key}" for i, key in enumerate(TINYSTORIES)]
TINYSTORIES += ["validation-00000-of-00001-869c898b519ad725"]
SHARDS = {  # data set -> its folder on the hub, its files; the last one is held out
    "climbmix": ("karpathy/climbmix-400b-shuffle/resolve/main", [f"shard_{i:05d}" for i in range(6543)]),
    "tinystories": ("roneneldan/TinyStories/resolve/main/data", TINYSTORIES),
}
AS_ORIGINAL = ("climbmix", "datacenter")  # data set and preset that are scored on the rows that the original is
SPLITS = ("val", "test")
FORMAT = 2  # of the cache folder; another one counts as not prepared
TASK = {  # what agent.py must know of the task besides
    "metric": "val_bpb",
    "lower_is_better": True,
    "suspicious": 0.05,  # the share of a gain that is not believed at once
    "budget_s": 300,  # of training
    "plausible": [0.0, 64.0],  # between which a score is one
    "handed": ["train.bin", "train_docs.npy"],  # to training, when it asks
    "judged": {"val": ["val.bin"], "test": ["test.bin"]},  # handed to the scorer
    "required": ["build_model", "main", "load", "start", "finish"],  # what train.py must define or call
}
SPLIT_PATTERN = (  # GPT-4's, but digits at most two at a time
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")  # the last ids; no bytes
TOKENIZER_CHARS, TOKENIZER_DOC_CHARS = 10**9, 10_000  # the tokenizer's training text: in all, of one document
BYTES_PER_TOKEN = 4  # a guess: text is held out before there is a tokenizer
HELD_SHARE = 10  # val and test each take at most one byte in this many
MIN_ROWS = 8  # fewer rows in val or test are no measurement
PACK_DOCS, PACK_REFILL = 1000, 128  # documents the packing chooses among, and how many come at a time
PROBED_ROWS, STRIDE = 64, 64  # at least so many rows are asked again; every position modulo STRIDE is cut after
TOLERANCE = 1e-3  # nats that a log probability may move by rounding (an FFT, a scan)
GPU_TOLERANCE = 0.25  # nats; bf16 logits, summed in another order: four units in the last place of 8 to 16
MEAN_TOLERANCE = 5e-3  # nats that the next token may lose: on average rounding vanishes, a small leak does not


def stop(message: str, code: int = 2) -> NoReturn:
    """Ends the process with one line on stderr that says what to do, or what is wrong with the model (code 3)."""
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def cache_root() -> Path:
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch").expanduser().resolve()


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once: a reader sees the old text or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def current() -> tuple[Path, dict]:
    """Folder and meta.json of the session's data set, by hand of the one prepared last. Exit 2 if there is none."""
    with contextlib.suppress(OSError):
        name = os.environ.get("AUTORESEARCH_DATA") or (cache_root() / "current").read_text(encoding="utf-8").strip()
        folder = cache_root() / name
        meta = read_json(folder / "meta.json")
        if meta.get("format") == FORMAT and "preset" in meta:  # not another task's
            return folder, meta
    stop(f"No data in {cache_root()}: run `python prepare.py` first.")


def active_preset() -> str:
    """Name of the preset of the data set prepared last. Exit 2 if there is none."""
    return current()[1]["preset"]


def sha256(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


# ---- Texts, tokens, rows ---------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    name: str
    folder: str  # its folder's name in the cache, without the preset
    signature: str  # of its text; when it changes, the data are prepared anew
    texts: Callable[[], Iterator[str]]  # the documents, read anew at every call
    urls: dict[Path, str] = {}  # files to download first
    held: Path | None = None  # the one of them that val and test are cut from
    cut: bool = False  # a document that is too long to be held out is cut into pieces


def open_corpus(dataset: str, num_shards: int) -> Corpus:
    """The corpus of that name or path. Exit 2 where there is no text."""
    if dataset == "builtin":
        return Corpus(dataset, dataset, "", builtin_texts)
    if dataset in SHARDS:
        place, (*names, held) = SHARDS[dataset]
        hub = os.environ.get("AUTORESEARCH_DATA_URL", "https://huggingface.co/datasets")
        names, folder = [*names[: max(1, num_shards)], held], cache_root() / "downloads" / dataset
        urls = {folder / f"{name}.parquet": f"{hub}/{place}/{name}.parquet" for name in names}
        *files, held = urls
        return Corpus(dataset, dataset, str(len(files)), partial(read_texts, files), urls, held)
    root = Path(dataset).resolve()
    found = {file: kind(file) for file in {file.resolve(): file for file in files_in(root, set())}.values()}
    files = [file for file in found if found[file] in READERS and file.exists()]
    files = [f for f in files if f == root or found[f] not in (".json", ".csv") or any(read_texts([f], sure=False))]
    if others := [found[file] or "without an ending" for file in found.keys() - {*files}]:
        print("left out:", ", ".join(f"{others.count(ending)} {ending}" for ending in sorted({*others})), flush=True)
    if not files:
        stop(f"No text in {root}: say builtin, climbmix, tinystories, or a file or folder of {' '.join(READERS)}.")
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key, signature = (hashlib.sha256(text.encode()).hexdigest() for text in (str(root), repr(stats)))
    return Corpus(str(root), f"{root.stem}-{key[:8]}", signature, partial(read_texts, files), cut=True)


def files_in(path: Path, seen: set[Path]) -> Iterator[Path]:
    """All files there and in linked folders, each once as links may loop. What is closed, or links nowhere, is as one."""
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        yield from [path] * (path.is_file() or path.is_dir() or path.is_symlink())
    elif path.resolve() not in seen:
        seen.add(path.resolve())
        yield from chain.from_iterable(files_in(inner, seen) for inner in sorted(path.iterdir()))


def kind(file: Path) -> str:
    """The ending that tells how a file is read; .gz may follow it."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def builtin_texts() -> Iterator[str]:
    """Sources of the running Python's library without near-copies: one on either side of a split rewards memorizing."""
    left_out = {"test", "tests", "idle_test", "idlelib", "encodings", "lib2to3", "site-packages", "dist-packages"}
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts) and (text := path.read_bytes().decode("utf-8", "replace")):
            yield text


def read_texts(files: list[Path], longest: float = math.inf, sure: bool = True) -> Iterator[str]:
    """The documents of text files, none empty, none of more bytes than `longest`. Exit 2 if a file cannot be read; one
    whose first record has no text, which may be about something else, has no documents unless it is `sure`."""
    piece = min(max(sum(file.stat().st_size for file in files) // 200, 500), 100_000)
    for file in files:
        unpack, number = gzip.open if file.suffix.lower() == ".gz" else open, 0
        try:
            with unpack(file, "rt", encoding="utf-8-sig", newline="") as stream:
                for number, text in enumerate(READERS[kind(file)](stream, piece), 1):
                    if "\0" in text and READERS[kind(file)] is plain_texts:
                        raise UnicodeError
                    long = len(text.encode()) > longest
                    yield from filter(None, plain_texts(io.StringIO(text), longest // 10 + 1) if long else [text])
        except UnicodeError:
            shown = f"{'cat' if unpack is open else 'zcat'} {shlex.quote(str(file))}"
            stop(f"{file} is binary or not UTF-8: `{shown} | iconv -f GB18030 -t UTF-8 > NEW` (or LATIN1) converts it.")
        except (json.JSONDecodeError, csv.Error, KeyError, TypeError, AttributeError):
            if number or sure:
                stop(f'{file}, line or record {number + 1}: no "text" string.')
        except (ValueError, NotImplementedError, OSError, EOFError, zlib.error) as error:
            stop(f"{file} cannot be read as {kind(file)[1:]}: {str(error).splitlines()[0]}")


def plain_texts(stream: TextIO, piece: int) -> Iterator[str]:
    """A text in pieces of about `piece` characters, cut at blank lines where there are any, else at line ends."""
    text = ""
    while line := stream.readline(piece):
        text += line
        if len(text) >= piece or len(text) >= piece // 2 and not line.strip():
            yield text
            text = ""
    yield text


def json_texts(stream: TextIO, piece: int) -> Iterator[str]:
    """The "text" of every JSON object, or the JSON string, one a line or all in a list."""
    listed = stream.readline().lstrip().startswith("[")
    stream.seek(0)
    for record in json.load(stream) if listed else (line.strip() and json.loads(line) for line in stream):
        text = record if isinstance(record, str) else record["text"]
        yield (text or "").encode("utf-8", "replace").decode()  # a lone surrogate is no text


def csv_texts(stream: TextIO, piece: int) -> Iterator[str]:
    """The column "text" of a table with a header. Raises TypeError for a row that is too long, or too short for it."""
    csv.field_size_limit(2**31 - 1)
    return (row["text"] + "" for row in csv.DictReader(stream, restkey="text", strict=True))


def parquet_batches(file) -> Iterator[list[str]]:
    """The "text" column in order, PACK_REFILL documents at a time, fewer at the end of a row group."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        if "text" not in (names := parquet.schema_arrow.names):
            raise ValueError(f'it has no column "text", only {names}')
        for group in range(parquet.num_row_groups):
            for batch in parquet.iter_batches(PACK_REFILL, [group], ["text"]):
                yield [text or "" for text in batch.column("text").to_pylist()]


READERS = dict.fromkeys((".txt", ".md", ".py"), plain_texts) | dict.fromkeys((".jsonl", ".ndjson", ".json"), json_texts)
READERS |= {".csv": csv_texts, ".parquet": lambda stream, _: chain.from_iterable(parquet_batches(stream.buffer))}


def download(url: str, path: Path) -> None:
    """Gets a file, going on where an earlier attempt stopped. Exit 2 if it cannot be had as the server promises it."""
    from requests import RequestException, get

    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for pause_s in (1, 2, 4, 8, 16, None):
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={part.stat().st_size if part.exists() else 0}-"}
        try:
            with get(url, headers=headers, stream=True, timeout=30) as response:
                if response.status_code == 416:  # nothing comes after so many bytes
                    part.unlink(missing_ok=True)
                response.raise_for_status()
                with open(part, "ab" if response.status_code == 206 else "wb") as file:
                    file.writelines(response.iter_content(1 << 16))
            tags = [answer.headers.get("X-Linked-ETag", "").strip('"') for answer in (*response.history, response)]
            if all(len(tag) != 64 or tag == sha256(part) for tag in tags):
                return part.replace(path)
            part.unlink()
            raise RequestException("what came is not the file that the server promised")
        except RequestException as error:
            if pause_s is None or getattr(error.response, "status_code", 0) in (401, 403, 404):
                stop(f"Cannot download {url}: {error}; the same command goes on where this one stopped.")
        time.sleep(pause_s)


def train_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Writes tokenizer.json, with fewer tokens if no more pairs can merge."""
    import rustbpe

    texts, counted = tee(text[:TOKENIZER_DOC_CHARS] for text in texts)
    enough = takewhile(lambda pair: pair[1] < TOKENIZER_CHARS, zip(texts, accumulate(map(len, counted), initial=0)))
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator((text for text, _ in enough), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    merges = [base64.b64encode(bytes(piece)).decode() for piece, _ in tokenizer.get_mergeable_ranks()]
    saved = {"pattern": SPLIT_PATTERN, "merges": merges, "special_tokens": SPECIAL_TOKENS}
    write_text(folder / "tokenizer.json", json.dumps(saved))


def load_tokenizer(folder: Path):
    """tiktoken.Encoding of a prepared folder."""
    import tiktoken

    saved = read_json(folder / "tokenizer.json")
    ranks = {base64.b64decode(merge): rank for rank, merge in enumerate(saved["merges"])}
    special = {name: len(ranks) + i for i, name in enumerate(saved["special_tokens"])}
    return tiktoken.Encoding("autoresearch", pat_str=saved["pattern"], mergeable_ranks=ranks, special_tokens=special)


def encoded(encoding, batches: Iterable[list[str]]) -> Iterator[list[np.ndarray]]:
    """The batches' documents as uint16 tokens, BOS first. What looks like a special token is ordinary text."""
    for batch in batches:
        documents = encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count())
        yield [np.array([encoding.n_vocab - len(SPECIAL_TOKENS), *tokens], np.uint16) for tokens in documents]


def digest(text: str) -> int:
    """64 bits that stand for a document."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def hold_out(corpus: Corpus, preset: Preset) -> tuple[Corpus, dict[str, list[str]], set[int]]:
    """The documents of val and of test, and the digests of all that must not be trained on: the first of the corpus'
    held-out file or, without one, those with the smallest digests, so that equal documents fall on the same side. One
    half a split long would be no sample: it is cut, in the corpus that is returned, or trains instead."""
    texts = partial(read_texts, [corpus.held]) if corpus.held else corpus.texts
    sizes = {digest(text): len(text.encode()) for text in texts()}
    share = min(preset.val_tokens * BYTES_PER_TOKEN, sum(sizes.values()) // (2 if corpus.held else HELD_SHARE))
    if corpus.cut and max(sizes.values(), default=0) > share // 2:
        return hold_out(corpus._replace(texts=partial(texts, share // 2), cut=False), preset)
    order = [key for key in (sizes if corpus.held else sorted(sizes)) if sizes[key] <= share // 2]
    first, last = np.searchsorted(np.cumsum([sizes[key] for key in order]), [share, 2 * share], side="right")
    wanted = set(order[:last])
    found = {key: text for text in texts() if (key := digest(text)) in wanted}
    held = {"val": [found[key] for key in order[:first]], "test": [found[key] for key in order[first:last]]}
    return corpus, held, set(sizes) if corpus.held else wanted


def pack_best_fit(batches: Iterable[list[np.ndarray]], capacity: int) -> Iterator[np.ndarray]:
    """Rows (capacity,) of tokens, packed as the original does: a row takes the longest document that fits, the first of
    equals; when none does, the shortest is cropped to fill it."""
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


def make_rows(encoding, preset: Preset, texts: dict[str, list[str]], packed_from: Path | None) -> dict[str, np.ndarray]:
    """uint16 (rows, seq_len + 1) of val and of test, packed from a parquet file as the original does; without one from
    the texts in one stream, where a row begins with the last token before it. Exit 2 if there is too little text."""
    rows, length, count = {}, preset.seq_len, preset.val_tokens // preset.seq_len
    if packed_from:
        packed = pack_best_fit(encoded(encoding, parquet_batches(packed_from)), length + 1)
        rows = {split: np.array(list(islice(packed, count)), dtype=np.uint16) for split in SPLITS}
    else:
        for split, documents in zip(SPLITS, encoded(encoding, [texts[split] for split in SPLITS])):
            stream = np.concatenate([np.empty(0, np.uint16), *documents])
            starts = range(0, len(stream) - length, length)[:count]
            rows[split] = np.array([stream[start : start + length + 1] for start in starts])
    if min(map(len, rows.values())) < MIN_ROWS:
        needs = f"about {MIN_ROWS * length * HELD_SHARE * BYTES_PER_TOKEN // 1000} kB, not counting repeats"
        stop(f"Too little text to train on, choose by and test on: this preset needs {needs}.")
    return rows


def write_stream(folder: Path, encoding, texts: Iterator[str]) -> dict[str, int]:
    """Writes train.bin and train_docs.npy; returns the number of tokens and of documents for meta.json."""
    lengths = [0]
    with open(folder / "train.bin", "wb") as file:
        for batch in encoded(encoding, iter(lambda: list(islice(texts, 128)), [])):
            lengths.extend(map(len, batch))
            file.write(np.concatenate(batch))
    ends = np.cumsum(lengths)
    np.save(folder / "train_docs.npy", ends[:-1])
    return {"train_tokens": int(ends[-1]), "train_docs": len(lengths) - 1}


def build(folder: Path, corpus: Corpus, preset_name: str) -> None:
    """Writes every file of the data set into the folder, meta.json last: with it the folder is whole."""
    preset, said = PRESETS[preset_name], partial(print, flush=True)
    as_original = (corpus.name, preset_name) == AS_ORIGINAL
    for path, url in corpus.urls.items():
        if not path.exists():
            said(f"downloading {path.name}")
            download(url, path)
    said("holding out val and test")
    corpus, texts, held = hold_out(corpus, preset)
    train_texts = partial(filter, lambda text: digest(text) not in held)
    said("training the tokenizer")
    train_tokenizer(folder, corpus.texts() if as_original else train_texts(corpus.texts()), preset.vocab_size)
    encoding = load_tokenizer(folder)
    said("packing val and test")
    rows = make_rows(encoding, preset, texts, corpus.held if as_original else None)
    for split in SPLITS:
        (folder / f"{split}.bin").write_bytes(rows[split].tobytes())
    said("encoding the training text")
    meta = {"rows": {split: len(rows[split]) for split in SPLITS}}
    meta |= write_stream(folder, encoding, train_texts(corpus.texts()))
    meta |= {"format": FORMAT, "preset": preset_name, "vocab_size": encoding.n_vocab, "seq_len": preset.seq_len}
    pieces = [encoding.decode_single_token_bytes(token) for token in range(encoding.n_vocab - len(SPECIAL_TOKENS))]
    shown = [piece.decode("utf-8", "replace").encode() for piece in pieces]
    for name, counted in ("bytes", pieces), ("original_bytes", shown):
        sizes = np.array([*map(len, counted), *[0] * len(SPECIAL_TOKENS)])
        meta[name] = {split: int(sizes[rows[split][:, 1:]].sum()) for split in SPLITS}
    meta["sha256"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    fingerprint = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    meta |= {"dataset": corpus.name, "signature": corpus.signature, "fingerprint": fingerprint}
    meta |= TASK | {"noise": preset.noise, "device": preset.device}
    write_text(folder / "meta.json", json.dumps(meta, indent=1))


def prepare(dataset: str | None, preset_name: str, num_shards: int) -> None:
    """Makes the data set the current one, and builds it unless it is there. A second process waits for the first."""
    preset_name = detect_preset() if preset_name == "auto" else preset_name
    corpus = open_corpus(dataset or PRESETS[preset_name].dataset, num_shards)
    folder = cache_root() / f"{corpus.folder}-{preset_name}"
    print(f"{corpus.name} for the {preset_name} preset, in {folder}", flush=True)
    cache_root().mkdir(parents=True, exist_ok=True)
    with open(cache_root() / f"{corpus.folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it, however this process ends
        meta = read_json(folder / "meta.json")
        if (meta.get("format"), meta.get("signature")) != (FORMAT, corpus.signature):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                build(folder, corpus, preset_name)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        write_text(cache_root() / "current", folder.name)
        meta = read_json(folder / "meta.json")
    rows = f"{meta['rows']['val']} val and {meta['rows']['test']} test rows of {meta['seq_len']}"
    print(f"Ready: {meta['train_tokens'] / 1e6:.1f} M training tokens, vocabulary {meta['vocab_size']}, {rows}.")


def detect_preset() -> str:
    """The preset for this machine's hardware. Exit 2 if there is a GPU that torch cannot use."""
    if torch.backends.mps.is_available():
        return "mac"
    smi = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], check=False, stdout=subprocess.PIPE)
    if not (torch.cuda.is_available() or Path("/dev/nvidia0").exists() or smi and b"GPU 0" in smi.stdout):
        return "cpu"
    try:
        torch.ones(1, device="cuda").add_(1)  # a GPU may be seen that this torch has no kernels for
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        stop(f"torch {torch.__version__} cannot use this GPU: {reason}. Install another torch, or say `--preset cpu`.")
    return "datacenter" if torch.cuda.get_device_properties(0).total_memory >= 40e9 else "consumer"


# ---- Log probabilities, and the probes without which they mean nothing -----------------------------------------------


class Invalid(Exception):
    """The model's score would not be an honest one; the message names the rule, in one line."""


class Exam(NamedTuple):
    """What a model is asked: every row, in batches of one shape; then its twin some of them again, changed after a cut.
    Asked for are two tokens at every position: the next one, and a random one that stands in for it after the cut."""

    order: np.ndarray  # (batches, B): which rows they are
    lent: np.ndarray  # (later batches, B): which places in order are asked again
    cuts: np.ndarray  # (later batches, B): the last position that is as it was
    x: list[Tensor]  # (B, T) for all batches and all later batches: what the model sees
    y: list[Tensor]  # (B, T, 2): what it is asked for


def make_exam(rows: np.ndarray, batch_rows: int, vocab_size: int, device: torch.device) -> Exam:
    """The exam on rows (rows, T + 1), secret in its order, cuts and changes. Every batch lends at least one row, and at
    least PROBED_ROWS are lent; where there are fewer they come repeatedly."""
    rng, size, length = default_rng(), min(batch_rows, len(rows)), rows.shape[1] - 1
    order = np.resize(rng.permutation(len(rows)), (math.ceil(len(rows) / size), size))
    lent = rng.permuted(np.arange(order.size).reshape(order.shape), axis=1).T  # one of every batch, then a second
    lent = rng.permuted(np.resize(lent, (math.ceil(max(PROBED_ROWS, len(order)) / size), size)))
    remainder = np.arange(lent.size).reshape(lent.shape) % min(STRIDE, length - 1)
    cuts = rng.permuted(remainder + STRIDE * rng.integers((length - 2 - remainder) // STRIDE + 1))
    truth, again = rows.astype(np.int64), order.ravel()[lent]
    stand_in = (truth + rng.integers(1, vocab_size, truth.shape)) % vocab_size
    changed = np.where(np.arange(length) > cuts[..., None], stand_in[again, :-1], truth[again, :-1])
    x = chain(truth[order, :-1], changed)
    y = (np.stack([truth[part, 1:], stand_in[part, 1:]], axis=2) for part in chain(order, again))
    return Exam(order, lent, cuts, *([torch.from_numpy(batch).to(device) for batch in batches] for batches in (x, y)))


def ask(model: torch.nn.Module, vocab_size: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities, fp32 (B, T, 2), of the tokens y for inputs x (B, T), of which the model gets a copy; and how
    far those of all tokens lie apart. Raises Invalid."""
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
        found = log_softmax(logits, 2, dtype=float32)
        return gather(found, 2, y), sub(amax(found), amin(found))


@torch.no_grad()
def examine(model: torch.nn.Module, twin: torch.nn.Module, exam: Exam, vocab_size: int) -> np.ndarray:
    """float32 (rows, T): -log p of every target. Raises Invalid if the model does not keep the rules: the log
    probabilities that count must come out again later, among other rows and before other tokens, and a model that looks
    ahead, mixes rows or draws lots cannot know when not to. The later questions go to its twin, which has the same
    weights and has seen none of these rows. Nothing is read back from the device before the end."""
    answers, before = [], {}
    for number, (x, y) in enumerate(zip(exam.x, exam.y)):
        answers.append(ask(model if number < len(exam.order) else twin, vocab_size, x, y))
        before = before or state_of(model)  # only now: a first pass may make tables
    with DisableTorchFunction():
        logs, spreads = (to_numpy(to_cpu(stack(part))) for part in zip(*answers))
    if not np.isfinite(spreads).all():
        raise Invalid("not finite: forward returns NaN or infinite logits; to mask one, subtract 1e4")
    first, again = np.split(logs.reshape(-1, *logs.shape[2:]), [exam.order.size])
    change, cuts = first[exam.lent.ravel()] - again, exam.cuts.ravel()
    moved = np.where(np.arange(change.shape[1]) <= cuts[:, None], abs(change).max(axis=2), 0).max(axis=1)
    allowed = tolerances(exam.x[0].device.type, spreads[-len(exam.lent) :]).repeat(exam.lent.shape[1])
    worst = int((moved - allowed).argmax())
    if moved[worst] > allowed[worst]:
        raise Invalid(diagnosis(twin, exam, vocab_size, worst, float(moved[worst]), float(allowed[worst])))
    if (fall := change[np.arange(len(cuts)), cuts, 0].mean()) > MEAN_TOLERANCE:
        raise Invalid(f"looks ahead: the next token's log p falls by {fall:.2g} when the tokens after it change")
    now = state_of(model)
    if not all(name in now and torch.equal(now[name], tensor) for name, tensor in before.items()):
        raise Invalid("changes itself: parameters or buffers are not the same after scoring as before")
    nats = np.empty((exam.order.max() + 1, first.shape[1]), np.float32)
    nats[exam.order.ravel()] = -first[..., 0]
    return nats


def tolerances(device_type: str, spreads: np.ndarray) -> np.ndarray:
    """Nats that a log probability may move, for each batch: on a GPU the more, the farther they lie apart."""
    return np.clip(spreads / 64, TOLERANCE, TOLERANCE if device_type == "cpu" else GPU_TOLERANCE)


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers, with 0 for NaN, which would differ from itself."""
    return {name: t.nan_to_num() for name, t in chain(model.named_parameters(), model.named_buffers())}


def diagnosis(twin: torch.nn.Module, exam: Exam, vocab_size: int, place: int, moved: float, allowed: float) -> str:
    """The rule that a model breaks whose log probabilities of the row at that place of exam.lent moved."""
    batch, row = divmod(place, exam.lent.shape[1])
    changed, y = exam.x[len(exam.order) + batch], exam.y[len(exam.order) + batch]
    others = (changed + 1) % vocab_size
    others[row] = changed[row]
    before = torch.cat([changed[:, :1], y[:, :-1, 0]], dim=1)  # as the row was before it was changed
    cut = int(exam.cuts[batch, row])
    found = [ask(twin, vocab_size, x, y)[0][row, : cut + 1] for x in (changed, changed, others, before)]
    twice, mixed, ahead = ((other - found[0]).abs().amax(1) for other in found[1:])
    if twice.max() <= allowed:
        if mixed.max() > allowed:
            return "mixes rows: the output of a row changes with the other rows of its batch"
        if ahead.max() > allowed:
            return f"looks ahead: log probabilities at {int(ahead.argmax())} change with tokens after {cut}"
    return f"not repeatable: the same tokens give other log probabilities the second time (by {moved:.2g})"


@torch.no_grad()
def probe(model: torch.nn.Module, vocab_size: int, seq_len: int, device: torch.device) -> None:
    """Examines two copies of a model, in eval mode, on random rows, and leaves it and torch's random streams as they
    are. Raises Invalid. What cannot be copied is met by the scorer only."""
    streams = [torch] if device.type == "cpu" else [torch, getattr(torch, device.type)]
    states, modes = [stream.get_rng_state() for stream in streams], [(m, m.training) for m in model.modules()]
    try:
        copied = copy.deepcopy(model.eval())  # eval before: a function in the model may hold on to the original
        for p in copied.parameters():
            if not p.any():  # a leak could not be seen behind it
                p.normal_(std=p.shape[-1] ** -0.5 if p.dim() else 1.0)
        twin = copy.deepcopy(copied)
    except (TypeError, RuntimeError, copy.Error) as error:
        print(f"The model cannot be copied ({error}): it is not probed before it trains.", flush=True)
    else:
        rows = default_rng().integers(vocab_size, size=(PROBED_ROWS, seq_len + 1))
        examine(copied, twin, make_exam(rows, 4, vocab_size, device), vocab_size)
    finally:
        for module, mode in modes:
            module.training = mode
        for stream, state in zip(streams, states):
            stream.set_rng_state(state)


# ---- A run: what train.py uses ---------------------------------------------------------------------------------------


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
        self.budget_s = float(os.environ.get("AUTORESEARCH_TIME_BUDGET") or meta["budget_s"])
        self._files, self._started = [folder / name for name in meta["handed"]], None
        self._generator = torch.Generator().manual_seed(0)

    def dummy_batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random tokens x, y, int64 (rows, seq_len), to compile and warm up on; no seeded stream moves."""
        tokens = torch.randint(self.vocab_size, (rows, self.seq_len + 1), generator=self._generator).to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def start(self, model: torch.nn.Module) -> None:
        """Probes the model (exit 3 if it fails), fetches the training tokens and starts the clock."""
        try:
            probe(getattr(model, "_orig_mod", model), self.vocab_size, self.seq_len, self.device)
        except Invalid as fault:
            stop(str(fault), 3)
        gc.collect()  # the copies, which train.py may have told the collector to leave alone
        _, (stream, starts) = receive(self._files)
        self._started = time.monotonic()
        tokens = np.memmap(stream, dtype=np.int16, mode="c")  # no id needs the sixteenth bit
        self._tokens, self.num_tokens = torch.from_numpy(tokens).to(self.device), len(tokens)
        self.doc_starts = torch.from_numpy(np.load(starts)).to(self.device)  # int64 (documents,)

    def gather(self, starts, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows x, y, int64 (B, length), of the stream at starts (B,); y is x one token later. Raises ValueError if one
        leaves the stream; starts that are on a GPU are not looked at, which would wait for it."""
        starts = torch.as_tensor(starts, dtype=torch.int64)
        last = self.num_tokens - length - 1
        if starts.device.type == "cpu" and starts.numel() and not 0 <= starts.min() <= starts.max() <= last:
            raise ValueError(f"gather: windows of {length} tokens start between 0 and {last}, not at {starts.tolist()}")
        windows = self._tokens[starts.to(self.device)[:, None] + torch.arange(length + 1, device=self.device)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def elapsed(self) -> float:
        """Seconds since start(); 0 before."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def progress(self) -> float:
        return min(1.0, self.elapsed() / self.budget_s)

    def expired(self) -> bool:
        return self.elapsed() >= self.budget_s


_data: Data | None = None  # of this process; finish() reads its clock


def load() -> Data:
    """The run's data; seeds random, numpy and torch. Exit 2 if nothing is prepared or the device is missing."""
    global _data
    keep_memory()
    _data = Data(*current())
    seed = int(os.environ.get("AUTORESEARCH_SEED", "42"))
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)
    return _data


def keep_memory() -> None:
    """Has glibc keep what is freed: else every step on the CPU gets its large tensors anew, in 10,000 page faults."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD; in bytes
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


def receive(paths: list[Path]) -> tuple[str, list]:
    """A message and open files: what agent.py hands over, once, in place of those files; by hand the files."""
    if not (channel := os.environ.get("AUTORESEARCH_HANDOVER_FD")):
        return "", [open(path, "rb") for path in paths]
    with socket.socket(fileno=int(channel)) as channel:
        channel.sendall(b"start\n")
        message, descriptors, _, _ = socket.recv_fds(channel, 1024, len(paths))
    if not descriptors:
        stop("agent.py ended before it handed over the data.")
    return message.decode(), [os.fdopen(descriptor, "rb") for descriptor in descriptors]


def finish(model: torch.nn.Module, *, steps: int, tokens: int, **facts) -> None:
    """Writes checkpoint.pt and facts.json into the run's folder, and ends the process; by hand as the scorer does."""
    training_seconds, device, by_hand = _data.elapsed(), _data.device.type, "AUTORESEARCH_HANDOVER_FD" not in os.environ
    folder = Path(__file__).resolve().parent / "runs" / "by-hand" if by_hand else Path.cwd()
    if by_hand:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sys.modules["__main__"].__file__, folder / "train.py")
    state = {name.replace("_orig_mod.", ""): tensor.cpu() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
    facts |= {"steps": steps, "tokens": tokens, "num_params": sum(p.numel() for p in model.parameters())}
    facts |= {"training_seconds": training_seconds, "total_seconds": time.monotonic() - STARTED_AT}
    if device == "cpu":  # resident memory: bytes on macOS, else KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else torch.mps.driver_allocated_memory()
    facts |= {"peak_vram_mb": peak / 2**20, "device": torch.cuda.get_device_name() if device == "cuda" else device}
    write_text(folder / "facts.json", json.dumps(facts))
    sys.stdout.flush()
    if not by_hand:
        os._exit(0)  # nothing is left to be put in order
    os.execv(sys.executable, [sys.executable, __file__, "score", str(folder)])  # gives the device's memory back


# ---- Scoring and sampling --------------------------------------------------------------------------------------------


def load_model(run_dir: Path, meta: dict) -> torch.nn.Module:
    """The run's model, on its device, in eval mode. Exit 2 if there is none. What its code raises is not caught."""
    for name in ("train.py", "checkpoint.pt"):
        if not (run_dir / name).is_file():
            stop(f"No run to load: {run_dir / name} does not exist.")
    spec = importlib.util.spec_from_file_location("train", run_dir / "train.py")
    sys.modules["train"] = train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    model = train.build_model(meta["vocab_size"], meta["seq_len"])
    model.load_state_dict(torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True))
    return model.to(device_of(meta["preset"])).eval()


def measure(run_dir: Path, split: str) -> dict:
    """The content of score.json. Raises Invalid."""
    began = time.monotonic()
    keep_memory()
    folder, meta = current()
    device, vocab_size, seq_len = device_of(meta["preset"]), meta["vocab_size"], meta["seq_len"]
    secret, (file,) = receive([folder / name for name in meta["judged"][split]])
    with file:  # under agent.py no path leads to the rows, and a score without its secret does not count
        rows = np.frombuffer(file.read(), dtype=np.int16).reshape(-1, seq_len + 1)
    batch_rows = max(1, (2**22 if device.type == "cpu" else 2**28) // (seq_len * vocab_size))
    exam = make_exam(rows, batch_rows, vocab_size, device)  # before train.py is imported
    model, twin = (load_model(run_dir, meta) for _ in range(2))  # they share nothing, not a module
    has_bytes = rows[:, 1:] < vocab_size - len(SPECIAL_TOKENS)
    nats = (examine(model, twin, exam, vocab_size) * has_bytes).sum(axis=1, dtype=np.float64)
    blocks = [float(block.sum()) / (math.log(2) * meta["bytes"][split]) for block in np.array_split(nats, 20)]
    if not 0.01 < sum(blocks) < 100.0:  # nor NaN: no measurement of a language model
        raise Invalid(f"not a plausible score: {sum(blocks):.6f} bits per byte")
    about = {"split": split, "rows": len(rows), "bytes": meta["bytes"][split], "fingerprint": meta["fingerprint"]}
    return about | {"score": sum(blocks), "blocks": blocks, "secret": secret, "seconds": time.monotonic() - began}


def score(run_dir: Path, split: str) -> int:
    """Prints the summary, then writes score.json, for test score-test.json. Returns 3 if there is no honest score."""
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
    fact, split = {k: v for k, v in facts.items() if isinstance(v, (int, float))}.get, result["split"]
    lines = {
        f"{split}_bpb": f"{result['score']:.6f}",
        "training_seconds": f"{fact('training_seconds', 0):.1f}",
        "total_seconds": f"{fact('total_seconds', 0) + result['seconds']:.1f}",
        "peak_vram_mb": f"{fact('peak_vram_mb', 0):.1f}",
        "mfu_percent": f"{fact('mfu_percent', 0):.2f}",
        "total_tokens_M": f"{fact('tokens', 0) / 1e6:.1f}",
        "num_steps": f"{fact('steps', 0):.0f}",
        "num_params_M": f"{fact('num_params', 0) / 1e6:.1f}",
        "depth": f"{fact('depth', 0):.0f}",
    }
    if (meta["dataset"], meta["preset"]) == AS_ORIGINAL:  # val_bpb times this is the number the original prints
        lines["original_factor"] = f"{meta['bytes'][split] / meta['original_bytes'][split]:.6f}"
    print("---", *(f"{name + ':':<17} {value}" for name, value in lines.items()), sep="\n", flush=True)


@torch.no_grad()
def sample(run_dir: Path, prompt: str) -> None:
    """Prints the prompt and up to 200 tokens more, to a document's end. A folder with meta.json, as best/, will do."""
    if (run_dir / "meta.json").is_file():
        os.environ.update(AUTORESEARCH_CACHE=str(run_dir.parent), AUTORESEARCH_DATA=run_dir.name)
    folder, meta = current()
    encoding, device, model = load_tokenizer(folder), device_of(meta["preset"]), load_model(run_dir, meta)
    last, seq_len = meta["vocab_size"] - len(SPECIAL_TOKENS), meta["seq_len"]
    tokens = [last, *encoding.encode_ordinary(prompt)]  # the special token that leads every document
    for _ in range(200):
        row = tokens[-seq_len:]
        x = torch.tensor([row + [0] * (seq_len - len(row))], device=device)  # a causal model does not look at the end
        logits = model(x)[0, len(row) - 1].float() / 0.8  # somewhat surer than it is
        if (token := int(torch.multinomial(logits.softmax(0), 1))) >= last:
            break
        tokens.append(token)
    print(encoding.decode_bytes(tokens[1:]).decode("utf-8", "replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepares the data; or scores a finished run, or samples from it.")
    parser.add_argument("command", nargs="?", choices=["score", "sample"], help="none: prepare the data")
    parser.add_argument("run_dir", nargs="?", type=Path, help="folder with train.py and checkpoint.pt: runs/TAG/best")
    parser.add_argument("--dataset", help="builtin, climbmix, tinystories or a path; default: the preset's")
    parser.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="default: by hardware")
    parser.add_argument("--num-shards", type=int, default=10, metavar="N", help="training files to download (10)")
    parser.add_argument("--cache", metavar="DIR", help="default: $AUTORESEARCH_CACHE, else ~/.cache/autoresearch")
    parser.add_argument("--split", choices=SPLITS, default="val", help="of score; default: val")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="of sample; default: a new document")
    args = parser.parse_args()
    if args.command and not args.run_dir:
        parser.error(f"{args.command} what? The folder of a run is missing.")
    try:
        if args.command == "score":
            os._exit(score(args.run_dir.resolve(), args.split))  # what a model left to do at the exit is not done
        if args.command == "sample":
            return sample(args.run_dir.resolve(), args.prompt)
        usual = cache_root()
        os.environ["AUTORESEARCH_CACHE"] = args.cache or str(usual)
        prepare(args.dataset, args.preset, args.num_shards)
        where = "" if cache_root() == usual else f"AUTORESEARCH_CACHE={shlex.quote(str(cache_root()))} "
        print(f"Next: `{where}python train.py` makes one run, `{where}python agent.py` a session.")
    except KeyboardInterrupt:
        stop("Interrupted; the same command goes on.", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        stop(f"No room left for {error.filename or cache_root()}: {error.strerror}.")


if __name__ == "__main__":
    sys.modules["prepare"] = sys.modules["__main__"]  # train.py's `import prepare` must find this very module
    main()
