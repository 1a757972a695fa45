"""Fetch the files of one model from the hub into its cache, with huggingface_hub.

A guest: it runs in the Python of llmstack's private environment `hub`, and nothing of llmstack is
there. The library resumes, locks and lays out the cache. What is done here besides: the room on the
disk is looked at first, every hash is checked, what may pass is tried again, and refs/main is moved
last, for llama-server finds without a network what lies below that commit and nothing else.

Standard input: one line of JSON with `repo`, `files`, `beside`, `cache` and `endpoint`. `beside`
are further files of the repository that have to be found below the same commit. The pipe's end says
that whoever asked is gone, and ends this process.
Standard output: JSON, a line an event.

    {"say": TEXT}                               for the log
    {"part": ETAG, "before": N, "total": N}     the file that is fetched now; bytes
    {"file": NAME, "bytes": N, "size": N, "rate": N}    how far it is, every ten seconds; bytes/s
    {"done": N}                                 the last one: everything is here
    {"failed": TEXT, "hint": TEXT, ...}         the last one: why not, see Failure
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Tuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, build_hf_headers

PROGRESS_EVERY_S = 10
LOCK_PATIENCE_S = 0.1               # a lock that is held longer than this is waited for aloud
CHUNK_BYTES = 1 << 20               # what a kill loses, and what a slow line shows
NETWORK_MODULES = ("httpx", "httpcore", "requests")
WAITS_S = (1, 5, 20, 60, 60, 60)    # between tries that bring nothing new
HUB_SAYS_NOTHING_S = 5.0            # for a hub that is busy and does not say how long
MAX_WAIT_S = 3600.0
AGAIN = "run `llmstack download` again"
GO_ON = AGAIN + ": it goes on from there"


class Failure(NamedTuple):
    """Why files are not here, in words for the user."""

    what: str
    hint: str
    wait_s: float = -1                  # until another try is worth it; negative: never
    unreachable: bool = False           # the hub has not answered at all
    lacks: str = ""                     # the file that the repository does not have


class FetchError(Exception):
    """A failure of our own finding."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.failure = Failure(what, hint)


