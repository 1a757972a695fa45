"""Point a client (Claude Code, Codex, aider, ...) at this stack.

Without a client: which there are, which are on this machine, and which are connected.

What a client reads is put into its own file, beside what is there: the file as it was is kept
under another name, and --undo takes out what was put in and nothing else. Where a client has no
such file, what to click or to export is printed. No key is written into any file.

examples:
  llmstack connect                          # the list
  llmstack connect claude                   # Claude Code asks this stack from now on
  llmstack connect claude --print           # only show what would be written
  llmstack connect claude --undo            # as it was
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

# What a client is told stands in share/clients/NAME.json, in these keys:
#   title, tried, program, signs     its name; versions; what is on PATH; what lies in a home
#   files   where and what to write: path (the first whose variable is set), format, and what to put
#   say     what is left for its user to do
#   run     the environment and the arguments of `run-with`
# In all texts <url>, <auto>, <fast>, <context>, <output> and so on are replaced. What names
# <model> in a list's element or in a member's name is repeated for each model, and a list
# of lines within lines is, too. "?key:" and "?nokey:" stand before what is only for a router
# that wants a key, or wants none. Of an "env" all values are written as text.
CLIENTS = ("claude", "codex", "opencode", "aider", "continue", "cursor", "zed", "qwen", "crush",
           "pi", "cline", "roo", "goose", "llm", "open-webui", "vscode", "jetbrains")
RECORD = "connect.json"                         # in the data directory: what was put in where
FIRST_LINE = "# >>> llmstack connect >>>"
LAST_LINE = "# <<< llmstack connect <<<"
NO_KEY = "none"                                 # clients insist on some text where a key would be


# ---- what a client is told

class Facts(NamedTuple):
    """What the texts in share/clients refer to."""

    values: Dict[str, Any]                      # name -> text or number
    models: Tuple[Dict[str, Any], ...]          # the same, for each model; auto first
    wants_key: bool

    def of_models(self) -> Iterator[Facts]:
        """The facts of each model: <context> is its own there."""
        for model in self.models:
            yield self._replace(values={**self.values, **model})


def find_router(llmstack: Any, url: str = "") -> Tuple[str, Any]:
    """(URL without /v1, Config) of the router that clients shall ask.

    A project's own, else the one that answers on this machine. Errors: UserError, also for a
    project that is not trusted: what it names would stand in files of the whole account.
    """
    places = llmstack.find_places(os.environ)
    named = url or os.environ.get("LLMSTACK_REMOTE_URL", "").strip()
    named = named or llmstack.trusted_url(places)
    if named:
        remote = llmstack.fetch_remote(named, os.environ)
        return remote.url, remote.config
    if not os.path.exists(places.models_ini):
        usual = llmstack.base_url(llmstack.ROUTER_HOST, llmstack.ROUTER_PORT)
        try:
            return usual, llmstack.fetch_remote(usual, os.environ).config
        except llmstack.UserError:              # nothing runs: what `start` would bring up here
            pass
    llmstack.check_run_trust(places)
    config = llmstack.planned_config(places, llmstack.warn)
    host, port = llmstack.router_address(places, config)
    address = llmstack.base_url(host, port)
    if not llmstack.is_loopback(llmstack.connectable(host)):
        raise llmstack.UserError(f"this project's router is at {address}, beyond this machine",
                                 f"where that is what you want, say so: --url {address}")
    return address, config


def _limits(limit: Mapping[str, int]) -> Dict[str, int]:
    """What the prompt, the answer and both may have, in tokens."""
    context = limit["context"]
    output = limit["output"]
    return {"context": context, "output": output, "input": context - output}


def find_facts(llmstack: Any, url: str, config: Any) -> Facts:
    """What clients are told of the router at `url`. Its limits are those that opencode gets."""
    told = json.loads(llmstack.render_opencode_json(config, url, ""))
    models: List[Dict[str, Any]] = []
    for name, entry in told["provider"][llmstack.PROVIDER]["models"].items():
        models.append({
            "model": name,
            "title": entry["name"],
            "tools": entry["tool_call"],
            "reasoning": entry.get("reasoning", False),
            **_limits(entry["limit"]),
        })
    silence_s = llmstack.LOAD_TIMEOUT_S + 300   # a cold load, then a long prompt
    values = {
        "url": url,
        "auto": told["model"].partition("/")[2],
        "fast": told["small_model"].partition("/")[2],
        "silence_s": silence_s,
        "silence_ms": silence_s * 1000,
        "no_key": NO_KEY,
        **{name: models[0][name] for name in ("context", "output", "input")},
    }
    return Facts(values, tuple(models), bool(llmstack.api_key(os.environ)))


def load_client(llmstack: Any, name: str) -> Dict[str, Any]:
    """The data of a client. Errors: UserError."""
    if name not in CLIENTS:
        raise llmstack.UserError(f"no client is called {name}", "one of " + ", ".join(CLIENTS), 2)
    data: Dict[str, Any] = json.loads(llmstack.read_shared_text(f"clients/{name}.json"))
    return data


def _is_meant(text: str, facts: Facts) -> Tuple[bool, str]:
    """(whether it holds for this router, the text without its condition)."""
    for mark, wanted in (("?key:", True), ("?nokey:", False)):
        if text.startswith(mark):
            return facts.wants_key == wanted, text[len(mark):]
    return True, text


def fill(text: str, values: Mapping[str, Any]) -> Any:
    """`text` with its <names> replaced; a text that is one name alone becomes its value."""
    if text.startswith("<") and text[1:-1] in values:
        return values[text[1:-1]]
    return re.sub(r"<([a-z_]+)>", lambda m: str(values.get(m.group(1), m.group())), text)


def _repeated(text: str, facts: Facts) -> Iterator[Facts]:
    """The facts of each model, where `text` names one; else those there are."""
    if "<model>" not in text or "model" in facts.values:
        yield facts
        return
    yield from facts.of_models()


def expand(value: Any, facts: Facts) -> Any:
    """A JSON value of share/clients as it is for this router."""
    if isinstance(value, str):
        return fill(value, facts.values)
    if isinstance(value, dict):
        return _expand_members(value, facts)
    if isinstance(value, list):
        items: List[Any] = []
        for item in value:
            items += [expand(item, each) for each in _repeated(json.dumps(item), facts)]
        return items
    return value


def _expand_members(value: Mapping[str, Any], facts: Facts) -> Dict[str, Any]:
    members: Dict[str, Any] = {}
    for key, member in value.items():
        meant, name = _is_meant(key, facts)
        if not meant:
            continue
        for each in _repeated(name, facts):
            members[fill(name, each.values)] = expand(member, each)
    if "env" in members:                        # variables are text, and clients insist on it
        members["env"] = {name: str(text) for name, text in members["env"].items()}
    return members


def expand_lines(lines: Sequence[Any], facts: Facts) -> List[str]:
    """Lines of share/clients as they are for this router."""
    found: List[str] = []
    for line in lines:
        if isinstance(line, list):
            for each in facts.of_models():
                found += expand_lines(line, each)
            continue
        meant, text = _is_meant(line, facts)
        if meant:
            found.append(str(fill(text, facts.values)))
    return found


# ---- JSON, also with comments, in which no byte moves that is not ours

class Node(NamedTuple):
    """A value in a JSON text, and where it stands."""

    kind: str                                   # object | array | scalar
    start: int
    end: int
    members: Tuple[Tuple[str, int, Any], ...]   # (name, where it begins, Node); no name in arrays


_GAP = re.compile(r"(?:[\s\ufeff]|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_SCALAR = re.compile(r'"(?:[^"\\\n]|\\.)*"|[^\s,:\[\]{}"/]+')


class _Reader:
    """Reads a JSON text with comments and trailing commas. Errors: ValueError."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def next(self) -> str:
        """The character that comes next, behind white space and comments."""
        gap = _GAP.match(self.text, self.at)
        assert gap is not None                  # it matches nothing at all, too
        self.at = gap.end()
        return self.text[self.at:self.at + 1]

    def scalar(self) -> Node:
        self.next()
        match = _SCALAR.match(self.text, self.at)
        if match is None:
            line = self.text.count("\n", 0, self.at) + 1
            raise ValueError(f"line {line} is no JSON")
        json.loads(match.group())
        self.at = match.end()
        return Node("scalar", match.start(), match.end(), ())

    def value(self) -> Node:
        opening = self.next()
        if opening not in ("{", "["):
            return self.scalar()
        start = self.at
        closing = {"{": "}", "[": "]"}[opening]
        self.at += 1
        members: List[Tuple[str, int, Node]] = []
        while self.next() != closing:
            begin = self.at
            name = ""
            if opening == "{":
                key = self.scalar()
                name = str(json.loads(self.text[key.start:key.end]))
                self.expect(":")
            members.append((name, begin, self.value()))
            if self.next() != closing:
                self.expect(",")
        self.at += 1
        kind = {"{": "object", "[": "array"}[opening]
        return Node(kind, start, self.at, tuple(members))

    def expect(self, character: str) -> None:
        if self.next() != character:
            line = self.text.count("\n", 0, self.at) + 1
            raise ValueError(f"line {line} lacks a {character!r}")
        self.at += 1


