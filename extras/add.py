"""Add a model to models.ini, the quant of it that fits this machine, and fetch it.

MODEL is OWNER/NAME or OWNER/NAME:QUANT of the hub, a link to a repository or a file there, or the
path of a GGUF. Its header is read, what it takes is shown, and you are asked; models.ini gets a
section at its end, and no other byte of it changes. Where nothing runs, the model is tried.

examples:
  llmstack add unsloth/Qwen3-8B-GGUF
  llmstack add unsloth/Qwen3-8B-GGUF:Q6_K --tier plan-b --role plan
  llmstack add ~/models/mine.gguf --tier mine
"""

from __future__ import annotations

import os
import re
import urllib.error
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

WANTED_CONTEXT = 65_536                         # tokens, where the model and the memory have them
LEAST_CONTEXT = 16_384                          # a quant is chosen by what is left beside this
LARGEST_QUANT_BITS = 8                          # of those chosen: more is no better to read
_QUANT = re.compile(r"(?:UD-)?(?:I?Q([0-9])(?:_[A-Z0-9]+)*|(BF16|F16|F32)|MXFP(4)[A-Z0-9_]*)",
                    re.IGNORECASE)
_LINK = re.compile(r"https?://[^/]+/([\w.-]+/[\w.-]+?)(?:/(?:blob|resolve|tree)/[^/]+(?:/(.+?))?)?"
                   r"(?:\?.*)?/?\Z")


class Wanted(NamedTuple):
    """What was asked for."""

    repo: str = ""
    quant: str = ""
    file: str = ""
    path: str = ""


class Candidate(NamedTuple):
    """A GGUF of a repository; `file` is its first part."""

    file: str
    size_bytes: int
    quant: str
    bits: int


class Choice(NamedTuple):
    """The file that is taken, what it takes here, and how much of its context."""

    tier: Any
    fit: Any


# ---- what is asked for