def tell(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while True:
            block = file.read(CHUNK_BYTES)
            if not block:
                return digest.hexdigest()
            digest.update(block)


class HubFile:
    """One file of the hub, and where it goes in the cache."""

    def __init__(self, folder: str, name: str, meta: Any) -> None:
        self.name = name
        self.commit = str(meta.commit_hash)
        self.etag = str(meta.etag)              # of a large file its SHA-256
        self.size = int(meta.size)
        self.blob = os.path.join(folder, "blobs", self.etag)
        self.part = self.blob + ".incomplete"   # the library's own name
        self.mark = self.blob + ".unverified"   # there until the hash is checked
        self.pointer = os.path.join(folder, "snapshots", self.commit, *name.split("/"))

    def is_whole(self) -> bool:
        sizes = (file_size(self.pointer), file_size(self.blob))
        return self.size in sizes and not os.path.exists(self.mark)

    def is_good(self) -> bool:
        if file_size(self.pointer) != self.size:
            return False
        return len(self.etag) != 64 or sha256(self.pointer) == self.etag


class Fetch:
    """The files of one repository on their way into the cache."""

    def __init__(self, repo: str, cache: str, endpoint: str) -> None:
        self.repo, self.cache, self.endpoint = repo, cache, endpoint
        name = "models--" + repo.replace("/", "--")
        self.folder = os.path.join(cache, name)
        self.locks = os.path.join(cache, ".locks", name)
        self.asked = ""                         # the file that the hub was asked for last
        self.got_bytes = 0                      # of this file and those before it

    def metadata(self, file: str, revision: str) -> HubFile:
        """What the hub says of a file: the hash stands on its own answer, not where that leads."""
        self.asked = file
        url = huggingface_hub.hf_hub_url(self.repo, file, revision=revision,
                                         endpoint=self.endpoint)
        headers = build_hf_headers(library_name="llmstack")
        meta = huggingface_hub.get_hf_file_metadata(url, headers=headers)
        etag, commit = str(meta.etag or ""), str(meta.commit_hash or "")
        named = re.match(r"[0-9A-Za-z]{8,128}\Z", etag) and re.match(r"[0-9a-f]{40}\Z", commit)
        if not named or meta.size is None:
            raise FetchError(f"{self.endpoint} does not answer like a model hub:"
                             f" {self.repo}/{file} has no ETag, commit or size",
                             "see HF_ENDPOINT, and whether a proxy stands between")
        return HubFile(self.folder, file, meta)

    def download(self, file: HubFile) -> None:
        """Have the library fetch what lacks, and link it; by commit, so refs/main stays."""
        over_xet = file.size > constants.MAX_HTTP_DOWNLOAD_SIZE
        # Only Xet serves what is larger than that, and only plain HTTP resumes.
        constants.HF_HUB_DISABLE_XET = not over_xet
        if over_xet:
            tell(say=f"{file.name}: {file.size:,} bytes, over Xet")
        huggingface_hub.hf_hub_download(self.repo, file.name, revision=file.commit,
                                        cache_dir=self.cache, endpoint=self.endpoint)

    def check_room(self, file: HubFile) -> None:
        need = file.size - file_size(file.part)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise FetchError(f"{file.name} needs {need / 1e9:,.2f} GB more, and there are"
                             f" {free / 1e9:,.2f} GB free in {self.folder}",
                             "free some room, or have the cache elsewhere with HF_HOME;"
                             " then again")

    def fetch_verified(self, file: HubFile) -> None:
        """Fetch a file until its hash is right; what an earlier try had left gets one chance."""
        os.makedirs(os.path.dirname(file.blob), exist_ok=True)
        while True:
            if file_size(file.part) > file.size:
                remove(file.part)
            start = file_size(file.part)
            if file.size not in (file_size(file.pointer), file_size(file.blob)):
                remove(file.blob)
                remove(file.pointer)
                self.check_room(file)
            going_on = f", going on at {start:,}" if start else ""
            tell(say=f"{file.name}: {file.size:,} bytes{going_on}")
            Path(file.mark).touch()
            self.download(file)
            if file.is_good():
                remove(file.mark)
                verified = ", SHA-256 verified" if len(file.etag) == 64 else ""
                tell(say=f"{file.name}: whole{verified}")
                return
            for path in (file.pointer, file.blob, file.mark):
                remove(path)
            if not start:
                raise FetchError(f"{file.name} arrived damaged:"
                                 " its size or SHA-256 is not the hub's", AGAIN)
            tell(say=f"{file.name}: what an earlier try had left was damaged; beginning again")

    def bring(self, file: HubFile) -> None:
        """Have a file whole, verified and linked, and nobody else at it meanwhile."""
        with self.lock(file):
            if not file.is_whole():
                self.fetch_verified(file)
                return
            tell(say=f"{file.name}: is here already")
            self.download(file)                 # a link, where another commit had brought it

    def lock(self, file: HubFile) -> Any:
        """A lock of our own beside the library's, which it holds only while it downloads."""
        os.makedirs(self.locks, exist_ok=True)
        ours = os.path.join(self.locks, f"{file.etag}.llmstack.lock")
        for path in (ours, os.path.join(self.locks, f"{file.etag}.lock")):
            if is_held(path):
                tell(say=f"another program is fetching {file.name}; waiting for it")
                with WeakFileLock(path):
                    pass
        return WeakFileLock(ours)

    def link_beside(self, name: str, commit: str) -> None:
        """Give a file that is here already its place below the new commit, too."""
        if os.path.exists(os.path.join(self.folder, "snapshots", commit, *name.split("/"))):
            return
        try:
            file = self.metadata(name, commit)
            if os.path.exists(file.blob) and not os.path.exists(file.mark):
                self.download(file)
        except Exception as exc:  # what was asked for is here all the same
            tell(say=f"{name}: is not linked below the new commit: {first_line(exc)}")

    def write_head(self, commit: str) -> None:
        """Make this commit the one that is found without a network."""
        path = os.path.join(self.folder, "refs", "main")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        Path(temporary).write_text(commit)
        os.replace(temporary, path)

    def run(self, names: Tuple[str, ...], beside: Tuple[str, ...]) -> None:
        self.got_bytes = 0
        files = list(self.metadata_of_all(names))
        total = sum(file.size for file in files)
        for file in files:
            self.asked = file.name
            tell(part=file.etag, before=self.got_bytes, total=total)
            done = threading.Event()
            teller = threading.Thread(target=tell_progress, args=(file, done), daemon=True)
            teller.start()
            try:
                self.bring(file)
            except BaseException:
                self.got_bytes += file_size(file.part)
                raise
            finally:
                done.set()
            self.got_bytes += file.size
        commit = files[0].commit
        for name in beside:
            self.link_beside(name, commit)
        self.write_head(commit)
        tell(done=total)

    def metadata_of_all(self, names: Tuple[str, ...]) -> Iterator[HubFile]:
        """All of one commit: a model's parts belong together."""
        revision = "main"
        for name in names:
            file = self.metadata(name, revision)
            revision = file.commit
            yield file


def is_held(path: str) -> bool:
    try:
        with WeakFileLock(path, timeout=LOCK_PATIENCE_S):
            return False
    except TimeoutError:                        # filelock's Timeout is one
        return True


def tell_progress(file: HubFile, done: threading.Event) -> None:
    start, began = file_size(file.part), time.monotonic()
    while not done.wait(PROGRESS_EVERY_S):
        have = file_size(file.part)
        rate = (have - start) / (time.monotonic() - began)
        tell(file=file.name, bytes=have, size=file.size, rate=rate)


def first_line(exc: BaseException) -> str:
    text = str(exc).strip() or type(exc).__name__
    return text.splitlines()[0][:200]


def cause_of(exc: BaseException) -> BaseException:
    """The one of a chain that carries the hub's answer, else its beginning."""
    while getattr(exc, "response", None) is None and exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


def explain(outer: Exception, fetch: Fetch) -> Failure:
    """What an error of the library or of this machine means for the user."""
    if isinstance(outer, FetchError):
        return outer.failure
    exc = cause_of(outer)
    kind, words = type(exc).__name__, first_line(exc)
    if getattr(exc, "response", None) is not None:
        return explain_answer(exc.response, fetch)  # type: ignore[attr-defined]
    if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
        return Failure(f"the disk is full: {fetch.cache}",
                       "free some room, then `llmstack download` goes on from there")
    if isinstance(exc, OSError) and exc.filename:
        return Failure(f"cannot write {exc.filename}: {exc.strerror}",
                       "mend its permissions, or those of its directory")
    if kind == "OfflineModeIsEnabled":
        return Failure("HF_HUB_OFFLINE is set, so the model hub is not asked", "unset it")
    modules = {type(error).__module__.split(".")[0] for error in (outer, exc)}
    if not isinstance(exc, OSError) and not modules & set(NETWORK_MODULES):
        return Failure(f"huggingface_hub failed: {kind}: {words}", GO_ON)
    hint = f"see that this machine is online (HTTPS_PROXY is honoured); {GO_ON}"
    if "Protocol" in kind or "Read" in kind:
        return Failure(f"the model hub broke the connection: {words}", hint, 0)
    return Failure(f"the model hub cannot be reached at {fetch.endpoint}: {words}", hint, 0,
                   unreachable=True)


def explain_answer(response: Any, fetch: Fetch) -> Failure:
    """What the hub means by an answer that is no file."""
    status, code = int(response.status_code), response.headers.get("X-Error-Code", "")
    endpoint, page = fetch.endpoint, f"{fetch.endpoint}/{fetch.repo}"
    if status in (408, 429) or status >= 500:
        what = "asks to wait" if status == 429 else f"answers {status}"
        return Failure(f"the model hub {what}", GO_ON, wanted_wait_s(response.headers))
    if status == 403 and not code and not str(response.url).startswith(endpoint):
        return Failure("the signed address of the file has lapsed", GO_ON, 0)
    if status == 401 and "nvalid" in response.headers.get("X-Error-Message", ""):
        return Failure("the model hub does not take the token in HF_TOKEN",
                       f"make a new one at {endpoint}/settings/tokens")
    if code == "GatedRepo" or status == 403:
        how = "put a token into HF_TOKEN"
        if os.environ.get("HF_TOKEN"):
            how = "let HF_TOKEN hold a token of who accepted them"
        return Failure(f"{fetch.repo} is gated: its terms must be accepted first",
                       f"accept them at {page}, and {how} ({endpoint}/settings/tokens)")
    if status == 401 or code == "RepoNotFound":
        return Failure(f"there is no {fetch.repo} on the hub, or it is private or gated",
                       f"look at {page}; for a private one, put your token into HF_TOKEN")
    if status == 404:
        return Failure(f"{fetch.repo} has no {fetch.asked}", "correct hf_file in models.ini",
                       lacks=fetch.asked)
    return Failure(f"the model hub answers {status} for {fetch.repo}/{fetch.asked}", GO_ON)


def wanted_wait_s(headers: Any) -> float:
    """How long the hub asks to be left alone."""
    after, wait_s = headers.get("Retry-After", ""), HUB_SAYS_NOTHING_S
    reset = re.search(r"\bt=([0-9]{1,5})", headers.get("RateLimit", ""))
    if after.isdigit():
        wait_s = float(after)
    elif reset:
        wait_s = float(reset.group(1))
    return min(max(wait_s, 1.0), MAX_WAIT_S)


def run_patiently(fetch: Fetch, names: Tuple[str, ...], beside: Tuple[str, ...]) -> int:
    """Try as long as that may help; the exit status."""
    tries = most = 0
    while True:
        try:
            fetch.run(names, beside)
            return 0
        except Exception as exc:  # every failure is told in the same way
            failure = explain(exc, fetch)
        if fetch.got_bytes > most:
            tries, most = 0, fetch.got_bytes
        away = failure.unreachable and not most
        if failure.wait_s < 0 or tries >= (1 if away else len(WAITS_S)):
            tell(failed=failure.what, hint=failure.hint, unreachable=away, lacks=failure.lacks)
            return 1
        pause_s = max(failure.wait_s, WAITS_S[tries])
        tries += 1
        tell(say=f"{failure.what}; trying again in {pause_s:.0f} s")
        time.sleep(pause_s)


def end_with_the_pipe() -> None:
    while os.read(0, 1):                        # the lock of sys.stdin would hold up an exit
        pass
    os._exit(1)


def main() -> int:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_the_pipe, daemon=True).start()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    fetch = Fetch(job["repo"], job["cache"], job["endpoint"])
    return run_patiently(fetch, tuple(job["files"]), tuple(job["beside"]))


if __name__ == "__main__":
    sys.exit(main())