def read_json(text: str) -> Node:
    """The tree of a JSON text, which is to be one object. Errors: ValueError."""
    reader = _Reader(text)
    try:
        node = reader.value()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if node.kind != "object" or reader.next():
        raise ValueError("it is not one object")
    return node


def find_node(node: Node, path: Sequence[str]) -> Optional[Node]:
    """What stands at a path of names, None for nothing. Of a name that is there twice the last."""
    for name in path:
        found = [value for key, _, value in node.members if key == name]
        if node.kind != "object" or not found:
            return None
        node = found[-1]
    return node


def node_value(text: str, node: Node) -> Any:
    """The value itself."""
    if node.kind == "object":
        return {name: node_value(text, value) for name, _, value in node.members}
    if node.kind == "array":
        return [node_value(text, value) for _, _, value in node.members]
    return json.loads(text[node.start:node.end])


def _line_indent(text: str, at: int) -> str:
    """The white space that the line around `at` begins with."""
    line = text[text.rfind("\n", 0, at) + 1:]
    return line[:len(line) - len(line.lstrip(" \t"))]


def _insert(text: str, node: Node, name: str, value: Any) -> str:
    """`text` with a member put first into an object, or, without a name, into an array."""
    newline = "\r\n" if "\r\n" in text else "\n"
    outer = _line_indent(text, node.start)
    inner = outer + "  "
    if node.members and "\n" in text[node.start:node.members[0][1]]:
        inner = _line_indent(text, node.members[0][1])
    rendered = json.dumps(value, indent=2, ensure_ascii=False)
    if name:
        rendered = f"{json.dumps(name, ensure_ascii=False)}: {rendered}"
    added = newline + inner + rendered.replace("\n", newline + inner)
    if node.members:
        added += ","
    else:
        added += newline + outer
    return text[:node.start + 1] + added + text[node.start + 1:]


