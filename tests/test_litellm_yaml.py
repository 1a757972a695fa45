"""What LiteLLM's own parser is asked of litellm_config.yaml: its entries, and an insertion that is proven."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

import llmstack
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "share" / "guests"))

import litellm_yaml

WANTED = [("code-ultra", "anthropic/claude-opus-4-20250514"), ("code-fast_next", "bedrock/eu.anthropic.claude-v2:0")]

MERGED = {
    "seed": llmstack.read_shared_text("templates/litellm_config.yaml"),
    "empty": "",
    "only comments": "# nothing\n",
    "no final newline": "litellm_settings:\n  drop_params: true",
    "block": "model_list:\n  - model_name: a\n    litellm_params:\n      model: x/y\n      api_key: os.environ/FOO # c\n"
             "\n# next\ng: {}\n",
    "block at the margin": "model_list:\n- model_name: a\n  litellm_params: {model: x/y}\n# c\n\ngeneral_settings:\n  a: 1\n",
    "wide, unfinished": "model_list:\n    -   model_name: 'a'\n        litellm_params:\n            model: \"x/y\"",
    "CRLF": "model_list:\r\n  - model_name: a\r\n    litellm_params:\r\n      model: x/y\r\nfoo: 1\r\n",
    "BOM": "\ufeffmodel_list:\n  - model_name: a\n    litellm_params: {model: x/y}\n",
    "brackets": "model_list: [{model_name: a, litellm_params: {model: x/y}}]\nb: 1\n",
    "empty brackets": "model_list: []\nb: 1\n",
    "brackets over lines": "model_list: [\n  {model_name: a, litellm_params: {model: x/y}}, # t ]\n"
                           "  {\"model_name\":\"b #\", 'litellm_params':{\"model\":\"x/y ]\"}},\n]\nb: 1\n",
    "brackets below": "model_list:\n  [\n  {model_name: a, litellm_params: {model: x/y}}\n  # tail ]\n  ]\nb: 1\n",
    "brackets, no comma": "model_list: [\n{model_name: a, litellm_params: {model: q}}\n]\n",
    "anchors": "x: &d\n  model: x/y\nmodel_list: &m\n  - model_name: a\n    litellm_params: *d\n  - model_name: b\n"
               "    litellm_params:\n      <<: *d\n      api_base: http://x:1/v1\n",
    "a scalar that looks like entries": "model_list:\n  - model_name: a\n    litellm_params: {model: x/y}\n    d: |\n"
                                        "      text: it's \"not\n        # no comment\n      model_name: code-ultra\n\n\nz: 1\n",
    "one document": "---\nmodel_list:\n  - model_name: a\n    litellm_params: {model: x/y}\n",
    "there already": "model_list:\n  - litellm_params: {model: x/y}\n    model_name: code-ultra\n",
    "there, quoted and below": "model_list:\n  - litellm_params: {model: x/y}\n    model_name: \"code-ultra\" # c\n"
                               "  - model_name:\n      code-fast_next\n    litellm_params: {model: q}\n",
    "switched off": "model_list:\n  # - model_name: code-ultra\n  - model_name: z\n    litellm_params: {model: q}\n"
                    "  # - model_name: b\n",
    "apostrophes": "d: don't # it's\nmodel_list:\n  - model_name: a\n    litellm_params: {model: q}\n",
    "quoted key": "\"model_list\" :\n  - model_name: a\n    litellm_params: {model: q}\n",
    "no value": "model_list:\n\n# c\nfoo: 1\n",
    "folded, nested lists": "x: >-\n  a\n  b: c\nmodel_list:\n- model_name: a\n  litellm_params: {model: q}\n"
                            "  info:\n  - 1\n  - 2\n",
    "blank lines behind": "model_list:\n  - model_name: a\n    litellm_params:\n      model: q\n\n\n",
    "keeps its newlines": "model_list:\n  - model_name: a\n    d: |+\n      text\n\n\nz: 1\n",
    "keeps its newlines at the end": "model_list:\n  - model_name: a\n    d: |+\n      text\n\n",
    "strips the newline that is not there": "model_list:\n  - model_name: a\n    d: |-\n      text",
    "ends in an alias": "x: &x {a: 1}\nmodel_list:\n- model_name: a\n  d: *x",
    "ends in nothing": "model_list:\n- model_name: a\n  d:\n-\n",
    "merged params": "x: &x {api_key: k}\nmodel_list:\n- model_name: a\n  litellm_params:\n    <<: *x\n    model: x/y\n",
    "JSON": '{"model_list": [{"model_name": "a", "litellm_params": {"model": "x/y"}}], "b": 1}\n',
    "JSON without entries": '{"model_list": []}\n',
    "quotes over lines": "a: \"x\n  y\"\nmodel_list: []\n",
    "a trailing comma and a note": "model_list: [\n  {model_name: a}, # , \n]\n",
    "dashes alone": "model_list:\n  -\n    model_name: a\n  -\n    # note\n    model_name: b\nz: 1\n",
    "tags and anchors": "model_list: !!seq &m\n  # note\n  - &a !!map\n    model_name: a\n  - *a\nz: 1\n",
    "name from an anchor": "n: &n code-ultra\nmodel_list:\n  - model_name: *n\n    litellm_params: {model: q}\n",
    "name in a block": "model_list:\n  - model_name: >-\n      code-ultra\n    litellm_params: {model: q}\n",
    "name from a merge": "n: &n {model_name: code-ultra}\nmodel_list:\n  - <<: *n\n    litellm_params: {model: q}\n",
    "twice the same": "model_list:\n- model_name: a\n- model_name: a\n",
    "keys that are no texts": "1: 2\n? 3.5\n: c\nnull: d\nmodel_list: []\n",
    "a directive": "%YAML 1.1\n---\nmodel_list: []\n",
    "entries that are none": "model_list:\n- 1\n- [model_name]\n- model_name: [a]\n- model_name: b\n  litellm_params: x\n",
}
REFUSED = {
    "two documents": ("model_list: []\n---\nfoo: 1\n", "several documents"),
    "the end of a document": ("foo: 1\n...\n", "does not read it|as meant"),
    "braces": ("{a: 1}\n", "in braces, and has no model_list"),
    "nothing in braces": ("{model_list: , a: 1}\n", "no list"),
    "null": ("model_list: null\n", "no list"),
    "a text": ("model_list: ''\n", "no list"),
    "keys": ("model_list:\n  a: 1\n", "no list"),
    "tab": ("model_list:\n\t- a\n", "does not read it"),
    "twice": ("model_list: []\nmodel_list: []\n", "twice"),
    "a list": ("- a\n- b\n", "no mapping"),
    "a word": ("word\n", "no mapping"),
    "brackets open": ("model_list: [\n  {model_name: a}\n", "does not read it"),
    "an alias to nowhere": ("model_list: [*x]\n", "undefined alias"),
    "a strange tag": ("model_list: !!python/object:os.system []\n", "does not read it"),
    "a text that has no end": ("model_list:\n- model_name: a\n  d: |\n    text", "as meant"),
    "used elsewhere, too": ("model_list: &m\n- model_name: a\nx: *m\n", "as meant"),
    "from a merge": ("x: &x\n  model_list: [{model_name: a}]\n<<: *x\n", "as meant"),
    "moved to the right": ("  a: 1\n  b: 2\n", "does not read it"),
    "a list in itself": ("model_list: &m [*m]\n", "as meant"),
    "much too deep": ("a: " + "[" * 800 + "]" * 800, "does not read it"),
    "a control character": ("a: \x07\n", "does not read it"),
    "half a character": ("a: \ud83d\n", "does not read it"),
}


def without_list(text: str) -> Any:
    config = yaml.safe_load(text) or {}
    config.pop("model_list", None)
    return config


def check_answer(text: str, wanted: list[tuple[str, str]]) -> dict[str, Any]:
    """What an extension promises: one insertion, all else equal, the entries there, a second one changes nothing."""
    said = litellm_yaml.answer(text, wanted)
    assert said["why"] == ""
    check_said(text, wanted, said)
    return said


def check_said(text: str, wanted: list[tuple[str, str]], said: dict[str, Any]) -> None:
    listed = (yaml.safe_load(text) or {}).get("model_list") or []
    if said["added"]:
        new = said["text"]
        more = len(new) - len(text)
        assert any(new == text[:i] + new[i:i + more] + text[i:] for i in range(len(text) + 1))
        assert without_list(new) == without_list(text)
        models = dict(wanted)
        assert yaml.safe_load(new)["model_list"] == listed + [
            {"model_name": name, "litellm_params": {"model": models[name]}} for name in said["added"]]
        if text.count("\n") == text.count("\r\n") > 0:
            assert new.count("\n") == new.count("\r\n")
        text = new
    again = litellm_yaml.answer(text, wanted)
    assert (again["added"], again["why"], "text" in again) == ([], "", False)
    assert {name for name, _ in wanted} <= set(again["entries"])


@pytest.mark.parametrize("text", MERGED.values(), ids=MERGED)
def test_it_adds_what_is_missing_and_touches_nothing(text: str) -> None:
    check_answer(text, WANTED)


@pytest.mark.parametrize(("text", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_extended_without_a_doubt_is_refused(text: str, why: str) -> None:
    said = litellm_yaml.answer(text, WANTED)
    assert re.search(why, said["why"])
    assert "text" not in said
    assert "\n" not in said["why"]


def test_a_file_that_is_json_stays_json() -> None:
    text = MERGED["JSON"]
    assert json.loads(check_answer(text, WANTED)["text"])["b"] == 1


def test_notes_stay_with_their_entry() -> None:
    text = "model_list:\n  - model_name: a\n    litellm_params:\n      model: x/y\n      # rpm: 1\n\n  # the next\nz: 1\n"
    new = check_answer(text, WANTED[:1])["text"]
    assert "      # rpm: 1\n  - model_name: code-ultra\n" in new
    assert new.endswith("\n\n  # the next\nz: 1\n")


@pytest.mark.parametrize("name", ["y", "no", "null", "1e3", "a: b", "- a", "#", "ä", "it's", '"', "0x10", "2020-01-01"])
def test_names_that_yaml_would_read_as_something_else(name: str) -> None:
    for text in ("", "model_list: []\n"):
        check_answer(text, [(name, f"x/{name}")])


def test_what_it_says_of_entries() -> None:
    text = """
