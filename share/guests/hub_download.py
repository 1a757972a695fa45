"""Fetch the files of one model from the hub into its cache, with huggingface_hub.

A guest: it runs in the Python of llmstack's private environment `hub`, and nothing of llmstack is
there. The library resumes, locks and lays out the cache. What is done here besides: the room on the
disk is looked at first, every hash is checked, and refs/main is moved last, for llama-server finds
without a network what lies below that commit and nothing else.

Standard input: one line of JSON with `repo`, `files`, `beside`, `cache` and `endpoint`. `beside` are
further files of the repository that have to be found below the same commit. The pipe's end says that
whoever asked is gone, and ends this process.
Standard output: JSON, a line an event.

    {"say": TEXT}                               for the log
    {"part": ETAG, "before": N, "total": N}     the file that is fetched now; bytes
    {"file": NAME, "bytes": N, "size": N, "rate": N}    how far it is, every ten seconds; bytes/s
    {"done": N}                                 the last one: everything is here
    {"failed": {...}, "got": N}                 the last one: why not, and the bytes that are here
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, build_hf_headers

PROGRESS_EVERY_S = 10
LOCK_PATIENCE_S = 0.1               # a lock that is held longer than this is waited for aloud
CHUNK_BYTES = 1 << 20               # what a kill loses, and what a slow line shows
NETWORK_MODULES = ("httpx", "httpcore", "requests")
AGAIN = "run `llmstack download` again"


class FetchError(Exception):
    """What no further try mends, and what to do about it."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


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
        self.mark = self.blob + ".unverified"   # there from the first byte until the hash is checked
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
        self.got_bytes = 0                      # of the files before it

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
        """Have the library fetch what lacks, and link it. By commit: so it leaves refs/main alone."""
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


def facts(outer: Exception, file: str) -> Dict[str, Any]:
    """What llmstack needs to know of a failure, to say it in its own words."""
    if isinstance(outer, FetchError):
        return {"problem": str(outer), "hint": outer.hint}
    exc = cause_of(outer)
    kind = type(exc).__name__
    found: Dict[str, Any] = {"file": file, "kind": kind, "words": first_line(exc)}
    response = getattr(exc, "response", None)
    if response is not None:
        headers = response.headers
        found.update(status=int(response.status_code), url=str(response.url),
                     code=headers.get("X-Error-Code", ""),
                     message=headers.get("X-Error-Message", ""),
                     retry_after=headers.get("Retry-After", ""),
                     rate_limit=headers.get("RateLimit", ""))
        return found
    modules = {type(x).__module__.split(".")[0] for x in (outer, exc)}
    found["network"] = isinstance(exc, OSError) or bool(modules & set(NETWORK_MODULES))
    found["broke"] = "Protocol" in kind or "Read" in kind
    if isinstance(exc, OSError):
        found["errno"] = exc.errno or 0
        found["path"] = str(exc.filename or "")
    return found


def end_with_the_pipe() -> None:
    while os.read(0, 1):                        # sys.stdin's own lock would be in the way of an exit
        pass
    os._exit(1)


def main() -> int:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_the_pipe, daemon=True).start()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    fetch = Fetch(job["repo"], job["cache"], job["endpoint"])
    try:
        fetch.run(tuple(job["files"]), tuple(job["beside"]))
    except Exception as exc:  # every failure is told in the same way
        tell(failed=facts(exc, fetch.asked), got=fetch.got_bytes)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