def _remove(text: str, node: Node, index: int) -> str:
    """`text` without a member: from behind what stands before it up to and with its comma."""
    _, begin, value = node.members[index]
    start = len(text[:begin].rstrip())
    end = value.end
    comma = re.compile(r"\s*,").match(text, end)
    if comma:
        end = comma.end()
    elif text[start - 1] == ",":
        start -= 1
    if len(node.members) == 1 and not text[end:node.end - 1].strip():
        end = node.end - 1                      # nothing is left: no empty line, either
    return text[:start] + text[end:]


class Put(NamedTuple):
    """One thing that was put into a JSON file."""

    path: Tuple[str, ...]
    value: Any
    old: Optional[str]                          # the text that stood there instead
    kind: str                                   # value | item of the array | made: a container


def _leaves(value: Any, path: Tuple[str, ...] = ()) -> Iterator[Tuple[Tuple[str, ...], Any]]:
    """(path, value) of all that is no object."""
    if isinstance(value, dict):
        for name, member in value.items():
            yield from _leaves(member, (*path, name))
    else:
        yield path, value


def _make(text: str, path: Tuple[str, ...], empty: Any) -> Tuple[str, List[Put]]:
    """Put an empty object or array where there is nothing."""
    root = read_json(text)
    inside = find_node(root, path[:-1])
    if inside is None or find_node(root, path) is not None:
        return text, []
    return _insert(text, inside, path[-1], empty), [Put(path, empty, None, "made")]


def _put_items(text: str, path: Tuple[str, ...], items: List[Any]) -> Tuple[str, List[Put]]:
    puts = []
    for item in reversed(items):
        there = find_node(read_json(text), path)
        if there is None or there.kind != "array":
            raise ValueError(f"{'.'.join(path)} is no list")
        if item not in node_value(text, there):
            text = _insert(text, there, "", item)
            puts.append(Put(path, item, None, "item"))
    return text, puts


