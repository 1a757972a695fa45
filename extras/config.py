"""Read and change models.ini, a value at a time or whole.

  get NAME          what is in effect: as written, else the default
  set NAME VALUE    change or add that one line, and no other byte
  edit              open it in $VISUAL or $EDITOR; what does not hold is not let in

NAME is a key of [DEFAULT] or [ROUTING], or TIER.KEY. What was trusted before stays trusted.

examples:
  llmstack config get code-fast.ctx_size
  llmstack config set router_port 10111
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import tempfile
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple


class Place(NamedTuple):
    """A key of models.ini and what is known of it."""

    section: str
    key: str
    option: Any


def known_names(config: Any, llmstack: Any) -> List[str]:
    tiers = [f"{tier.name}.{key}" for tier in config.tiers for key in llmstack.TIER_OPTIONS]
    return [*llmstack.DEFAULT_OPTIONS, *llmstack.ROUTING_OPTIONS, *tiers]


def find_place(name: str, config: Any, llmstack: Any) -> Place:
    """Where a NAME stands. Errors: UserError where there is no such key."""
    section, _, key = name.rpartition(".")
    tier = config.by_name(section) if section else None
    tables: Mapping[str, Any] = {"DEFAULT": llmstack.DEFAULT_OPTIONS,
                                 "ROUTING": llmstack.ROUTING_OPTIONS}
    if tier is not None:
        section, tables = tier.name, {tier.name: llmstack.TIER_OPTIONS}
    for heading, options in tables.items():
        if key in options and section in ("", heading):
            return Place(heading, key, options[key])
    unknown = llmstack.unknown_word(name, known_names(config, llmstack))
    hint = "a key of [DEFAULT] or [ROUTING], or TIER.KEY, such as router_port or code-fast.ctx_size"
    raise llmstack.UserError(f"models.ini knows no {unknown}", hint, 2)


def written(text: str, place: Place, llmstack: Any) -> Optional[Any]:
    """The line that has the key, None where none has."""
    lines = [line for line in llmstack.IniReader(text).keys_of(place.section)
             if line.key == place.key]
    return lines[-1] if lines else None


def in_effect(config: Any, place: Place) -> str:
    """The value of a key that is not written, as it would be."""
    record = config
    if place.section == "ROUTING":
        record = config.routing
    elif place.section != "DEFAULT":
        record = config.by_name(place.section)
    own = getattr(record, "settings", {})       # llama-server's keys
    value = own.get(place.key, getattr(record, place.option.field or place.key, ""))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)


def split_key(line: str) -> Tuple[str, str]:
    """A line up to and with its first = or :, and what follows."""
    at = min(line.index(char) for char in "=:" if char in line)
    return line[:at + 1], line[at + 1:]


def with_value(text: str, place: Place, value: str, llmstack: Any) -> str:
    """The text with this value of the key: one line changed or added, every other as it was."""
    lines = text.split("\n")
    line = written(text, place, llmstack)
    if line is not None:
        at = line.number - 1
        head, rest = split_key(lines[at])
        if line.value:
            before, after = rest.split(line.value, 1)
        else:
            before, after = " ", rest
        lines[at] = head + before + value + after
        return "\n".join(lines)
    end = "\r" if lines[0].endswith("\r") else ""
    new = f"{place.key} = {value}"
    inside = [line.number for line in llmstack.IniReader(text).sections.get(place.section, ())]
    if inside:
        last = inside[-1]
        if last == len(lines):                  # a file that ends without a newline
            lines[-1] += end
        else:
            new += end
        lines.insert(last, new)
        return "\n".join(lines)
    tail = "" if text.endswith("\n") else end + "\n"
    return f"{text}{tail}{end}\n[{place.section}]{end}\n{new}{end}\n"


def values_of(text: str, llmstack: Any) -> List[Tuple[str, str, str]]:
    """(section, key, value) of every key."""
    reader = llmstack.IniReader(text)
    lines = [line for section in reader.sections for line in reader.keys_of(section)]
    return [(line.section, line.key, line.value) for line in lines]


def check_only_change(old: str, new: str, place: Place, value: str, llmstack: Any) -> None:
    """The reader sees the new value and nothing else anew. Errors: UserError."""
    key = (place.section, place.key)
    others = [row for row in values_of(old, llmstack) if row[:2] != key]
    seen = values_of(new, llmstack)
    if (*key, value) not in seen or [row for row in seen if row[:2] != key] != others:
        raise llmstack.UserError(f"{value!r} is no value that one line can hold",
                                 "leave out line ends, and ; behind a blank", 2)


# ---- the file


def read_ini(places: Any, llmstack: Any) -> bytes:
    """The project's models.ini as it is. Errors: UserError."""
    try:
        return bytes(llmstack.read_regular(places.models_ini))
    except FileNotFoundError:
        raise llmstack.UserError(f"there is no {places.models_ini}",
                                 "`llmstack install` writes one") from None
    except OSError as exc:
        raise llmstack.UserError(f"cannot read {places.models_ini}: {exc.strerror}",
                                 llmstack.path_hint(exc)) from None


