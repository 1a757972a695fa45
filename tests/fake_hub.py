"""Local servers that speak two protocols of the internet: the model hub's, and that of GitHub's releases API.

The hub: refs, tree, paths-info, model info, resolve with a redirect to a store under another host name, ranges,
ETag, X-Linked-Etag, X-Linked-Size, X-Repo-Commit; and it can be slow, cut a file short, serve damaged bytes, be
gated, or answer any status. Used by the real huggingface_hub and by the real llama-server.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Seen(NamedTuple):
    method: str
    path: str
    authorization: str
    range: str


class LocalServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: Any) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.seen: list[Seen] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no error here."""

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def note(self) -> None:
        said = self.headers
        self.server.seen.append(Seen(self.command, self.path, said.get("Authorization", ""), said.get("Range", "")))

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)


class FakeHub(LocalServer):
    """`repos`: repository -> file -> bytes; a name that ends in .gguf is kept in LFS."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: dict[str, str] = {}                     # repository -> the token that opens it
        self.revision: dict[str, int] = {}                  # counted up for a new commit
        self.refuse: list[tuple[int, dict[str, str]]] = []  # the next answers of resolve: status, headers
        self.cut: list[int] = []                            # the next bodies end after so many bytes
        self.lapsed = 0                                     # so many signed addresses are no longer good
        self.damaged = False                                # every body has its last byte changed
        self.nonsense = b""                                 # what the API answers instead
        self.ranges = True                                  # without: every body is whole, as through some proxies
        self.hold_after = 0                                 # whole files wait behind so many bytes...
        self.gate = threading.Event()                       # ...until this is set
        self.held = threading.Event()                       # one has come that far
        super().__init__(HubHandler)

    def stop(self) -> None:
        self.gate.set()
        super().stop()

    def commit(self, repo: str) -> str:
        return hashlib.sha1(f"{repo} {self.revision.get(repo, 0)}".encode()).hexdigest()

    def rows(self, repo: str) -> list[dict[str, Any]]:
        rows = []
        for name, data in self.repos[repo].items():
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest(),
                                   "lastCommit": {"id": self.commit(repo), "title": "x", "date": "2026-05-04T03:02:01.000Z"}}
            if name.endswith(".gguf"):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            rows.append(row)
        return rows

    def fetched(self) -> list[Seen]:
        return [s for s in self.seen if s.method == "GET" and s.path.startswith("/store/")]


class HubHandler(Handler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.note()
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        path = unquote(urlsplit(self.path).path)
        api = re.match(r"/api/models/([^/]+/[^/]+)(?:/(refs|tree|paths-info|revision)(?:/([^/]+))?)?$", path)
        file = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path)
        store = re.match(r"/store/([^/]+/[^/]+)/(.+)$", path)
        if store:
            self.body(self.server.repos[store.group(1)][store.group(2)])
        elif api and self.may(api.group(1)):
            self.api(api.group(1), api.group(2) or "revision", form)
        elif file and self.may(file.group(1)):
            self.resolve(file.group(1), file.group(3))
        elif not api and not file:
            self.answer(404)

    def may(self, repo: str) -> bool:
        """As the real one: who asks without a token is told 401 for whatever he may not see."""
        asked = self.headers.get("Authorization", "")
        token = self.server.gated.get(repo)
        if repo not in self.server.repos:
            self.answer(404 if asked else 401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return False
        if token is not None and asked != f"Bearer {token}":
            self.answer(403 if asked else 401, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
            return False
        return True

    def api(self, repo: str, what: str, form: dict[str, list[str]]) -> None:
        hub, rows = self.server, self.server.rows(repo)
        if hub.nonsense:
            self.answer(200, hub.nonsense)
        elif what == "refs":
            self.json({"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": hub.commit(repo)}], "tags": [],
                       "converts": []})
        elif what == "tree":
            self.json(rows)
        elif what == "paths-info":
            self.json([row for row in rows if row["path"] in form["paths"]])
        else:
            self.json({"id": repo, "sha": hub.commit(repo), "gated": repo in hub.gated,
                       "siblings": [{"rfilename": row["path"]} for row in rows]})

    def resolve(self, repo: str, name: str) -> None:
        hub = self.server
        if hub.refuse:
            status, headers = hub.refuse.pop(0)
            self.answer(status, **headers)
        elif name not in hub.repos[repo]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=hub.commit(repo))
        else:
            data = hub.repos[repo][name]
            digest = hashlib.sha256(data).hexdigest()
            self.answer(302, X_Repo_Commit=hub.commit(repo), X_Linked_Size=str(len(data)), X_Linked_Etag=f'"{digest}"',
                        ETag=f'"{digest[:32]}"', Location=f"http://localhost:{hub.port}/store/{repo}/{name}?signed=1")

    def body(self, data: bytes) -> None:
        hub, asked = self.server, self.headers.get("Range", "")
        if hub.lapsed:
            hub.lapsed -= 1
            self.answer(403, b"Request has expired")
            return
        if self.headers.get("Authorization"):
            self.answer(400, b"only one auth mechanism allowed")        # as a signed address of the real store says
            return
        if not hub.ranges:
            asked = ""
        first, _, last = asked[len("bytes="):].partition("-")
        start, end = int(first or 0), int(last or len(data) - 1) + 1
        if start >= len(data):
            self.answer(416, Content_Range=f"bytes */{len(data)}")
            return
        if hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(206 if asked else 200)
        end = min(end, len(data))
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if hub.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = end
        if hub.cut:
            end = hub.cut.pop(0)
        hold = 0 if asked or hub.gate.is_set() else hub.hold_after
        if 0 < hold < end:
            self.wfile.write(data[start:hold])
            hub.held.set()
            hub.gate.wait(60)
            start = hold
        try:
            self.wfile.write(data[start:end])
        except ConnectionError:                             # a reader that had enough
            self.close_connection = True
        if end < whole:
            self.close_connection = True


class FakeReleases(LocalServer):
    """The part of GitHub's API that names releases, and the files behind it. `assets`: tag -> name -> bytes."""

    def __init__(self) -> None:
        self.assets: dict[str, dict[str, bytes]] = {}
        self.limited = ""                                   # X-RateLimit-Reset while it is set
        self.digests = False
        self.nonsense = b""                                 # what the API answers instead
        super().__init__(ReleasesHandler)

    def add(self, tag: str, archives: dict[str, bytes], sums: dict[str, str] | None = None) -> None:
        """A release with its checksums.txt, right unless `sums` says otherwise."""
        found = {name: hashlib.sha256(data).hexdigest() for name, data in archives.items()}
        text = "".join(f"{digest}  {name}\n" for name, digest in {**found, **(sums or {})}.items())
        self.assets[tag] = {**archives, f"llama-swap_{tag[1:]}_checksums.txt": text.encode()}


