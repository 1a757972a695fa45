"""Start a client on this stack, and write nothing.

The client gets the address of the router, its models and their limits by its environment and its
arguments; what it reads otherwise stays as it is. `llmstack connect` makes it last.

examples:
  llmstack run-with claude
  llmstack run-with codex exec "explain this repository"
  llmstack run-with aider --no-auto-commits README.md
"""

from __future__ import annotations

import os
import subprocess
from typing import Any, Dict, List, Sequence, Tuple


def opencode_json(llmstack: Any, url: str, config: Any) -> str:
    """What `install` would write for opencode."""
    places = llmstack.find_places(os.environ)
    local = not llmstack.pinned_url(places)
    return str(llmstack.project_opencode_json(places, config, url, local))


def client_command(llmstack: Any, name: str, words: Sequence[str]
                   ) -> Tuple[List[str], Dict[str, str]]:
    """(command, environment) of a client on this stack. Errors: UserError."""
    connect = llmstack.load_extra("connect")
    client = connect.load_client(llmstack, name)
    if "run" not in client:
        raise llmstack.UserError(f"{client['title']} takes its settings from its own files alone",
                                 f"`llmstack connect {name}` says or does what it needs", 2)
    program = llmstack.find_program(client["program"])
    if not program:
        raise llmstack.UserError(f"{client['title']} is not on PATH ({client['program']})",
                                 "install it first: " + client["install"])
    url, config = connect.find_router(llmstack)
    facts = connect.find_facts(llmstack, url, config)
    facts.values["key"] = llmstack.api_key(os.environ) or connect.NO_KEY
    facts.values["opencode_json"] = opencode_json(llmstack, url, config)
    run = connect.expand({"env": {}, **client["run"]}, facts)
    env = {**os.environ, **run["env"]}
    for variable in run.get("unset", ()):
        env.pop(variable, None)
    arguments = connect.expand_lines(client["run"].get("args", ()), facts)
    return [program, *arguments, *words], env


def main(argv: Sequence[str], llmstack: Any) -> int:
    """Become the client; its exit code. Errors: UserError."""
    parser = llmstack.extra_parser("run-with", __doc__ or "")
    parser.add_argument("client", metavar="CLIENT", help="see `llmstack connect`")
    parser.add_argument("words", metavar="ARGS", nargs="...", help="its own arguments")
    args = parser.parse_args(list(argv))
    command, env = client_command(llmstack, args.client, args.words)
    if not llmstack.IS_WINDOWS:                 # exec there does not keep the terminal
        os.execve(command[0], command, env)  # noqa: S606  # a list, no shell
    return subprocess.call(command, env=env)