x: &x {api_key: os.environ/SHARED, api_base: http://127.0.0.1:1}
environment_variables: {NAME: x, 1: y}
model_list:
- {model_name: a, litellm_params: {<<: *x, model: p/q, note: see os.environ/NOT_THIS}}
- {model_name: a, litellm_params: {model: second}}
- {model_name: b, litellm_params: {model: 3, aws_region_name: eu}}
- {model_name: c}
"""
    said = litellm_yaml.answer(text, ())
    assert said == {"added": [], "why": "", "environment": ["NAME", "1"], "entries": {
        "a": {"model": "p/q", "references": ["SHARED"], "has_key": True, "has_base": True},
        "b": {"model": "", "references": [], "has_key": True, "has_base": False},
        "c": {"model": "", "references": [], "has_key": False, "has_base": False}}}
    assert litellm_yaml.answer("[", ())["entries"] is None


def test_it_is_a_program() -> None:
    command = [sys.executable, str(ROOT / "share" / "guests" / "litellm_yaml.py")]
    asked = json.dumps({"text": "# \u00e4 \U0001f600\n", "wanted": WANTED})
    done = subprocess.run(command, input=asked.encode(), capture_output=True, check=True, timeout=60,
                          env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    said = json.loads(done.stdout)
    assert said["text"].startswith("# \u00e4 \U0001f600\nmodel_list:\n  - model_name: code-ultra\n")


def scalar(rng: random.Random, value: str) -> str:
    return rng.choice([value, f'"{value}"', f"'{value}'"])


def entry(rng: random.Random, name: str, indent: int) -> str:
    """One entry in some block style."""
    pad, gap = " " * indent, " " * rng.choice([1, 1, 3])
    inner = pad + " " + gap
    note = rng.choice(["", "  # it's [ours] - \"mine", " # model_name: code-ultra"])
    params = rng.choice([
        f"litellm_params: {{model: {scalar(rng, 'x/y')}, api_key: os.environ/K}}{note}\n",
        f"litellm_params:{note}\n{inner}    model: x/y\n{inner}    # rpm: 1\n{inner}    api_base: http://h:1/v1\n",
        f"litellm_params: {{model: x/y,\n{inner}   tags: [a, \"b]\"]}}\n",
    ])
    names = f"model_name: {scalar(rng, name)}{rng.choice(['', ' # n'])}\n"
    extra = rng.choice(["", "model_info: {mode: chat}\n", f"d: |\n{inner}  - model_name: no\n{inner}  # no comment: 'x\n",
                        f"d: >-\n{inner}  it's folded\n\n{inner}  twice\n", "d: it's plain, 100% [really]\n"])
    parts = [names, params, extra] if rng.random() < 0.6 else [params, extra, names]
    return f"{pad}-{gap}" + inner.join(p for p in parts if p)


def some_config(rng: random.Random) -> str:
    names = rng.sample(["a", "b", "code-ultra", "code-fast_next", "c.d"], rng.randrange(4))
    if rng.random() < 0.3:
        gap = rng.choice(["", "\n", "\n  "])
        items = [f"{{model_name: {scalar(rng, n)}, litellm_params: {{model: x/y}}}}" for n in names]
        tail = rng.choice(["", ",", " # ]\n"]) if names else ""
        listed = f"model_list: [{gap}{(',' + (gap or ' ')).join(items)}{tail}{gap}]\n"
    else:
        indent = rng.choice([0, 2, 4])
        listed = "model_list:" + rng.choice(["", " # models", " &all"]) + "\n"
        listed += rng.choice(["", "\n"]).join(entry(rng, n, indent) for n in names)
        listed += rng.choice(["", "\n\n", f"{' ' * indent}# - model_name: code-ultra\n"])
    sections = rng.sample(["litellm_settings:\n  drop_params: true\n", "general_settings: {}\n", "x: &x\n  y: [1, 2]\n",
                           "# a note\n", "t: |\n  model_list:\n  - model_name: a\n", "r:\n- 1\n- 2\n"], rng.randrange(4))
    parts = [*sections[:1], listed, *sections[1:]] if rng.random() < 0.9 else sections
    text = rng.choice(["", "", "# top\n", "---\n"]) + rng.choice(["", "\n"]).join(parts)
    text = text.rstrip("\n") if rng.random() < 0.3 else text
    return text.replace("\n", "\r\n") if rng.random() < 0.2 else text


def test_it_holds_for_any_style() -> None:
    """Each is extended right or refused, and few are refused."""
    refused = 0
    for seed in range(250):
        text = some_config(random.Random(seed))
        try:
            said = litellm_yaml.answer(text, WANTED)
            if said["why"]:
                refused += 1
            else:
                check_said(text, WANTED, said)
        except Exception:
            print(f"seed {seed}:\n{text}")
            raise
    assert refused < 10