def write_ini(places: Any, data: bytes, llmstack: Any) -> None:
    """Put a models.ini that holds in the old one's place. Errors: UserError."""
    path = os.path.realpath(places.models_ini)
    trusted = llmstack.is_trusted(places, "run")
    llmstack.write_atomic(path, data, os.stat(path).st_mode & 0o777)
    if trusted:
        llmstack.trust_project(places, "run")
    llmstack.say(f"Wrote {path}")
    if llmstack.running_record(places):
        llmstack.say("It takes effect with `llmstack restart`; [ROUTING] with `llmstack reload`.")


def get_value(places: Any, name: str, llmstack: Any) -> int:
    config = llmstack.planned_config(places)
    place = find_place(name, config, llmstack)
    text = ""
    if os.path.exists(places.models_ini):
        text = llmstack.decode_models_ini(read_ini(places, llmstack))
    line = written(text, place, llmstack)
    llmstack.say(line.value if line is not None else in_effect(config, place))
    return 0


def set_value(places: Any, name: str, value: str, llmstack: Any) -> int:
    data = read_ini(places, llmstack)
    bom = b"\xef\xbb\xbf" if data.startswith(b"\xef\xbb\xbf") else b""
    text = llmstack.decode_models_ini(data, places.models_ini)
    config, _ = llmstack.parse_models_ini(text, places.models_ini)
    place = find_place(name, config, llmstack)
    new = with_value(text, place, value.strip(), llmstack)
    llmstack.parse_models_ini(new, places.models_ini)
    check_only_change(text, new, place, value.strip(), llmstack)
    if new == text:
        llmstack.say(f"{name} is {value.strip()} already.")
        return 0
    write_ini(places, bom + new.encode(), llmstack)
    return 0


def editor(llmstack: Any) -> List[str]:
    """The user's. Errors: UserError where its setting is no command line."""
    setting = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        words = shlex.split(setting, posix=not llmstack.IS_WINDOWS)
    except ValueError:
        raise llmstack.UserError(f"the editor {setting!r} is no command line",
                                 "correct VISUAL or EDITOR", 2) from None
    return words or ["notepad" if llmstack.IS_WINDOWS else "vi"]


def run_editor(command: Sequence[str], path: str, llmstack: Any) -> None:
    try:
        code = subprocess.call(list(command))
    except OSError as exc:
        os.unlink(path)
        raise llmstack.UserError(f"cannot run {command[0]}: {exc.strerror}",
                                 "name your editor in VISUAL or EDITOR") from None
    if code:
        raise llmstack.UserError(f"{command[0]} has failed, with exit code {code}",
                                 f"models.ini is as it was, your edit in {path}")


def edit(places: Any, llmstack: Any) -> int:
    """Edit a copy until it holds. Errors: UserError; the copy stays where it does not."""
    old = read_ini(places, llmstack)
    handle, path = tempfile.mkstemp(suffix=".ini", prefix="models-", dir=places.state)
    with os.fdopen(handle, "wb") as file:
        file.write(old)
    while True:
        run_editor([*editor(llmstack), path], path, llmstack)
        with open(path, "rb") as file:
            new = file.read()
        try:
            llmstack.parse_models_ini(llmstack.decode_models_ini(new))
            break
        except llmstack.ConfigError as exc:
            for problem in exc.problems:
                llmstack.say(problem)
            if not llmstack.ask_person("Edit it again (y/n)? "):
                raise llmstack.UserError(
                    "models.ini is as it was", f"your edit is in {path}", 2) from None
    if read_ini(places, llmstack) != old:
        raise llmstack.UserError("models.ini has been changed by somebody else meanwhile",
                                 f"your edit is in {path}")
    if new == old:
        llmstack.say("Nothing has changed.")
    else:
        write_ini(places, new, llmstack)
    os.unlink(path)
    return 0


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("config", __doc__)
    parser.add_argument("action", choices=["get", "set", "edit"])
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.usage = "llmstack config {get,set,edit} [NAME] [VALUE]"
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    wanted = {"get": 1, "set": 2, "edit": 0}[args.action]
    if len(args.words) != wanted:
        words = ("nothing", "a NAME", "a NAME and a VALUE")[wanted]
        parser.error(f"{args.action} takes {words}")
    if args.action == "get":
        return get_value(places, args.words[0], llmstack)
    if args.action == "set":
        return set_value(places, args.words[0], args.words[1], llmstack)
    return edit(places, llmstack)