class ReleasesHandler(Handler):
    server: FakeReleases

    def do_GET(self) -> None:
        self.note()
        fake = self.server
        api = re.match(r"/repos/mostlygeek/llama-swap/releases/(?:(latest)|tags/(.+))$", self.path)
        file = re.match(r"/files/([^/]+)/(.+)$", self.path)
        if fake.nonsense and api:
            self.answer(200, fake.nonsense)
        elif fake.limited and api:
            self.json({"message": "API rate limit exceeded"}, 403, X_RateLimit_Remaining="0", X_RateLimit_Reset=fake.limited)
        elif api and (api.group(1) or api.group(2) in fake.assets):
            tag = api.group(2) or sorted(fake.assets)[-1]
            self.json({"tag_name": tag, "assets": [
                {"name": name, "browser_download_url": f"{fake.url}/files/{tag}/{name}",
                 "digest": "sha256:" + hashlib.sha256(data).hexdigest() if fake.digests else None}
                for name, data in fake.assets[tag].items()]})
        elif file and file.group(2) in fake.assets.get(file.group(1), {}):
            self.answer(200, fake.assets[file.group(1)][file.group(2)])
        else:
            self.json({"message": "Not Found"}, 404)


def tar_gz(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, data in members.items():
            pack.writestr(name, data)
    return out.getvalue()
