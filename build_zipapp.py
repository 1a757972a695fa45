#!/usr/bin/env python3
"""Build llmstack.pyz: the one file people copy to another machine.

    python3 build_zipapp.py [--output FILE]    build, print size and sha256
    python3 build_zipapp.py --check FILE       exit 1 unless FILE is what this tree builds

Reproducible: a fixed list of entries, fixed times and modes, zlib at level 9. `python -m zipapp` is
not, and takes along whatever lies in the directory. Where two machines have different builds of
zlib, the same tree may come out in other bytes of the same meaning: --check looks at what is
inside, and says when only the packing differs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
import tempfile
import zipfile
import zlib

ROOT = os.path.dirname(os.path.abspath(__file__))
FILES = ("LICENSE", "llmstack.py", "models.ini")        # __main__.py is made below
FOLDERS = ("extras", "share")                           # every file in them that git would take
LIMIT_BYTES = 420_000
OLDEST = (3, 9)

# Runs before the program is read, so: syntax that Python 2.7 parses, to refuse old versions in one
# line; the version without loading anything; and a cache for the program's bytecode. A zipapp never
# caches its own, and compiling takes 0.2 s a start, which is most of what `status` or the router's
# boot would cost. The cache is keyed by the source's hash, as PEP 552's pycs are, and lives in the
# user's own cache directory.
MAIN = '''\
import sys

if sys.version_info < (%(major)d, %(minor)d):
    have = "this is %%d.%%d\\n" %% sys.version_info[:2]
    sys.stderr.write("llmstack: error: Python %(major)d.%(minor)d or newer is needed, " + have)
    sys.stderr.write("hint: run it with a newer python3\\n")
    sys.exit(2)
if sys.argv[1:] in (["version"], ["--version"], ["-V"]):
    sys.stdout.write("llmstack %(version)s\\n")
    sys.exit(0)

import os
from importlib.util import source_hash

HERE = os.path.dirname(__file__)

if sys.argv[1:2] == ["_guest"]:
    # A program for another environment's Python, which finds nothing of this archive to import.
    guest = os.path.join(HERE, "share", "guests", sys.argv[2] + ".py")
    sys.path[:] = [entry for entry in sys.path if entry != HERE]
    sys.argv[:3] = [guest]
    code = compile(__loader__.get_data(guest), guest, "exec", dont_inherit=True)
    exec(code, {"__name__": "__main__", "__file__": guest})
    sys.exit(0)


def cached_code(source):
    import marshal
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    else:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    name = "%%s.%%s.bytecode" %% (source_hash(source).hex(), sys.implementation.cache_tag)
    path = os.path.join(root, "llmstack", name)
    try:
        with open(path, "rb") as file:
            return marshal.loads(file.read())
    except (OSError, ValueError, EOFError, TypeError):
        pass
    code = compile(source, os.path.join(HERE, "llmstack.py"), "exec", dont_inherit=True)
    if not sys.dont_write_bytecode:
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            for old in os.listdir(os.path.dirname(path)):
                if old.endswith(sys.implementation.cache_tag + ".bytecode"):
                    os.unlink(os.path.join(os.path.dirname(path), old))
            temporary = "%%s.%%d" %% (path, os.getpid())
            with open(temporary, "wb") as file:
                file.write(marshal.dumps(code))
            os.replace(temporary, path)
        except OSError:
            pass
    return code


def load():
    module = type(sys)("llmstack")
    module.__file__ = os.path.join(HERE, "llmstack.py")
    module.__loader__ = __loader__
    sys.modules["llmstack"] = module
    exec(cached_code(__loader__.get_data(module.__file__)), module.__dict__)
    return module


try:
    sys.exit(load().main())
except KeyboardInterrupt:       # before the program was there to say it
    sys.stderr.write("\\nllmstack: interrupted\\n")
    sys.exit(130)
'''


def program_version(source: bytes) -> str:
    match = re.search(rb'^VERSION = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise SystemExit("build_zipapp: error: llmstack.py names no VERSION")
    return match.group(1).decode()


def bundled_files() -> list[str]:
    """The names of what travels, sorted, with slashes.

    Bytecode and what an editor leaves behind stay here.
    """
    names = list(FILES)
    for folder in FOLDERS:
        for directory, _, files in os.walk(os.path.join(ROOT, folder)):
            for name in files:
                if name.startswith(".") or name.endswith(("~", ".pyc", ".orig", ".rej")):
                    continue
                path = os.path.relpath(os.path.join(directory, name), ROOT)
                names.append(path.replace(os.sep, "/"))
    return sorted(names)


def build() -> bytes:
    """The whole file: a shebang line and a zip archive behind it."""
    contents = {}
    for name in bundled_files():
        with open(os.path.join(ROOT, name), "rb") as file:
            contents[name] = file.read().replace(b"\r\n", b"\n")
    version = program_version(contents["llmstack.py"])
    main = MAIN % {"major": OLDEST[0], "minor": OLDEST[1], "version": version}
    contents["__main__.py"] = main.encode("ascii")
    out = io.BytesIO()
    out.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3                     # unix, wherever it is built
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, contents[name], zipfile.ZIP_DEFLATED, 9)
    return out.getvalue()


def inside(data: bytes) -> list[tuple[object, ...]]:
    """What a built file holds, however it is packed. Errors: zipfile.BadZipFile."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = min(entry.header_offset for entry in archive.infolist())
        ending = data[-22:-18]                  # of the end record: nothing may stand behind it
        found: list[tuple[object, ...]] = [(data[:start], ending)]
        for entry in archive.infolist():
            what = archive.read(entry)
            found.append((entry.filename, entry.date_time, entry.external_attr, what))
        return found


def compare(path: str, data: bytes) -> int:
    """Exit code of --check."""
    try:
        with open(path, "rb") as file:
            there = file.read()
        same = there == data or inside(there) == inside(data)
    except OSError as exc:
        print(f"build_zipapp: error: cannot read {path}: {exc.strerror}", file=sys.stderr)
        return 1
    except (zipfile.BadZipFile, ValueError, zlib.error):
        same = False
    if not same:
        print(f"{path}: is not what this tree builds")
        return 1
    packed = "" if there == data else ", packed by another zlib"
    print(f"{path}: is what this tree builds{packed}")
    return 0


def write(path: str, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)), suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(temporary, 0o755)  # noqa: S103  # a program for everyone
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build llmstack.pyz.")
    parser.add_argument("--output", metavar="FILE", default=os.path.join(ROOT, "llmstack.pyz"))
    parser.add_argument("--check", metavar="FILE", help="compare FILE with what this tree builds")
    args = parser.parse_args()
    data = build()
    if len(data) > LIMIT_BYTES:
        print(f"build_zipapp: error: {len(data):,} bytes, the limit is {LIMIT_BYTES:,}",
              file=sys.stderr)
        return 1
    if args.check:
        return compare(args.check, data)
    write(args.output, data)
    print(f"{args.output}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