def parse_wanted(text: str, llmstack: Any) -> Wanted:
    """Errors: UserError."""
    link = _LINK.match(text)
    if link:
        file = link.group(2) or ""
        return Wanted(link.group(1), file=file if file.endswith(".gguf") else "")
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isfile(path):
        return Wanted(path=path)
    repo, _, quant = text.partition(":")
    if not re.match(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z", repo) or text.endswith(".gguf"):
        raise llmstack.UserError(f"{text} is no file here, and no repository of the hub",
                                 "a path, OWNER/NAME, OWNER/NAME:QUANT, or a link to one", 2)
    return Wanted(repo, quant)


def quant_of(file: str) -> Tuple[str, int]:
    """(quant, bits) by the name of a file; ("", 0) where it does not say."""
    found = list(_QUANT.finditer(os.path.basename(file)))
    if not found:
        return "", 0
    bits, wide, mx = found[-1].groups()
    return found[-1].group(), int(bits or mx or wide[-2:])


def candidates(rows: Sequence[Any], llmstack: Any) -> List[Candidate]:
    """The models of a repository, the largest first. `rows`: of the hub's tree."""
    sizes = {str(row["path"]): int(row.get("size") or 0) for row in rows}
    found = []
    for file in sizes:
        parts = llmstack.split_parts(file)
        is_model = file.endswith(".gguf") and not os.path.basename(file).startswith("mmproj")
        if is_model and parts[0] == file and all(part in sizes for part in parts):
            size_bytes = sum(sizes[part] for part in parts)
            found.append(Candidate(file, size_bytes, *quant_of(file)))
    return sorted(found, key=lambda c: -c.size_bytes)


def named(found: Sequence[Candidate], wanted: Wanted, llmstack: Any) -> List[Candidate]:
    """Those that were asked for by file or quant, all where neither was. Errors: UserError."""
    if not found:
        raise llmstack.UserError(f"{wanted.repo} has no GGUF",
                                 "look for its conversion: most are named NAME-GGUF", 1)
    if wanted.file:
        first = llmstack.split_parts(wanted.file)[0]
        those = [c for c in found if c.file == first]
    elif wanted.quant:
        quant = wanted.quant.lower()
        those = [c for c in found if c.quant.lower() == quant]
        those = those or [c for c in found if quant in c.file.lower()]
    else:
        return list(found)
    if not those:
        quants = ", ".join(c.quant or c.file for c in found)
        raise llmstack.UserError(f"{wanted.repo} has no {wanted.file or wanted.quant}",
                                 llmstack.visible(f"it has {quants}"), 1)
    return those


# ---- what fits


class Chooser:
    """Finds what a machine can hold of a repository, beside the fast tier."""

    def __init__(self, config: Any, llmstack: Any) -> None:
        self.llmstack, self.config = llmstack, config
        machine = llmstack.this_machine(config)
        fast = config.by_role("fast")
        beside_gb = 0.0
        if fast is not None and fast.backend == "gguf":
            alone = config._replace(tiers=(fast,))
            beside_gb = llmstack.measure_tiers(alone, machine, os.environ, False)[0].need_gb
        self.whole, self.beside_gb = machine, beside_gb
        left_gb = machine.budget_gb - beside_gb
        self.machine = machine._replace(budget_gb=left_gb) if left_gb > 0 else machine

    def fit(self, tier: Any, header: Any) -> Any:
        return self.llmstack.fit_tier(tier, self.config, self.machine, header, "hub", "")

    def with_context(self, tier: Any, header: Any) -> Choice:
        """The tier with as much context as is wanted and fits. Errors: GgufError."""
        tier = tier._replace(ctx_size=LEAST_CONTEXT)
        fit = self.fit(tier, header)
        trained = fit.trained_ctx or WANTED_CONTEXT
        most = min(WANTED_CONTEXT, trained, fit.largest_ctx or LEAST_CONTEXT)
        tier = tier._replace(ctx_size=max(256, most // 256 * 256))
        return Choice(tier, self.fit(tier, header))

    def choose(self, tier: Any, repo: str, found: Sequence[Candidate], is_asked: bool) -> Choice:
        """The largest that fits, or the only one. Errors: UserError, OSError, GgufError."""
        llmstack = self.llmstack
        few = [c for c in found if c.bits <= LARGEST_QUANT_BITS] or list(found)
        if is_asked:
            few = list(found)[:1]
        header = None
        for candidate in few:
            too_large = candidate.size_bytes > self.machine.budget_gb * 1e9
            if too_large and not is_asked and candidate is not few[-1]:
                continue
            own = tier._replace(hf_file=candidate.file, quant=candidate.quant,
                                size_gb=round(candidate.size_bytes / 1e9, 2))
            if header is None:                  # of one, the others differ in their weights alone
                header = llmstack.hub_header(llmstack.weights_for(own), os.environ)
                measured = candidate.size_bytes
            grown = header.tensor_bytes * candidate.size_bytes // max(measured, 1)
            choice = self.with_context(own, header._replace(tensor_bytes=grown))
            if choice.fit.fits or is_asked:
                return choice
        need_gb, have_gb = choice.fit.need_gb, self.machine.budget_gb
        raise llmstack.UserError(
            f"nothing of {repo} fits: the smallest takes {need_gb:.1f} GB of {have_gb:.1f}",
            f"name a quant to add it all the same: llmstack add {repo}:{few[-1].quant}")


# ---- the hub


def ask_hub(path: str, repo: str, llmstack: Any) -> Any:
    """Errors: UserError."""
    try:
        return llmstack.load_extra("download").hub_api(path, os.environ, None, llmstack)
    except urllib.error.HTTPError as exc:
        what = f"the model hub answers {exc.code} for {repo}"
        if exc.code in (401, 404):
            what = f"there is no {repo} on the hub, or it is private"
        elif exc.code == 403:
            what = f"{repo} is closed to you"
        link = f"{llmstack.hub_endpoint(os.environ)}/{repo}"
        raise llmstack.UserError(what, f"see {link}, and set HF_TOKEN where it wants one") from None


def licence_words(info: Any) -> str:
    """The licence of a repository and its gate, for people."""
    tags = info.get("tags") if isinstance(info, dict) else None
    names = [str(tag)[8:] for tag in tags or [] if str(tag).startswith("license:")]
    words = ", ".join(names) or "not named"
    if isinstance(info, dict) and info.get("gated"):
        words += "; gated: its terms are accepted on its page, and HF_TOKEN is needed"
    return words


# ---- models.ini


def tier_name(args: Any, wanted: Wanted, config: Any, llmstack: Any) -> str:
    """Errors: UserError where the name is taken."""
    name = args.tier
    if not name:
        base = os.path.basename(wanted.path or wanted.repo)
        base = re.sub(r"(?i)\.gguf\Z|[-_.]gguf\Z", "", base).lower()
        name = re.sub(r"[^a-z0-9._-]+", "-", base).strip("-._")[:63] or "model"
    if config is not None and config.by_name(name) is not None:
        raise llmstack.UserError(f"models.ini has {name} already", "name another: --tier NAME", 2)
    return str(name)


def section_text(tier: Any) -> str:
    """A tier as a section of models.ini."""
    rows = [("role", tier.role), ("hf_repo", tier.hf_repo), ("hf_file", tier.hf_file),
            ("path", tier.path), ("quant", tier.quant), ("size_gb", f"{tier.size_gb:g}"),
            ("ctx_size", str(tier.ctx_size)), ("mmproj", tier.settings.get("mmproj", ""))]
    lines = [f"{key} = {value}" for key, value in rows if value]
    return "\n".join([f"[{tier.name}]", *lines]) + "\n"


def with_section(old: bytes, section: str) -> bytes:
    """A models.ini with a section behind all that it has, in its own line ends."""
    end = b"\r\n" if b"\r\n" in old else b"\n"
    gap = b"" if not old or old.endswith(b"\n") else end
    return old + gap + (end if old else b"") + section.encode().replace(b"\n", end)


def write_section(places: Any, tier: Any, llmstack: Any) -> None:
    """Errors: UserError, ConfigError where the whole would not hold."""
    path = places.models_ini
    old = llmstack.read_regular(path) if os.path.exists(path) else b""
    new = with_section(old, section_text(tier))
    llmstack.parse_models_ini(llmstack.decode_models_ini(new, path), path)
    if not old:
        llmstack.seed_project(places, llmstack.say, new)
        if tier.path:
            llmstack.trust_project(places, "run")
        return
    llmstack.load_extra("config").write_ini(places, new, llmstack)


# ---- the command


def show(choice: Choice, chooser: Chooser, licence: str, llmstack: Any) -> None:
    tier, memory = choice.tier, choice.fit.memory
    say = llmstack.say
    say(llmstack.visible(f"{tier.name}: {tier.hf_repo or tier.path} {tier.hf_file}"))
    say(f"  weights   {memory.weights / 1e9:,.2f} GB{', ' + tier.quant if tier.quant else ''}")
    say(f"  KV cache  {memory.kv / 1e9:,.2f} GB at {tier.ctx_size:,} tokens of context")
    beside = ""
    if chooser.beside_gb:
        beside = f", beside the fast tier's {chooser.beside_gb:.1f}"
    verdict = "fits" if choice.fit.fits else "does not fit"
    budget_gb = chooser.whole.budget_gb
    say(f"  memory    {choice.fit.need_gb:,.2f} GB of {budget_gb:,.1f}{beside}: {verdict}")
    if tier.has_projector:
        say(f"  pictures  by {tier.settings['mmproj']}")
    if licence:
        say(llmstack.visible(f"  licence   {licence}"))


def choose(args: Any, config: Optional[Any], llmstack: Any) -> Tuple[Choice, Chooser, str]:
    """Errors: UserError."""
    wanted = parse_wanted(args.model, llmstack)
    name = tier_name(args, wanted, config, llmstack)
    role = args.role
    if role is None:
        role = "" if config is not None and config.by_role("agent") else "agent"
    chooser = Chooser(config or llmstack.Config(), llmstack)
    tier = llmstack.Tier(name, role, hf_repo=wanted.repo, path=wanted.path)
    try:
        if wanted.path:
            quant, _ = quant_of(wanted.path)
            size_gb = round(llmstack.file_size(wanted.path) / 1e9, 2)
            header = llmstack.local_header(wanted.path)
            tier = tier._replace(quant=quant, size_gb=size_gb)
            return chooser.with_context(tier, header), chooser, ""
        rows = ask_hub(f"{wanted.repo}/tree/main?recursive=true", wanted.repo, llmstack)
        found = named(candidates(rows, llmstack), wanted, llmstack)
        licence = licence_words(ask_hub(wanted.repo, wanted.repo, llmstack))
        mmproj = llmstack.choose_projector(str(row["path"]) for row in rows)
        if mmproj:
            tier = tier._replace(server=(("mmproj", f"{wanted.repo}:{mmproj}"),))
        is_asked = bool(wanted.quant or wanted.file)
        return chooser.choose(tier, wanted.repo, found, is_asked), chooser, licence
    except llmstack.GgufError as exc:
        raise llmstack.UserError(f"{args.model} {exc}", "another file or repository") from None
    except (LookupError, TypeError, ValueError, AttributeError):
        raise llmstack.UserError(f"{llmstack.hub_endpoint(os.environ)} does not answer like a model"
                                 " hub", "see HF_ENDPOINT") from None
    except OSError as exc:
        raise llmstack.UserError(f"{args.model}: {exc}", "try again later") from None


def fetch(places: Any, name: str, llmstack: Any) -> None:
    """Download what the new tier needs, and wait for it. Errors: UserError."""
    config = llmstack.load_config(places)
    download = llmstack.load_extra("download")
    jobs, _ = download.plan_downloads(config, (name,), ("current",), llmstack)
    if not jobs:
        return
    known, _ = download.plan_downloads(config, (), ("current", "next"), llmstack)
    download.start_downloads(places, jobs, known, os.environ, llmstack.say, llmstack)
    failed = download.follow_downloads(places, [job.name for job in jobs], llmstack.say, llmstack)
    if failed:
        raise llmstack.UserError(f"not downloaded: {', '.join(failed)}",
                                 f"mend what its line says, then `llmstack download {name}`")


def prove(places: Any, name: str, llmstack: Any) -> None:
    """Have the new tier say something, where there is a llama-server for it. Errors: UserError."""
    config = llmstack.load_config(places)
    tier = config.by_name(name)
    own = llmstack.tier_config(config, tier)
    program = llmstack.find_llama_server(own, os.environ, places.data)
    if not program or tier.role in ("embed", "rerank"):
        return
    llmstack.check_run_trust(places)
    extra = llmstack.load_extra("setup")
    setup = extra.Setup(places, os.environ, None, llmstack.say, llmstack.ask_person, [], [])
    seconds, words = extra.prove_tier(tier, config, setup, llmstack)
    llmstack.say(llmstack.visible(f"{name} is loaded in {seconds:.1f} s and answers {words!r}"))


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("add", __doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tier", metavar="NAME", default="",
                        help="its name; else the repository's")
    parser.add_argument("--role", metavar="ROLE", help="agent where no tier has that, else none")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    parser.add_argument("--no-download", action="store_true", help="only write models.ini")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    config = None
    if os.path.exists(places.models_ini):
        config = llmstack.load_config(places)
    choice, chooser, licence = choose(args, config, llmstack)
    show(choice, chooser, licence, llmstack)
    question = f"Add it to {places.models_ini} and fetch it? [y/N] "
    if not (args.yes or llmstack.agreed(question, "nothing is added", "say --yes")):
        llmstack.say("Nothing was changed.")
        return 0
    write_section(places, choice.tier, llmstack)
    if not args.no_download:
        fetch(places, choice.tier.name, llmstack)
    verb = "restart"
    if not llmstack.running_record(places):     # which may have the memory that a trial takes
        verb = "start"
        if not args.no_download:
            prove(places, choice.tier.name, llmstack)
    llmstack.say(f"`llmstack {verb}`, then `llmstack run {choice.tier.name} \"Hello\"`")
    return 0
