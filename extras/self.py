"""Put this program on PATH, or replace it by another build.

  install              a copy of llmstack.pyz, or a launcher of a source tree, and what completes
                       its commands in your shell
  update FILE|URL      check another llmstack.pyz, and put it in this one's place at once

examples:
  llmstack self install
  llmstack self update ./llmstack.pyz --check
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from typing import Any, Sequence, Tuple

MAX_BYTES = 20 << 20
PATIENCE_S = 60
MARK = "# A launcher that llmstack self install has written."
NEEDED = ("__main__.py", "llmstack.py", "models.ini")
COMPLETIONS = {"fish": "~/.config/fish/completions/llmstack.fish",
               "bash": "~/.local/share/bash-completion/completions/llmstack"}


# ---- another build


def problem_of(data: bytes) -> str:
    """Why a file is no llmstack.pyz that is whole, "" where it is one."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            missing = [name for name in NEEDED if name not in archive.namelist()]
            broken = "" if missing else archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError):
        return "it is no zip archive, or not all of one"
    if missing:
        return f"it has no {missing[0]}"
    return f"{broken} in it is damaged" if broken else ""


def refuse_unprotected(url: str, llmstack: Any) -> None:
    """A program is not fetched through what anybody on the way can change. Errors: UserError."""
    is_local = re.match(r"http://(127\.0\.0\.1|localhost|\[::1\])[:/]", url)
    if url.startswith("http://") and not is_local:
        raise llmstack.UserError(f"{url} would come unprotected", "give an https:// URL", 2)


def read_source(source: str, llmstack: Any) -> bytes:
    """The bytes of a FILE or URL. Errors: UserError."""
    refuse_unprotected(source, llmstack)
    try:
        if not source.startswith(("http://", "https://")):
            with open(source, "rb") as file:
                return file.read(MAX_BYTES + 1)
        import urllib.request
        with urllib.request.urlopen(source, timeout=PATIENCE_S) as answer:  # noqa: S310
            refuse_unprotected(answer.geturl(), llmstack)       # where redirects have led
            return bytes(answer.read(MAX_BYTES + 1))
    except (OSError, ValueError) as exc:
        what = getattr(exc, "strerror", None) or getattr(exc, "reason", None) or exc
        raise llmstack.UserError(f"cannot read {source}: {what}",
                                 "name a llmstack.pyz, or where one is") from None


def version_of(path: str, llmstack: Any) -> str:
    """What a built file says of itself when it is run. Errors: UserError."""
    try:
        done = subprocess.run([sys.executable, "-I", path, "version"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False,
                              timeout=PATIENCE_S)
        said = done.stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        said = ""
    found = re.match(r"llmstack ([0-9][\w.+-]{0,30})\s*\Z", said)
    if not found:
        raise llmstack.UserError("it does not run here", "take another build; this one stays")
    return found.group(1)


def try_it(data: bytes, target: str, llmstack: Any) -> Tuple[str, bool]:
    """(version of the build in `data`, whether it is what `target` is). Errors: UserError."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "llmstack.pyz")
        with open(path, "wb") as file:
            file.write(data)
        version = version_of(path, llmstack)
    with open(target, "rb") as file:
        return version, file.read() == data


def update(source: str, sha256: str, only_check: bool, llmstack: Any) -> int:
    """Check a build, and put it in this one's place. Errors: UserError, and nothing is changed."""
    target = os.path.realpath(llmstack.PROGRAM)
    if not zipfile.is_zipfile(target) and not only_check:
        raise llmstack.UserError(f"{target} is no llmstack.pyz",
                                 "update it as it came: git pull, pip, pipx or uv", 2)
    data = read_source(source, llmstack)
    digest = hashlib.sha256(data).hexdigest()
    problem = problem_of(data)
    if len(data) > MAX_BYTES:
        problem = f"it has more than {MAX_BYTES:,} bytes"
    elif sha256 and digest != sha256.lower():
        problem = f"its sha256 is {digest}"
    if problem:
        raise llmstack.UserError(f"{source} is not taken: {problem}", "this one stays")
    new, is_same = try_it(data, target, llmstack)
    llmstack.say(f"{source}: llmstack {new}, sha256 {digest}")
    if is_same:
        llmstack.say(f"It is what {target} is already.")
    elif not only_check:
        llmstack.write_atomic(target, data, 0o755)
        llmstack.say(f"Wrote {target}, which was {llmstack.VERSION}."
                     " What runs goes on as it is until `llmstack restart`.")
    return 0


# ---- the command on PATH


def default_directory(llmstack: Any) -> str:
    if llmstack.IS_WINDOWS:
        return os.path.join(llmstack.data_dir(os.environ), "bin")
    return os.path.expanduser("~/.local/bin")


def launcher(llmstack: Any) -> str:
    """A program of the system's own shell that runs this one where it is."""
    words = [sys.executable, llmstack.PROGRAM]
    if llmstack.IS_WINDOWS:
        quoted = " ".join(llmstack.windows_quote(word) for word in words)
        return f"@rem {MARK}\r\n@{quoted} %*\r\n"
    quoted = " ".join(llmstack.posix_quote(word) for word in words)
    return f'#!/bin/sh\n{MARK}\nexec {quoted} "$@"\n'


def is_ours(path: str) -> bool:
    """True for what an earlier install has put there, and for nothing at all."""
    if not os.path.lexists(path):
        return True
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES)
    except OSError:
        return False
    return MARK.encode() in data or not problem_of(data)