def _put_leaf(text: str, path: Tuple[str, ...], value: Any) -> Tuple[str, List[Put]]:
    """Put one value in, whose objects are there. Errors: ValueError."""
    root = read_json(text)
    inside = find_node(root, path[:-1])
    there = find_node(root, path)
    if inside is None or inside.kind != "object":
        raise ValueError(f"{'.'.join(path[:-1])} is no object")
    if isinstance(value, list):
        return _put_items(text, path, value)
    if there is None:
        return _insert(text, inside, path[-1], value), [Put(path, value, None, "value")]
    if node_value(text, there) == value:
        return text, []
    if there.kind != "scalar":
        raise ValueError(f"{'.'.join(path)} is no plain value")
    old = text[there.start:there.end]
    text = text[:there.start] + json.dumps(value, ensure_ascii=False) + text[there.end:]
    return text, [Put(path, value, old, "value")]


def put_json(text: str, wanted: Dict[str, Any]) -> Tuple[str, List[Put]]:
    """(`text` with all of `wanted` in it, what was put in). Errors: ValueError.

    A value that stands in a wanted one's place is replaced and kept, an array only added to.
    """
    puts: List[Put] = []
    # Each goes in before what is there, so the last goes in first.
    for path, value in reversed(list(_leaves(wanted))):
        for depth in range(1, len(path)):
            text, made = _make(text, path[:depth], {})
            puts += made
        if isinstance(value, list):
            text, made = _make(text, path, [])
            puts += made
        text, added = _put_leaf(text, path, value)
        puts += added
    return text, puts


def _take_out(text: str, put: Put) -> Optional[str]:
    """`text` without one thing that was put in, None where it has been changed since."""
    root = read_json(text)
    inside = find_node(root, put.path[:-1])
    there = find_node(root, put.path)
    if inside is None or there is None:         # its user has taken it out
        return text
    if put.kind == "item":
        values = [node_value(text, value) for _, _, value in there.members]
        if put.value not in values:
            return None
        return _remove(text, there, values.index(put.value))
    if node_value(text, there) != put.value:
        return None
    if put.old is not None:
        return text[:there.start] + put.old + text[there.end:]
    names = [name for name, _, _ in inside.members]
    return _remove(text, inside, names.index(put.path[-1]))


def take_out_json(text: str, puts: Sequence[Put]) -> Tuple[str, List[str]]:
    """(`text` without what was put in, what stays because it was changed). Errors: ValueError."""
    changed: List[str] = []
    made = [put for put in reversed(puts) if put.kind == "made"]
    for put in [put for put in puts if put.kind != "made"] + made:
        without = _take_out(text, put)
        if without is not None:
            text = without
        elif put.kind != "made":                # an object may have got other members
            changed.append(".".join(put.path))
    return text, list(dict.fromkeys(changed))


# ---- YAML and TOML: lines between two marks, where the file is plain enough to be sure

def _block(lines: Sequence[str], newline: str) -> str:
    return newline.join([FIRST_LINE, *lines, LAST_LINE, ""])


def _behind(text: str, block: str, newline: str) -> str:
    """`text` with the block at its end."""
    if not text.endswith("\n"):
        text += newline
    return text + block


def _top_lines(text: str) -> List[str]:
    """The lines at the left edge that say something."""
    return [line for line in text.lstrip("\ufeff").splitlines() if re.match(r"[^\s#]", line)]


def _check_top_level(text: str, lines: Sequence[str]) -> None:
    """Errors: ValueError unless `lines` can stand behind `text`, a plain YAML mapping or list."""
    theirs = _top_lines(text)
    if theirs[:1] == ["---"]:
        del theirs[0]
    names = {line.split(":")[0] for line in lines}
    is_list = lines[0].startswith("-")
    if theirs and is_list != bool(re.match(r"-\s", theirs[0])):
        raise ValueError("it is a list, or should be one")
    for line in theirs:
        name = re.match(r"([\w.-]+)\s*:(?:\s|$)", line)
        is_item = re.match(r"-(?:\s|$)", line)
        if not is_item and (is_list or not name):
            raise ValueError(f"its line `{line.strip()[:40]}` is not plain enough to be sure")
        if name and name.group(1) in names:
            raise ValueError(f"it sets {name.group(1)} itself")


