"""Start this project's stack at login, and again when it fails.

  install     a systemd user unit, a launchd agent or a Windows scheduled task
  uninstall   take it away again; the stack stops
  status      exit code 0 where it is installed and runs
  run         what the service runs: start the stack, and stay until it ends

Logs are where they always are, see `llmstack logs`. On Linux, where a stack is to run without a
login: loginctl enable-linger.

examples:
  llmstack service install
  llmstack service status
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import Any, Dict, NamedTuple, Sequence, Tuple
from xml.sax.saxutils import escape

NAME = "llmstack"
LABEL = "org.llmstack"
POLL_S = 1.0                                    # is the daemon alive? Nobody but its parent is told
# A login session has not got these of the shell where a service is installed. No credentials.
KEPT = ("PATH", "LLMSTACK_DATA_DIR", "LLMSTACK_MODELS_INI", "LLMSTACK_BIN_DIR", "LLAMA_SERVER_BIN",
        "LITELLM_BIN", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "LLAMA_CACHE", "XDG_DATA_HOME",
        "LOG_LEVEL")


class Stopped(Exception):  # noqa: N818
    """SIGTERM, from whoever manages the service."""


class Manager(NamedTuple):
    """How a system is told of a service."""

    what: str
    path: str                                   # of the file that describes it
    text: str
    encoding: str
    enable: Sequence[Sequence[str]]
    disable: Sequence[Sequence[str]]
    state: Sequence[str]                        # exits with 0 where it runs


def kept_environment(work: str) -> Dict[str, str]:
    env = os.environ
    return {"LLMSTACK_WORK_DIR": work, **{name: env[name] for name in KEPT if env.get(name)}}


def fill(template: str, values: Dict[str, str]) -> str:
    return re.sub("@([A-Z]+)@", lambda found: values[found.group(1)], template)


def systemd_word(word: str) -> str:
    """A word of a unit's ExecStart or Environment, as systemd.syntax(7) quotes."""
    for char, written in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%")):
        word = word.replace(char, written)
    return f'"{word}"'


def systemd(command: Sequence[str], places: Any, llmstack: Any) -> Manager:
    home = os.path.expanduser("~")
    root = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    env = kept_environment(places.work)
    lines = [f"Environment={systemd_word(f'{name}={value}')}" for name, value in env.items()]
    template = llmstack.read_shared_text("service/llmstack.service")
    text = fill(template, {
        "COMMAND": " ".join(systemd_word(word).replace("$", "$$") for word in command),
        "WORK": places.work.replace("%", "%%"),
        "ENVIRONMENT": "\n".join(lines),
        "CREDENTIALS": os.path.join(root, NAME, "environment").replace("%", "%%")})
    unit = f"{NAME}.service"
    control = ["systemctl", "--user"]
    return Manager("systemd user unit", os.path.join(root, "systemd", "user", unit), text, "utf-8",
                   [[*control, "daemon-reload"], [*control, "enable", "--now", unit]],
                   [[*control, "disable", "--now", unit]],
                   [*control, "is-active", unit])


def launchd(command: Sequence[str], places: Any, llmstack: Any) -> Manager:
    path = os.path.expanduser(f"~/Library/LaunchAgents/{LABEL}.plist")
    env = kept_environment(places.work)
    pairs = [f"    <key>{escape(name)}</key>\n    <string>{escape(value)}</string>"
             for name, value in env.items()]
    template = llmstack.read_shared_text("service/org.llmstack.plist")
    text = fill(template, {
        "COMMAND": "\n".join(f"    <string>{escape(word)}</string>" for word in command),
        "WORK": escape(places.work), "ENVIRONMENT": "\n".join(pairs),
        "LOG": escape(places.log("service.log"))})
    domain = f"gui/{os.getuid()}"
    return Manager("launchd agent", path, text, "utf-8",
                   [["launchctl", "bootstrap", domain, path]],
                   [["launchctl", "bootout", f"{domain}/{LABEL}"]],
                   ["launchctl", "print", f"{domain}/{LABEL}"])


