"""Say what a LiteLLM configuration holds, and give its model_list the entries that it lacks.

This runs in LiteLLM's own Python, which has PyYAML: what is read here is what LiteLLM will read.

JSON on stdin: text (of the file), wanted ([[model_name, model], ...]; empty only to read).
JSON on stdout:
    entries       model_name -> model, references (the NAMEs of os.environ/NAME), has_key, has_base;
                  null where the file cannot be read
    environment   names that the file sets itself, under environment_variables
    added         the names that got an entry
    text          with those entries, only where there are some
    why           the file cannot be extended, "" where it can

The text gets one insertion and no other change. That is proven before it is said: old and new text
are parsed, and must be equal but for the new entries.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Dict, List, Sequence, Tuple

import yaml

KEY = "model_list"
OWN_KEY = re.compile(r"api_key|aws_|vertex_credentials|azure_ad|litellm_credential_name")
REFERENCE = "os.environ/"

Wanted = Sequence[Tuple[str, str]]              # (model_name, model)


class CannotExtendError(Exception):
    """The file stays as it is; the message says why."""


def read_config(text: str) -> Dict[Any, Any]:
    """The configuration as LiteLLM reads it. Errors: CannotExtendError."""
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        context = getattr(error, "context", None)
        if context and "single document" in context:
            problem = "several documents"
        raise CannotExtendError(f"LiteLLM's parser does not read it: {problem}") from None
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise CannotExtendError("it is no mapping of keys to values")
    return config


def model_list(config: Dict[Any, Any]) -> List[Any]:
    listed = config.get(KEY)
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise CannotExtendError(f"{KEY} is no list")
    return listed


def describe_entry(entry: Dict[Any, Any]) -> Dict[str, Any]:
    params = entry.get("litellm_params")
    if not isinstance(params, dict):
        params = {}
    texts = [value for value in params.values() if isinstance(value, str)]
    model = params.get("model")
    return {
        "model": model if isinstance(model, str) else "",
        "references": [x[len(REFERENCE):] for x in texts if x.startswith(REFERENCE)],
        "has_key": any(OWN_KEY.match(str(name)) for name in params),
        "has_base": "api_base" in params,
    }


def describe_entries(config: Dict[Any, Any]) -> Dict[str, Dict[str, Any]]:
    """The first entry of each name: LiteLLM takes more of one name for more of the same."""
    entries: Dict[str, Dict[str, Any]] = {}
    for entry in model_list(config):
        if isinstance(entry, dict) and isinstance(entry.get("model_name"), str):
            entries.setdefault(entry["model_name"], describe_entry(entry))
    return entries


def scalar(text: str) -> str:
    """A YAML scalar: plain where that is safe, else JSON's double quotes, which YAML shares."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9._/-]*", text)
    if plain and isinstance(yaml.safe_load(text), str):
        return text
    return json.dumps(text, ensure_ascii=False)


def block_lines(wanted: Wanted, column: int) -> List[str]:
    lines = []
    for name, model in wanted:
        lines += [f"- model_name: {scalar(name)}",
                  "  litellm_params:",
                  f"    model: {scalar(model)}"]
    return [" " * column + line for line in lines]


def stub(name: str, model: str) -> Dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": model}}


def next_line(text: str, at: int) -> int:
    """The offset of the line behind the one that the character before `at` is in."""
    if at and text[at - 1] == "\n":             # a block scalar ends behind its line break
        return at
    found = text.find("\n", at)
    return found + 1 if found >= 0 else len(text)


def put_lines(text: str, at: int, lines: Sequence[str]) -> str:
    """Put whole lines at an offset that next_line has given."""
    newline = "\r\n" if "\r\n" in text else "\n"
    added = newline.join(lines)
    before, behind = text[:at], text[at:]
    if before and not before.endswith("\n"):
        return before + newline + added + behind
    return before + added + newline + behind


def last_token_end(text: str, listed: yaml.SequenceNode, end: int) -> int:
    """The offset behind the list's last token before `end`.

    A node's own end will not do: an alias has the marks of its anchor, a block those of what
    follows.
    """
    start = listed.start_mark.index
    ends = [x.end_mark.index for x in yaml.scan(text) if start <= x.start_mark.index < end]
    return int(max(ends))


def put_in_brackets(text: str, listed: yaml.SequenceNode, wanted: Wanted) -> str:
    """Put entries before the closing bracket, as JSON: that is good in a file that is JSON, too."""
    at = listed.end_mark.index - 1
    added = ", ".join(json.dumps(stub(*one), ensure_ascii=False) for one in wanted)
    last = last_token_end(text, listed, at)
    behind = re.sub(r"#.*", "", text[last:at])
    if listed.value and "," not in behind and text[last - 1] != ",":
        added = ", " + added
    return text[:at] + added + text[at:]


def put_below(text: str, listed: yaml.SequenceNode, wanted: Wanted) -> str:
    """Put entries behind the last one of a list written with dashes."""
    first = listed.value[0].start_mark.index
    dashes = re.findall(r"^( *)-(?=\s)", text[:first], re.MULTILINE)
    if not dashes:
        raise CannotExtendError("its indentation is unclear")
    column = len(dashes[-1])
    at = next_line(text, last_token_end(text, listed, listed.end_mark.index))
    comment = re.compile(rf" {{{column + 1},}}#")
    while comment.match(text, at):              # it belongs to the last entry
        at = next_line(text, at + 1)
    return put_lines(text, at, block_lines(wanted, column))


def insert(text: str, wanted: Wanted) -> str:
    """The text with entries put in where they look right; not proven. Errors: CannotExtendError."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    found = [value for key, value in pairs if key.value == KEY]
    if len(found) > 1:
        raise CannotExtendError(f"{KEY} is there twice")
    if not found and pairs and root.flow_style:
        raise CannotExtendError(f"it is written in braces, and has no {KEY}")
    if not found:
        return put_lines(text, len(text), [f"{KEY}:", *block_lines(wanted, 2)])
    listed = found[0]
    if isinstance(listed, yaml.SequenceNode):
        if listed.flow_style:
            return put_in_brackets(text, listed, wanted)
        return put_below(text, listed, wanted)
    if listed.value or root.flow_style:
        raise CannotExtendError(f"{KEY} is no list")
    return put_lines(text, next_line(text, listed.end_mark.index), block_lines(wanted, 2))


def extend(text: str, config: Dict[Any, Any], wanted: Wanted) -> str:
    """The text with an entry for each of `wanted`, proven. Errors: CannotExtendError."""
    extended = insert(text, wanted)
    expected = {**config, KEY: [*model_list(config), *(stub(*one) for one in wanted)]}
    try:
        same = read_config(extended) == expected
    except RecursionError:
        same = False
    if not same:
        raise CannotExtendError("LiteLLM's parser would not read the new entries as meant")
    return extended


def answer(text: str, wanted: Wanted) -> Dict[str, Any]:
    """What main prints; see the top of this file."""
    said: Dict[str, Any] = {"entries": None, "environment": [], "added": [], "why": ""}
    try:
        config = read_config(text)
        said["entries"] = describe_entries(config)
        variables = config.get("environment_variables")
        if isinstance(variables, dict):
            said["environment"] = [str(name) for name in variables]
        missing = [(name, model) for name, model in wanted if name not in said["entries"]]
        if missing:
            said["text"] = extend(text, config, missing)
            said["added"] = [name for name, _ in missing]
    except CannotExtendError as error:
        said["why"] = str(error)
    return said


def main() -> int:
    asked = json.load(sys.stdin)
    json.dump(answer(asked["text"], [(name, model) for name, model in asked["wanted"]]), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