def _put_under(text: str, lines: Sequence[str], under: str, newline: str) -> Tuple[str, str]:
    """The lines as first items of the list called `under`. Errors: ValueError."""
    _check_top_level(text, ["a: b"])
    if not re.search(rf"^{under}\s*:", text, re.MULTILINE):
        block = _block([under + ":", *lines], newline)
        return _behind(text, block, newline), block
    gap = r"[ ]*(?:#.*)?\r?\n"
    first = re.search(rf"^{under}:{gap}(?=(?:{gap})*([ ]*)- )", text, re.MULTILINE)
    if first is None:
        raise ValueError(f"its list {under} is not plain enough to be sure")
    own = len(lines[0]) - len(lines[0].lstrip())
    block = _block([first.group(1) + line[own:] for line in lines], newline)
    return text[:first.end()] + block + text[first.end():], block


def whole_lines(lines: Sequence[str], spec: Mapping[str, Any]) -> List[str]:
    """All lines of a file that has no others."""
    whole = list(spec.get("head", ()))
    if "under" in spec:
        whole.append(spec["under"] + ":")
    return [*whole, *lines]


def put_lines(text: str, lines: Sequence[str], spec: Mapping[str, Any]) -> Tuple[str, str]:
    """(`text` with the lines between marks, what was put in). Errors: ValueError.

    `spec`: "whole" for a file that is all ours, "under" names the list that the lines are items of,
    "head" what a new file begins with.
    """
    under = spec.get("under", "")
    if not text.strip():
        block = _block(whole_lines(lines, spec), "\n")
        return block, block
    if spec.get("whole"):
        raise ValueError("there is one already that is not ours")
    newline = "\r\n" if "\r\n" in text else "\n"
    if under:
        return _put_under(text, lines, under, newline)
    _check_top_level(text, lines)
    block = _block(lines, newline)
    return _behind(text, block, newline), block


# ---- files of a client

class Edit(NamedTuple):
    """A file of a client, as it is without us, and as it will be."""

    path: str
    before: Optional[bytes]                     # None: there is no such file
    after: bytes
    backup: str                                 # the name under which `before` is kept
    puts: Tuple[Put, ...]                       # what goes into JSON...
    block: str                                  # ...or into other text


def client_path(spec: Mapping[str, Any], system: str) -> str:
    """Where a client's file is: the first of its places whose variable is set."""
    for place in spec.get("path_" + system, spec["path"]):
        variable = re.match(r"\$(\w+)", place)
        if variable and not os.environ.get(variable.group(1)):
            continue
        path = os.path.expanduser(os.path.expandvars(place))
        return str(os.path.realpath(path))
    raise KeyError("path")                      # each list ends with a place that has no variable


def system_name(llmstack: Any) -> str:
    """windows | mac | unix, as share/clients calls them."""
    if llmstack.IS_WINDOWS:
        return "windows"
    return "mac" if llmstack.IS_MAC else "unix"


def _puts_of(entry: Mapping[str, Any]) -> List[Put]:
    return [Put(tuple(path), value, old, kind) for path, value, old, kind in entry["puts"]]


