"""Print what makes a shell complete commands, options and tiers.

In a start-up file of the shell:
  bash         eval "$(llmstack completion bash)"
  zsh          eval "$(llmstack completion zsh)", after compinit
  fish         llmstack completion fish | source
  powershell   llmstack completion powershell | Out-String | Invoke-Expression

examples:
  llmstack completion fish > ~/.config/fish/completions/llmstack.fish
  llmstack completion bash > ~/.local/share/bash-completion/completions/llmstack
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from typing import Any, Dict, List, Sequence

FILES = {"bash": "llmstack.bash", "zsh": "llmstack.zsh", "fish": "llmstack.fish",
         "powershell": "llmstack.ps1"}


def help_text(name: str, llmstack: Any) -> str:
    """What `llmstack NAME --help` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        llmstack.run_command([name, "--help"])
    return out.getvalue()


def tier_names(llmstack: Any) -> List[str]:
    """The tiers of the project; a thin client's as its opencode.json has them, without asking."""
    places = llmstack.find_places(os.environ)
    if not llmstack.pinned_url(places):
        return [tier.name for tier in llmstack.planned_config(places).tiers]
    value: Dict[str, Any] = llmstack.parse_json_object(
        llmstack.read_text(places.in_state("opencode.json")))
    for key in ("provider", "llama.cpp", "models"):
        inner = value.get(key)
        value = inner if isinstance(inner, dict) else {}
    return [name for name in value if name != "auto"]


def candidates(words: Sequence[str], llmstack: Any) -> List[str]:
    """What may stand behind these words of a command line. Errors: UserError."""
    if not words:
        return list(llmstack.command_names())
    text = help_text(words[0], llmstack)
    usage = text.partition("\n\n")[0]
    found = re.findall(r"^  (?:-\w(?: [A-Z]+)?, )?(--[a-z-]+)", text, re.MULTILINE)
    for choices in re.findall(r"\{([\w,-]+)\}", usage):
        found += [word for word in choices.split(",") if word != "TIER"]
    if words[0] == "help":
        found += llmstack.command_names()
    if re.search(r"\bTIER\b", usage):
        found += tier_names(llmstack)
    return found


def complete(words: Sequence[str], llmstack: Any) -> None:
    """Print a line for each candidate; the last of `words` is = and what has been typed of it."""
    *before, last = words
    typed = last[1:]
    try:
        found = candidates(before, llmstack)
    except llmstack.UserError:                  # no place to say it
        return
    for word in dict.fromkeys(found):
        if word.startswith(typed) and (typed or word[0] != "-"):
            llmstack.say(word)


def main(argv: Sequence[str], llmstack: Any) -> int:
    if argv[:1] == ["--complete"] and len(argv) > 1:
        complete(argv[1:], llmstack)
        return 0
    parser = llmstack.extra_parser("completion", __doc__)
    parser.add_argument("shell", choices=sorted(FILES), help="whose language to print")
    args = parser.parse_args(list(argv))
    llmstack.say(llmstack.read_shared_text("completion/" + FILES[args.shell]).rstrip("\n"))
    return 0
