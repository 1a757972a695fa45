"""Fetch llama-swap's binary.

Fetch the release for this platform, verify its checksum and install it for all projects (in
LLMSTACK_BIN_DIR, or bin of the data directory). The same version again: nothing is done.

examples:
  llmstack install-llama-swap               # the latest release
  llmstack install-llama-swap --version v250
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import platform
import re
import tarfile
import time
import urllib.error
import zipfile
import zlib
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

RELEASES_URL = "https://api.github.com"
MAX_BINARY_BYTES = 512 << 20
MAX_RELEASE_BYTES = 16 << 20                    # what GitHub's API says of one
MAX_CHECKSUMS_BYTES = 1 << 20


def parse_checksums(text: str) -> Dict[str, str]:
    """A checksums.txt: `<sha256>  <file>` a line -> file to digest."""
    sums = {}
    for line in text.splitlines():
        match = re.match(r"([0-9A-Fa-f]{64})\s+\*?(\S+)\s*\Z", line)
        if match:
            sums[match.group(2)] = match.group(1).lower()
    return sums


def choose_asset(names: Sequence[str], system: str, machine: str) -> str:
    """llama-swap's archive for a platform, "" for none: `llama-swap_251_linux_amd64.tar.gz`."""
    wanted = re.compile(rf"llama-swap_[0-9A-Za-z.-]+_{system}_{machine}\.(?:tar\.gz|zip)\Z")
    return next(filter(wanted.match, names), "")


def asset_platforms(names: Sequence[str]) -> str:
    """The platforms that a release of llama-swap has archives for, for people."""
    found = (re.match(r"llama-swap_[^_]+_([a-z]+)_([a-z0-9]+)\.", name) for name in names)
    return ", ".join(sorted("/".join(match.groups()) for match in found if match)) or "no platform"


def swap_version(output: str) -> str:
    """`version: v250 (abc), built at ...`, as `llama-swap -version` says it -> v250."""
    match = re.search(r"version:\s*(v?[0-9][\w.-]*)", output)
    return "v" + match.group(1).lstrip("v") if match else ""


def copy_with_progress(source: Any, file: Any, total: int, name: str, say: Callable[[str], None],
                       limit: int, llmstack: Any) -> None:
    """Copy to the end, saying how far it is; bytes. Errors: ValueError beyond `limit`."""
    began, said, done = time.monotonic(), 0.0, 0
    while True:
        data = source.read(1 << 18)
        if not data:
            return
        file.write(data)
        done += len(data)
        if done > limit:
            raise ValueError(f"more than {limit:,} bytes")
        passed = time.monotonic() - began
        if passed - said >= 2:
            said = passed
            say(f"  {name}: {llmstack.progress_words(done, total, done / passed)}")


def platform_names(llmstack: Any) -> Tuple[str, str]:
    """(system, machine) of this computer as Go's releases name them."""
    system = platform.system().lower()
    if llmstack.IS_WINDOWS:
        system = "windows"
    elif llmstack.IS_MAC:
        system = "darwin"
    machine = platform.machine().lower()
    known = {"x86_64": "amd64", "x64": "amd64", "aarch64": "arm64"}
    return system, known.get(machine, machine)


def installed_swap(path: str, llmstack: Any) -> str:
    """The version an installed llama-swap gives itself, "" when it does not run."""
    if not os.access(path, os.X_OK):
        return ""
    return swap_version(llmstack.program_output([path, "-version"]))


def release_refusal(exc: Any, what: str, llmstack: Any) -> Any:
    """What an HTTPError of the releases' server means for the user."""
    if exc.code == 404:
        return llmstack.UserError(f"there is no {what}",
                                  "see https://github.com/mostlygeek/llama-swap/releases")
    after = exc.headers.get("Retry-After", "")
    limited = after or exc.headers.get("X-RateLimit-Remaining") == "0"
    if exc.code not in (403, 429) or not limited:
        return llmstack.UserError(f"the releases server answers {exc.code} for {what}",
                                  "try again later")
    reset, wait_s = exc.headers.get("X-RateLimit-Reset", ""), 3600.0
    if after.isdigit():
        wait_s = float(after)
    elif reset.isdigit():
        wait_s = max(float(reset) - time.time(), 0.0)
    clock = time.strftime("%H:%M", time.localtime(time.time() + min(wait_s, 86_400.0)))
    return llmstack.UserError("the releases server lets this address ask no more for now",
                              f"wait until {clock}, or put the binary in place yourself")