def put(path: str, data: bytes, llmstack: Any) -> None:
    if os.path.islink(path):
        os.unlink(path)                         # what it leads to is not ours to write
    llmstack.write_atomic(path, data, 0o755)
    llmstack.say(f"Wrote {path}")


def install_completion(llmstack: Any) -> None:
    """Write the user's shell's, or say the line that turns it on."""
    shell = llmstack.shell_name(llmstack.shell_program(os.environ))
    if shell in COMPLETIONS:
        path = os.path.expanduser(COMPLETIONS[shell])
        text = llmstack.read_shared_text(f"completion/llmstack.{shell}")
        llmstack.write_atomic(path, text, 0o644)
        llmstack.say(f"Wrote {path}")
    elif shell == "zsh":
        llmstack.say('In ~/.zshrc, after compinit: eval "$(llmstack completion zsh)"')
    elif shell == "powershell":
        llmstack.say("In $PROFILE: llmstack completion powershell | Out-String | Invoke-Expression")


def install(directory: str, is_link: bool, llmstack: Any) -> int:
    """Put the program into a directory of PATH. Errors: UserError."""
    is_copy = zipfile.is_zipfile(llmstack.PROGRAM) and not is_link and not llmstack.IS_WINDOWS
    name = "llmstack.cmd" if llmstack.IS_WINDOWS else "llmstack"
    path = os.path.join(os.path.abspath(os.path.expanduser(directory)), name)
    if os.path.realpath(path) == os.path.realpath(llmstack.PROGRAM):
        llmstack.say(f"This is {path} already.")
    elif not is_ours(path):
        raise llmstack.UserError(f"{path} is another program", "move it away, or name a --dir")
    elif is_copy:
        with open(llmstack.PROGRAM, "rb") as file:
            put(path, file.read(), llmstack)
    else:
        put(path, launcher(llmstack).encode(), llmstack)
    on_path = [os.path.abspath(part) for part in os.environ.get("PATH", "").split(os.pathsep)]
    if os.path.dirname(path) not in on_path:
        llmstack.say(f"{os.path.dirname(path)} is not on PATH yet; add it, and open a new shell.")
    install_completion(llmstack)
    return 0


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("self", __doc__)
    parser.usage = ("llmstack self install [--dir DIR] [--link]\n"
                    "       llmstack self update FILE|URL [--check] [--sha256 HEX]")
    parser.add_argument("action", choices=["install", "update"], help=argparse.SUPPRESS)
    parser.add_argument("source", nargs="?", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dir", metavar="DIR", default="", help="where to (~/.local/bin)")
    parser.add_argument("--link", action="store_true",
                        help="a launcher of this file where it is, instead of a copy")
    parser.add_argument("--check", action="store_true", help="look at it, and change nothing")
    parser.add_argument("--sha256", metavar="HEX", default="", help="that the file is to have")
    args = parser.parse_args(list(argv))
    if args.action == "install":
        if args.source or args.check or args.sha256:
            parser.error("install takes --dir and --link only")
        return install(args.dir or default_directory(llmstack), args.link, llmstack)
    if not args.source:
        parser.error("update takes a FILE or a URL: releases have no address of their own yet")
    return update(args.source, args.sha256, args.check, llmstack)