def load_record(llmstack: Any) -> Dict[str, Any]:
    """client -> path -> what was put in. Errors: UserError."""
    path = os.path.join(llmstack.find_places(os.environ).data, RECORD)
    text = llmstack.read_text(path)
    try:
        record = json.loads(text or "{}")
        for files in record.values():
            for entry in files.values():
                _puts_of(entry)
                entry["block"], entry["backup"], entry["written"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise llmstack.UserError(f"{path} is broken", "move it away; what was connected stays"
                                 " so, and backups lie beside the clients' files") from None
    return dict(record)


def save_record(llmstack: Any, record: Mapping[str, Any]) -> None:
    path = os.path.join(llmstack.find_places(os.environ).data, RECORD)
    llmstack.write_atomic(path, json.dumps(record, indent=1) + "\n")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_file(llmstack: Any, path: str) -> Optional[bytes]:
    """A client's file, None where there is none. Errors: UserError."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        data.decode("utf-8")
        return data
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise llmstack.UserError(f"cannot read {path}: {exc.strerror}",
                                 llmstack.path_hint(exc)) from None
    except UnicodeDecodeError:
        raise llmstack.UserError(f"{path} is not UTF-8", "see --print for what to put in") from None


def _without_block(text: str, block: str) -> Tuple[bytes, List[str]]:
    if block in text:
        return text.replace(block, "", 1).encode("utf-8"), []
    changed = []
    if FIRST_LINE in text:
        changed.append("what is between the marks of llmstack")
    return text.encode("utf-8"), changed


def without_ours(llmstack: Any, path: str, entry: Mapping[str, Any]
                 ) -> Tuple[Optional[bytes], List[str]]:
    """(a connected file as it would be without us, what its user has changed of ours).

    A file nobody has touched is its backup, byte for byte. Errors: UserError.
    """
    data = read_file(llmstack, path)
    if data is None:
        return None, []
    if _digest(data) == entry["written"]:
        if not entry["backup"]:
            return None, []
        kept = read_file(llmstack, entry["backup"])
        if kept is not None:
            return kept, []
    text = data.decode("utf-8")
    if entry["block"]:
        return _without_block(text, entry["block"])
    try:
        text, changed = take_out_json(text, _puts_of(entry))
    except ValueError as exc:
        raise llmstack.UserError(f"{path}: {exc}", "mend it, then run this again") from None
    return text.encode("utf-8"), changed


def _free_backup(path: str) -> str:
    name = path + ".before-llmstack"
    number = 1
    while os.path.lexists(name):
        number += 1
        name = f"{path}.before-llmstack.{number}"
    return name


def render_put(spec: Mapping[str, Any], facts: Facts) -> str:
    """What is put into a file, for people."""
    if spec["format"] == "json":
        return json.dumps(expand(spec["put"], facts), indent=2, ensure_ascii=False)
    return "\n".join(whole_lines(expand_lines(spec["put"], facts), spec))


def plan_edit(llmstack: Any, spec: Mapping[str, Any], facts: Facts, entry: Any) -> Edit:
    """What to do to one file of a client. Errors: UserError, with the text to put in by hand."""
    path = client_path(spec, system_name(llmstack))
    before = read_file(llmstack, path)
    backup = ""
    if entry:
        before, _ = without_ours(llmstack, path, entry)
        backup = entry["backup"]
        if backup and read_file(llmstack, backup) != before:
            backup = ""
    if before is not None and not backup:
        backup = _free_backup(path)
    text = (before or b"").decode("utf-8")
    puts: List[Put] = []
    block = ""
    try:
        if spec["format"] == "json":
            if not text.strip():
                text = "{}\n"
            text, puts = put_json(text, expand(spec["put"], facts))
        else:
            text, block = put_lines(text, expand_lines(spec["put"], facts), spec)
    except ValueError as exc:
        raise llmstack.UserError(
            f"{path} is left as it is: {exc}",
            f"put this in yourself:\n{render_put(spec, facts)}") from None
    return Edit(path, before, text.encode("utf-8"), backup, tuple(puts), block)


def _mode_of(path: str) -> int:
    try:
        return os.stat(path).st_mode & 0o777
    except OSError:
        return 0o644


def write_edit(llmstack: Any, edit: Edit) -> Dict[str, Any]:
    """Write one file and its backup; what the record keeps of it. Errors: UserError."""
    mode = _mode_of(edit.path)
    if edit.before is not None and not os.path.lexists(edit.backup):
        llmstack.write_atomic(edit.backup, edit.before, mode)
    llmstack.write_atomic(edit.path, edit.after, mode)
    return {"backup": edit.backup, "written": _digest(edit.after), "block": edit.block,
            "puts": [list(put) for put in edit.puts]}


# ---- the command

def _write_files(llmstack: Any, name: str, client: Mapping[str, Any], facts: Facts) -> None:
    """All files of a client or, where one of them cannot be, none. Errors: UserError."""
    record = load_record(llmstack)
    known = record.get(name, {})
    edits = [plan_edit(llmstack, spec, facts, known.get(client_path(spec, system_name(llmstack))))
             for spec in client.get("files", ())]
    entries = {}
    for edit in edits:
        if edit.path in known and read_file(llmstack, edit.path) == edit.after:
            llmstack.say(f"Nothing to change: {edit.path} is as it should be.")
            entries[edit.path] = known[edit.path]
            continue
        entries[edit.path] = write_edit(llmstack, edit)
        llmstack.say(f"Written: {edit.path}")
        if edit.before is not None:
            llmstack.say(f"As it was: {edit.backup}")
    if entries:
        save_record(llmstack, {**record, name: {**known, **entries}})


def connect(llmstack: Any, name: str, url: str, show: bool) -> int:
    """Write what a client reads, or only show it. Errors: UserError."""
    client = load_client(llmstack, name)
    if "command" in client:
        command = list(client["command"])
        if url:
            command += ["--external", url]
        if show:
            command.append("--print")
        return int(llmstack.run_command(command))
    facts = find_facts(llmstack, *find_router(llmstack, url))
    system = system_name(llmstack)
    if show:
        for spec in client.get("files", ()):
            llmstack.say(f"into {client_path(spec, system)}:\n{render_put(spec, facts)}\n")
    else:
        _write_files(llmstack, name, client, facts)
    for line in expand_lines(client.get("say", ()), facts):
        llmstack.say(line)
    return 0


def _put_back(llmstack: Any, path: str, entry: Mapping[str, Any], data: Optional[bytes]) -> None:
    """Write a file without us, and drop a backup that is the same. Errors: UserError."""
    is_bare = data is None or data.strip() in (b"", b"{}")
    if is_bare and not entry["backup"]:
        if os.path.exists(path):
            os.unlink(path)
            llmstack.say(f"Removed: {path}, which was not there before")
        return
    if data is None:                            # its user has removed it
        return
    llmstack.write_atomic(path, data, _mode_of(path))
    llmstack.say(f"Taken out of {path}")
    kept = entry["backup"]
    if kept and read_file(llmstack, kept) == data:
        os.unlink(kept)
    elif kept and os.path.exists(kept):
        llmstack.say(f"The backup stays, for it differs: {kept}")


def undo(llmstack: Any, name: str) -> int:
    """Take out what was put in; 1 where its user has changed some of it. Errors: UserError."""
    client = load_client(llmstack, name)
    if "command" in client:
        raise llmstack.UserError(f"connect {name} writes into the project alone",
                                 "remove .llmstack/opencode.json", 2)
    record = load_record(llmstack)
    if name not in record:
        llmstack.say(f"{client['title']} is not connected: nothing to undo.")
        return 0
    stays: List[str] = []
    for path, entry in record[name].items():
        text, changed = without_ours(llmstack, path, entry)
        _put_back(llmstack, path, entry, text)
        stays += [f"{path}: {what} stays: it has been changed since" for what in changed]
    del record[name]
    save_record(llmstack, record)
    for line in stays:
        llmstack.warn(line)
    return 1 if stays else 0


def state_of(llmstack: Any, name: str, record: Mapping[str, Any]) -> str:
    """connected | changed | "": whether a client's files hold what was put in."""
    if name not in record:
        return ""
    for path, entry in record[name].items():
        try:
            data = read_file(llmstack, path)
            changed = without_ours(llmstack, path, entry)[1]
        except llmstack.UserError:              # it is no longer what its client can read, either
            return "changed"
        if data is None or changed:
            return "changed"
        if entry["block"] and entry["block"] not in data.decode("utf-8"):
            return "changed"
    return "connected"


def is_here(llmstack: Any, client: Mapping[str, Any]) -> bool:
    """Whether a client is on this machine, by its program or by what it left in the home."""
    program = client.get("program", "")
    if program and llmstack.find_program(program):
        return True
    return any(os.path.exists(os.path.expanduser(sign)) for sign in client.get("signs", ()))


def list_clients(llmstack: Any) -> int:
    """The clients: whether they are on this machine, whether they are connected."""
    record = load_record(llmstack)
    for name in CLIENTS:
        client = load_client(llmstack, name)
        here = ""
        if is_here(llmstack, client):
            here = "found"
        state = state_of(llmstack, name, record)
        llmstack.say(f"{name:<11} {client['title']:<19} {here:<6} {state}".rstrip())
    llmstack.say()
    llmstack.say("`llmstack connect CLIENT` connects one;"
                 " `llmstack run-with CLIENT` only starts it.")
    return 0


def main(argv: Sequence[str], llmstack: Any) -> int:
    """Run the command line. Errors: UserError."""
    parser = llmstack.extra_parser("connect", __doc__ or "")
    parser.add_argument("client", metavar="CLIENT", nargs="?", help=", ".join(CLIENTS))
    parser.add_argument("-n", "--print", action="store_true", help="show it and write nothing")
    parser.add_argument("--undo", action="store_true", help="take out what was put in")
    parser.add_argument("--url", metavar="URL", default="",
                        help="the router to ask (default: this project's, or this machine's)")
    args = parser.parse_args(list(argv))
    if args.client is None:
        return list_clients(llmstack)
    if args.undo:
        return undo(llmstack, args.client)
    return connect(llmstack, args.client, args.url, args.print)