def release_answer(url: str, limit_bytes: int, what: str, say: Callable[[str], None],
                   llmstack: Any) -> bytes:
    """A file or an answer of the releases' server. Errors: UserError."""
    try:
        with llmstack.open_url(url, {}, "the releases server") as answer:
            total, out = int(answer.headers.get("Content-Length") or 0), io.BytesIO()
            copy_with_progress(answer, out, total, what, say, limit_bytes, llmstack)
    except urllib.error.HTTPError as exc:
        raise release_refusal(exc, what, llmstack) from None
    except (OSError, ValueError, http.client.HTTPException) as exc:
        reason = str(exc) or type(exc).__name__
        raise llmstack.UserError(f"{what} did not arrive: {reason}", "try again") from None
    have = len(out.getbuffer())
    if total and have != total:
        raise llmstack.UserError(f"{what} did not arrive: the connection ended at"
                                 f" {have:,} of {total:,} bytes", "try again")
    return out.getvalue()


def extract_zip(archive: bytes, wanted: str) -> Optional[bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as pack:
        for info in pack.infolist():
            kind = info.external_attr >> 28     # of Unix's file types, 8 is a regular file
            plain = kind in (0, 8) and info.file_size <= MAX_BINARY_BYTES
            if info.filename == wanted and plain:
                return pack.read(info)
    return None


def extract_tar_gz(archive: bytes, wanted: str) -> Optional[bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            plain = member.isreg() and member.size <= MAX_BINARY_BYTES
            if member.name in (wanted, "./" + wanted) and plain:
                source = tar.extractfile(member)
                return source.read() if source else None
    return None


def extract(archive: bytes, name: str, wanted: str, llmstack: Any) -> bytes:
    """The plain file `wanted` at the root of a .tar.gz or .zip. Errors: UserError.

    Nothing of the archive touches the disk.
    """
    broken = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError,
              NotImplementedError)
    read = extract_tar_gz
    if name.endswith(".zip"):
        read = extract_zip
    try:
        data = read(archive, wanted)
    except broken as exc:
        raise llmstack.UserError(f"{name} cannot be unpacked: {exc}", "try again later") from None
    if data is None:
        raise llmstack.UserError(f"{name} holds no plain file {wanted}", "try another --version")
    return data


class Release(NamedTuple):
    """A release of llama-swap, as GitHub's API describes it."""

    tag: str
    addresses: Dict[str, str]                   # file -> where it is
    digests: Dict[str, str]                     # file -> its SHA-256, "" where none is given


def parse_release(data: bytes) -> Release:
    """Errors: ValueError where it is none."""
    try:
        found = json.loads(data)
        rows = [(str(asset["name"]), asset) for asset in found["assets"]]
        addresses = {name: str(asset["browser_download_url"]) for name, asset in rows}
        digests = {name: str(asset.get("digest") or "") for name, asset in rows}
        return Release(str(found["tag_name"]), addresses, digests)
    except (LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise ValueError(str(exc)) from None


def release_digest(release: Release, name: str, say: Callable[[str], None], llmstack: Any) -> str:
    """The SHA-256 that a release names for one of its files. Errors: UserError without one."""
    listed = next((n for n in release.addresses if n.endswith("checksums.txt")), "")
    digest = ""
    if listed:
        address = release.addresses[listed]
        text = release_answer(address, MAX_CHECKSUMS_BYTES, "checksums.txt", say, llmstack)
        digest = parse_checksums(text.decode("utf-8", "replace")).get(name, "")
    digest = digest or release.digests[name].replace("sha256:", "")
    if not re.match(r"[0-9a-f]{64}\Z", digest):
        tag = llmstack.visible(release.tag)
        raise llmstack.UserError(f"llama-swap {tag} gives no SHA-256 for {name}, so it is not"
                                 " installed", "try another --version")
    return digest


def releases_url(env: Mapping[str, str]) -> str:
    return (env.get("LLMSTACK_RELEASES_URL") or RELEASES_URL).rstrip("/")


def find_release(env: Mapping[str, str], tag: str, say: Callable[[str], None],
                 llmstack: Any) -> Release:
    """What is known of a release ("": of the latest). Errors: UserError."""
    server = releases_url(env)
    base = f"{server}/repos/mostlygeek/llama-swap/releases/"
    url, what = base + "latest", "latest release of llama-swap"
    if tag:
        url, what = f"{base}tags/{tag}", f"release {tag} of llama-swap"
    try:
        return parse_release(release_answer(url, MAX_RELEASE_BYTES, what, say, llmstack))
    except ValueError:
        raise llmstack.UserError(f"{base} does not answer like GitHub's releases API",
                                 "see LLMSTACK_RELEASES_URL") from None


def put_program(path: str, data: bytes, tag: str, llmstack: Any) -> None:
    """Put an executable in place once it has run beside it. Errors: UserError.

    One that runs keeps its file.
    """
    new = path[:len(path) - len(llmstack.EXE)] + ".new" + llmstack.EXE
    llmstack.write_atomic(new, data, 0o755)
    try:
        if installed_swap(new, llmstack) != tag:
            tag = llmstack.visible(tag)
            raise llmstack.UserError("the llama-swap that was fetched does not run here, or is not"
                                     f" {tag}", "the old one stays; try another --version")
        try:
            os.replace(new, path)
        except PermissionError:                 # on Windows a running one can only be renamed
            with contextlib.suppress(OSError):
                os.unlink(path + ".old")
            os.replace(path, path + ".old")
            os.replace(new, path)
    except OSError as exc:
        raise llmstack.UserError(f"cannot write {path}: {exc.strerror}",
                                 "stop what uses it, or mend its permissions") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(new)


def install_llama_swap(env: Mapping[str, str], data: str, version: str, force: bool,
                       say: Callable[[str], None], llmstack: Any) -> bool:
    """Bring a release of llama-swap ("": the latest) to its place; False when it was there.

    Errors: UserError; what was there stays.
    """
    version = version or env.get("LLAMA_SWAP_VERSION", "")
    if version and not re.match(r"v?[0-9][\w.-]{0,40}\Z", version, re.ASCII):
        raise llmstack.UserError(f"{version!r} is no version of llama-swap",
                                 "give one like v250", 2)
    tag = "v" + version.lstrip("v") if version else ""
    path = os.path.join(llmstack.bin_dir(env, data), "llama-swap" + llmstack.EXE)
    have = installed_swap(path, llmstack)
    if tag and have == tag and not force:
        say(f"llama-swap {have} is here already: {path}")
        return False
    release = find_release(env, tag, say, llmstack)
    if have == release.tag and not force:
        say(f"llama-swap {have} is the latest and here already: {path}")
        return False
    system, machine = platform_names(llmstack)
    shown = llmstack.visible(release.tag)
    name = choose_asset(list(release.addresses), system, machine)
    if not name:
        there = asset_platforms(list(release.addresses))
        raise llmstack.UserError(f"llama-swap {shown} has no binary for {system}/{machine}, only"
                                 f" for {there}",
                                 "nothing is missing without it: llmstack brings an engine along")
    digest = release_digest(release, name, say, llmstack)
    say(f"Fetching llama-swap {shown} for {system}/{machine}")
    archive = release_answer(release.addresses[name], MAX_BINARY_BYTES, name, say, llmstack)
    if hashlib.sha256(archive).hexdigest() != digest:
        raise llmstack.UserError(f"{name} is damaged or not the released one: its SHA-256 is not"
                                 " that of the release",
                                 "try again; if it stays so, do not use it")
    program = extract(archive, name, "llama-swap" + llmstack.EXE, llmstack)
    put_program(path, program, release.tag, llmstack)
    say(f"Installed {path}: llama-swap {shown}, checksum verified")
    return True


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("install-llama-swap", __doc__)
    parser.add_argument("--force", "-f", action="store_true",
                        help="install it even where that version is there")
    parser.add_argument("--version", metavar="V", dest="release", default="",
                        help="a particular one, such as v250 (default: LLAMA_SWAP_VERSION, else the"
                        " latest)")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    say = llmstack.say
    install_llama_swap(places.env, places.data, args.release, args.force, say, llmstack)
    return 0