def task(command: Sequence[str], places: Any, llmstack: Any) -> Manager:
    path = os.path.join(places.data, "service.xml")
    quoted = " ".join(llmstack.windows_quote(word) for word in command[1:])
    user = "\\".join((os.environ.get("USERDOMAIN", "."), os.environ.get("USERNAME", "")))
    template = llmstack.read_shared_text("service/llmstack.xml")
    text = fill(template, {"WORK": escape(places.work), "USER": escape(user),
                           "PROGRAM": escape(command[0]), "ARGUMENTS": escape(quoted)})
    tasks = ["schtasks", "/TN", NAME]
    return Manager("scheduled task", path, text, "utf-16",
                   [["schtasks", "/Create", "/F", "/TN", NAME, "/XML", path], [*tasks, "/Run"]],
                   [[*tasks, "/End"], [*tasks, "/Delete", "/F"]],
                   [*tasks, "/Query"])


def manager_of(places: Any, llmstack: Any) -> Manager:
    """This system's. Errors: UserError where it has none of the three."""
    command = [sys.executable, llmstack.PROGRAM, "service", "run"]
    if llmstack.IS_WINDOWS:
        return task(command, places, llmstack)
    if llmstack.IS_MAC:
        return launchd(command, places, llmstack)
    if not llmstack.find_program("systemctl"):
        raise llmstack.UserError("there is no systemd here",
                                 "have whatever starts your services run `llmstack service run`")
    return systemd(command, places, llmstack)


def call(command: Sequence[str]) -> Tuple[int, str]:
    """(exit code, the last line it says) of a system's program."""
    try:
        done = subprocess.run(list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=120, check=False)
    except (OSError, subprocess.SubprocessError) as exc:
        return 127, str(exc)
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


def install(places: Any, manager: Manager, llmstack: Any) -> int:
    llmstack.check_run_trust(places)
    llmstack.load_config(places, llmstack.warn)
    llmstack.write_atomic(manager.path, manager.text.encode(manager.encoding), 0o600)
    llmstack.say(f"Wrote {manager.path}, a {manager.what} for {places.work}")
    for command in manager.enable:
        code, said = call(command)
        if code:
            raise llmstack.UserError(f"{command[0]} says: {said or f'exit code {code}'}",
                                     "the file is in place; once that is mended, run it again, or: "
                                     + " ".join(command))
    llmstack.say("It runs, and starts at each login. `llmstack stop` stops it until then.")
    return 0


def uninstall(manager: Manager, llmstack: Any) -> int:
    if not os.path.exists(manager.path):
        llmstack.say(f"There is no {manager.what} of llmstack's.")
        return 0
    for command in manager.disable:
        code, said = call(command)
        if code:
            llmstack.warn(f"{command[0]} says: {said or f'exit code {code}'}")
    try:
        os.unlink(manager.path)
    except OSError as exc:
        raise llmstack.UserError(f"cannot remove {manager.path}: {exc.strerror}",
                                 "remove it by hand") from None
    llmstack.say(f"Removed {manager.path}")
    return 0


def show_status(manager: Manager, llmstack: Any) -> int:
    if not os.path.exists(manager.path):
        llmstack.say("Not installed; `llmstack service install` does that.")
        return 1
    with open(manager.path, "rb") as file:
        current = file.read() == manager.text.encode(manager.encoding)
    code, said = call(manager.state)
    llmstack.say(f"{manager.what}  {manager.path}")
    llmstack.say("state  " + (llmstack.visible(said) or f"exit code {code}"))
    if not current:
        llmstack.say("It is of another project, program or environment than this one;"
                     " `llmstack service install` writes it anew.")
    return 0 if code == 0 else 1


def stay(places: Any, llmstack: Any) -> int:
    """Start the stack and wait for its end: 0 where it was stopped, 1 where it has died."""
    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    own = [sys.executable, llmstack.PROGRAM]
    try:
        code = subprocess.call([*own, "start", "--detach"], stdin=subprocess.DEVNULL)
        if code:
            return code
        while True:
            record = llmstack.read_stack(places)
            while llmstack.owned_process(record, places.work):
                time.sleep(POLL_S)
            with llmstack.stack_lock(places, lambda line: None):    # a restart may be under way
                record = llmstack.read_stack(places)
            if record is None:
                return 0
            if not llmstack.owned_process(record, places.work):
                raise llmstack.UserError("the daemon has died", "see `llmstack logs`")
    except Stopped:
        return subprocess.call([*own, "stop"], stdin=subprocess.DEVNULL)


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("service", __doc__)
    parser.add_argument("action", choices=["install", "uninstall", "status", "run"])
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    if args.action == "run":
        return stay(places, llmstack)
    manager = manager_of(places, llmstack)
    if args.action == "install":
        return install(places, manager, llmstack)
    if args.action == "uninstall":
        return uninstall(manager, llmstack)
    return show_status(manager, llmstack)
