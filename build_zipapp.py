#!/usr/bin/env python3
"""Build llmstack.pyz: the one file people copy to another machine.

    python3 build_zipapp.py [--output FILE]    build, print size and sha256
    python3 build_zipapp.py --check FILE       exit 1 unless FILE is what this tree builds

Reproducible: a fixed list of entries, fixed times and modes, the program compressed by code of our own (zlib's bytes
differ between its builds). `python -m zipapp` is not, and takes along whatever lies in the directory. What only readers need,
comments, docstrings, types and indentation, stays behind: nearly half of the program. Its lines keep their numbers,
so a traceback reads as from the source.
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
    """A program without comments, docstrings, types and deep indentation, every statement on the line it was on."""
    return _unindented(_unannotated(_uncommented(source)))


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.tokenize(io.BytesIO(source.encode()).readline))


def _uncommented(source: str) -> str:
    lines = source.split("\n")
    cuts = [(*token.start, *token.end, "") for token in _tokens(source)
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
    return "\n".join(lines)


def _unannotated(source: str) -> str:
    """Functions and variables without their types. Those of classes stay: NamedTuple makes its fields of them."""
    data = source.encode()
    lines = [0, *(match.end() for match in re.finditer(rb"\n", data))]
    tree = ast.parse(source)
    fields = {id(field) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for field in node.body}
    cuts: list[tuple[int, int]] = []
    for node in ast.walk(tree):
        kind = getattr(node, "returns" if isinstance(node, ast.FunctionDef) else "annotation", None)
        if kind is None or (id(node) in fields and isinstance(node, ast.AnnAssign)):
            continue
        before = data[:lines[kind.lineno - 1] + kind.col_offset].rstrip()
        sign = b"->" if isinstance(node, ast.FunctionDef) else b":"
        end = lines[kind.end_lineno - 1] + kind.end_col_offset
        start = len(before[:-len(sign)].rstrip())
        bare_name = isinstance(node, ast.AnnAssign) and node.value is None
        if before.endswith(sign) and not bare_name and b"\n" not in data[start:end]:
            cuts.append((start, end))
    for start, end in sorted(cuts, reverse=True):
        data = data[:start] + data[end:]
    return data.decode()


def _unindented(source: str) -> str:
    """One blank a level, none before the lines that continue a statement; lines inside a string stay as they are."""
    lines, depth, fresh, inside = source.split("\n"), 0, True, 0
    starts: dict[int, int] = {}
    text: set[int] = set()
    for token in _tokens(source)[1:]:
        name = tokenize.tok_name[token.type]
        depth += (name == "INDENT") - (name == "DEDENT")
        if fresh and name not in ("INDENT", "DEDENT", "NL", "COMMENT"):
            starts[token.start[0]] = depth
            fresh = False
        if name == "NEWLINE":
            fresh = True
        if name == "FSTRING_START":             # Python 3.12 and newer take f-strings apart
            inside = inside or token.start[0]
        if name == "STRING" or (name == "FSTRING_END" and inside):
            text.update(range((inside or token.start[0]) + 1, token.end[0] + 1))
            inside = 0
    return "\n".join(line if number in text else " " * starts.get(number, 0) + line.lstrip()
                     for number, line in enumerate(lines, 1))


# RFC 1951, 3.2.5: (the least length or distance, its symbol, extra bits), and how many earlier places are looked at.
CHAIN = 24
LENGTHS = [(n, 257 + i, bits) for i, (n, bits) in enumerate(zip(
    [*range(3, 11), *range(11, 19, 2), *range(19, 35, 4), *range(35, 67, 8), *range(67, 131, 16), *range(131, 258, 32), 258],
    [0] * 8 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4 + [0]))]
DISTANCES = [(1 + i, i, 0) for i in range(4)] + [(1 + (2 + i % 2 << i // 2 - 1), i, i // 2 - 1) for i in range(4, 30)]


class Deflate:
    """A compressor for zipfile whose bytes do not depend on a zlib build: LZ77 and RFC 1951's fixed codes, in 50 lines.

    What reads a zip reads it. 333 kB of program become 122; zlib would make 104 of them.
    """

    def __init__(self) -> None:
        self._data = b""

    def compress(self, data: bytes) -> bytes:
        self._data += data
        return b""

    def flush(self) -> bytes:
        value, count, out = 3, 3, bytearray()           # the last block, with fixed codes

        def put(bits: int, width: int) -> None:
            nonlocal value, count
            value |= bits << count
            count += width
            while count >= 8:
                out.append(value & 255)
                value >>= 8
                count -= 8

        def symbol(number: int) -> None:
            code, width = ((0x30 + number, 8) if number < 144 else (0x190 + number - 144, 9) if number < 256 else
                           (number - 256, 7) if number < 280 else (0xC0 + number - 280, 8))
            put(int(f"{code:0{width}b}"[::-1], 2), width)

        data, places, at = self._data, {}, 0            # type: tuple[bytes, dict[bytes, list[int]], int]
        while at < len(data):
            length, distance = self._match(data, at, places)
            if length and self._match(data, at + 1, places)[0] > length:
                length = 0                              # the next place has a longer one
            if length:
                for table, wanted in ((LENGTHS, length), (DISTANCES, distance)):
                    low, number, bits = max(row for row in table if row[0] <= wanted)
                    if table is LENGTHS:
                        symbol(number)
                    else:
                        put(int(f"{number:05b}"[::-1], 2), 5)
                    put(wanted - low, bits)
            else:
                symbol(data[at])
            for place in range(at, at + (length or 1)):
                places.setdefault(data[place:place + 3], []).append(place)
            at += length or 1
        symbol(256)
        put(0, 7)
        return bytes(out)

    def _match(self, data: bytes, at: int, places: dict[bytes, list[int]]) -> tuple[int, int]:
        """(length, distance) of the longest earlier text that goes on as `at` does, (0, 0) for none."""
        best = (0, 0)
        for place in reversed(places.get(data[at:at + 3], [])[-CHAIN:]):
            if at - place > 32_768:
                break
            length = best[0]
            if length and data[place:place + length + 1] != data[at:at + length + 1]:
                continue
            length = max(length, 3)
            while length < 258 and at + length < len(data) and data[place + length] == data[at + length]:
                length += 1
            best = max(best, (length, at - place), key=lambda match: match[0])
        return best if len(data) - at >= 3 else (0, 0)


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
    setattr(zipfile, "_get_compressor", lambda kind, level=None: Deflate() if kind == zipfile.ZIP_DEFLATED else None)  # noqa: B010
    with zipfile.ZipFile(out, "a", zipfile.ZIP_STORED) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3                     # unix, wherever it is built
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED if name == "llmstack.py" else zipfile.ZIP_STORED
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
