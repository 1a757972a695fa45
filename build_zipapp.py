#!/usr/bin/env python3
"""Build llmstack.pyz: the one file people copy to another machine.

    python3 build_zipapp.py [--output FILE]    build, print size and sha256
    python3 build_zipapp.py --check FILE       exit 1 unless FILE is what this tree builds

Reproducible: a fixed list of entries, fixed times and modes, nothing compressed (deflate's bytes differ between
zlib builds). `python -m zipapp` is not, and takes along whatever lies in the directory. Comments and docstrings
stay behind, and three of four spaces of indentation, a quarter of the program; its lines keep their numbers, so a
traceback reads as from the source.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import os
import re
import sys
import tempfile
import tokenize
import zipfile

ROOT = os.path.dirname(os.path.abspath(__file__))
FILES = ("LICENSE", "llmstack.py", "models.ini")        # sorted; __main__.py is made below
LIMIT_BYTES = 300_000
OLDEST = (3, 9)

# Runs before the program is read, so: syntax that Python 2.7 parses, to refuse old versions in one line; the
# version without loading anything; and a cache for the program's bytecode. A zipapp never caches its own, and
# compiling takes 0.2 s a start, which is most of what `status` or the router's boot would cost. The cache is
# keyed by the source's hash, as PEP 552's pycs are, and lives in the user's own cache directory.
MAIN = '''\
import sys

if sys.version_info < (%(major)d, %(minor)d):
    sys.stderr.write("llmstack: error: Python %(major)d.%(minor)d or newer is needed, this is %%d.%%d\\n" %% sys.version_info[:2])
    sys.stderr.write("hint: run it with a newer python3\\n")
    sys.exit(2)
if sys.argv[1:] in (["version"], ["--version"], ["-V"]):
    sys.stdout.write("llmstack %(version)s\\n")
    sys.exit(0)

import os
from importlib.util import source_hash

HERE = os.path.dirname(__file__)


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


sys.exit(load().main())
'''


def program_version(source: bytes) -> str:
    match = re.search(rb'^VERSION = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise SystemExit("build_zipapp: error: llmstack.py names no VERSION")
    return match.group(1).decode()


def bare(source: str) -> str:
    """A program without its comments and docstrings, a space a level, every statement on the line it was on."""
    lines = source.split("\n")
    cuts = [(*token.start, *token.end, "") for token in tokenize.tokenize(io.BytesIO(source.encode()).readline)
            if token.type == tokenize.COMMENT and not token.string.startswith("#!")]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            assert text.end_lineno is not None
            assert text.end_col_offset is not None
            cuts.append((text.lineno, text.col_offset, text.end_lineno, text.end_col_offset, '""'))
    for line, column, last, end, instead in sorted(cuts, reverse=True):
        rest = str(lines[last - 1].encode()[end:], "utf-8") if instead else ""   # ast counts bytes; a comment ends its line
        kept = (lines[line - 1][:column] + instead + rest).rstrip()
        lines[line - 1:last] = [kept, *[""] * (last - line)]
    source = "\n".join(lines)
    inside = {line for token in tokenize.tokenize(io.BytesIO(source.encode()).readline) if token.type != tokenize.ENCODING
              for line in range(token.start[0], token.end[0])}          # of a string over several lines, all but the first
    for at, whole in enumerate(lines):
        if at not in inside:
            code = whole.lstrip(" ")
            lines[at] = " " * -(-(len(whole) - len(code)) // 4) + code
    return "\n".join(lines)


def build() -> bytes:
    """The whole file: a shebang line and a zip archive behind it."""
    contents = {}
    for name in FILES:
        with open(os.path.join(ROOT, name), "rb") as file:
            contents[name] = file.read().replace(b"\r\n", b"\n")
    version = program_version(contents["llmstack.py"])
    contents["llmstack.py"] = bare(str(contents["llmstack.py"], "utf-8")).encode()
    main = MAIN % {"major": OLDEST[0], "minor": OLDEST[1], "version": version}
    contents["__main__.py"] = main.encode("ascii")
    out = io.BytesIO()
    out.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(out, "a", zipfile.ZIP_STORED) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3                     # unix, wherever it is built
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, contents[name])
    return out.getvalue()


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
        print(f"build_zipapp: error: {len(data):,} bytes, the limit is {LIMIT_BYTES:,}", file=sys.stderr)
        return 1
    if args.check:
        try:
            with open(args.check, "rb") as file:
                same = file.read() == data
        except OSError as exc:
            print(f"build_zipapp: error: cannot read {args.check}: {exc.strerror}", file=sys.stderr)
            return 1
        print(f"{args.check}: {'is' if same else 'is not'} what this tree builds")
        return 0 if same else 1
    write(args.output, data)
    print(f"{args.output}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
