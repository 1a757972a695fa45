"""Configured models against the hub, the disk and what runs.

Look at every tier: is its file on the hub, is it here and whole, what is queued, does what runs
agree with models.ini (DRIFT!), are credentials set. The last line says what to do. Exit code 1
when something needs you.

examples:
  llmstack check                            # models.ini, the hub, the disk and what runs
  llmstack check code-fast                  # a tier, and where its files come from
  llmstack check --offline                  # without asking the hub
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

HubFiles = Dict[Tuple[str, str], Dict[str, Any]]        # (repository, file) -> what ask_repo says
CHEAP_HASH_BYTES = 1_000_000_000                # a second or two
SIZE_TOLERANCE = 0.01                           # sizes are written with two or three digits


# ---- the hub


def ask_file(repo: str, file: str, rows: Mapping[str, Any], env: Mapping[str, str],
             llmstack: Any) -> Dict[str, Any]:
    """One file of ask_repo. `rows`: path -> what the hub's paths-info says of it."""
    parts = [rows[part] for part in llmstack.split_parts(file) if part in rows]
    if len(parts) < len(llmstack.split_parts(file)):
        others = llmstack.load_extra("download").nearest_files(repo, file, env, llmstack)
        return {"exists": False, "problem": f"{repo} has no {file}{others}"}
    dates = [str((part.get("lastCommit") or {}).get("date") or "")[:10] for part in parts]
    return {
        "exists": True,
        "size_bytes": sum(int(part.get("size") or 0) for part in parts),
        "changed": llmstack.visible(max(dates)),
        "sha256": [str((part.get("lfs") or {}).get("oid") or "") for part in parts],
        "problem": "",
    }


def ask_repo(repo: str, files: Sequence[str], env: Mapping[str, str],
             llmstack: Any) -> Dict[str, Dict[str, Any]]:
    """File -> what the hub says of it: exists, size_bytes, changed, sha256, problem.

    Errors: UserError where it cannot be asked.
    """
    wanted = [part for file in files for part in llmstack.split_parts(file)]
    form = {"paths": wanted, "expand": "true"}
    try:
        hub_api = llmstack.load_extra("download").hub_api
        told = hub_api(f"{repo}/paths-info/main", env, form, llmstack)
        rows = {str(row["path"]): row for row in told}
        return {file: ask_file(repo, file, rows, env, llmstack) for file in files}
    except urllib.error.HTTPError as exc:
        if exc.code not in (401, 403, 404):
            raise llmstack.UserError(f"the model hub answers {exc.code} for {repo}",
                                     "try again later") from None
        what = f"there is no {repo} on the hub, or it is private (HF_TOKEN)"
        if exc.code == 403:
            what = f"{repo} is closed to you"
        return {file: {"exists": False, "problem": what} for file in files}
    except (LookupError, TypeError, ValueError, AttributeError):
        raise llmstack.UserError(f"{llmstack.hub_endpoint(env)} does not answer like a model hub",
                                 "see HF_ENDPOINT") from None


def ask_hub(tiers: Sequence[Any], env: Mapping[str, str],
            llmstack: Any) -> Tuple[HubFiles, List[str]]:
    """What the hub says of the files of local tiers, and a note where it does not answer."""
    wanted: Dict[str, List[str]] = {}
    for tier in tiers:
        for weights in set(llmstack.both_weights(tier)):
            if weights.repo:
                wanted.setdefault(weights.repo, []).append(weights.file)
    found: HubFiles = {}
    for repo, files in wanted.items():
        try:
            rows = ask_repo(repo, files, env, llmstack)
        except llmstack.UserError as exc:
            return found, [f"{exc}; what is on the hub is not known"]
        found.update({(repo, file): row for file, row in rows.items()})
    return found, []


# ---- the disk


def file_sha256(path: str) -> str:
    """The digest of a whole file, in hexadecimal digits. Errors: OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def is_begun(folder: str, sums: Sequence[str]) -> bool:
    """True when a download has left something of one of these blobs, of any where none is known."""
    try:
        left = os.listdir(os.path.join(folder, "blobs"))
    except OSError:
        return False
    if sums:
        return any(name.split(".")[0] in sums for name in left)
    return any("." in name for name in left)    # a whole one is another model's


def local_state(weights: Any, env: Mapping[str, str], hub: Mapping[str, Any],
                llmstack: Any) -> Tuple[str, str]:
    """(missing | partial | damaged | outdated | intact, why) of a model in the cache.

    `hub`: what ask_repo says of it. A hash is made where that is cheap.
    """
    paths = llmstack.local_parts(weights, env)
    sums = hub.get("sha256") or []
    if not all(paths):
        folder = llmstack.repo_dir(llmstack.hub_cache_dir(env), weights.repo)
        if any(paths) or is_begun(folder, sums):
            return "partial", ""
        return "missing", ""
    blobs = [os.path.basename(os.path.realpath(path)) for path in paths]
    if any(len(a) == len(b) == 64 and a != b for a, b in zip(blobs, sums)):
        return "outdated", "the hub has a newer one; `llmstack download` fetches it"
    size = sum(map(llmstack.file_size, paths))
    if hub.get("size_bytes") and size != hub["size_bytes"]:
        return "damaged", f"it has {size:,} bytes, the hub's has {hub['size_bytes']:,}"
    for path, blob, digest in zip(paths, blobs, sums or blobs):
        expected = blob
        if len(digest) == 64:
            expected = digest
        damage = llmstack.file_damage(path)
        if damage:
            return "damaged", f"it {damage}"
        is_cheap = llmstack.file_size(path) <= CHEAP_HASH_BYTES
        is_known = re.match(r"[0-9a-f]{64}\Z", expected)
        if is_cheap and is_known and file_sha256(path) != expected:
            return "damaged", "its SHA-256 is not the hub's"
    return "intact", ""


# ---- drift: what runs, or will, beside models.ini


def swap_yaml_commands(text: str) -> Dict[str, str]:
    """A llama-swap.yaml's models -> their commands and all else below them, without comments."""
    blocks: Dict[str, List[str]] = {}
    name, inside = "", False
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        top = re.match(r"(\S[^:]*):", line)
        heading = re.match(r"  (\S.*?):\s*$", line)
        if top:
            inside, name = top.group(1) == "models", ""
        elif inside and heading:
            name = heading.group(1).strip("\"'")
        elif name:
            blocks.setdefault(name, []).append(line.strip())
    return {name: "\n".join(lines) for name, lines in blocks.items()}


def weights_drift(weights: Any, command: str, llmstack: Any) -> str:
    """Which other file than `weights` a llama-server command names, "" when it is the same one."""
    for flags in llmstack.weight_flags(weights):
        if re.search(rf"(?<![^\s'\"]){re.escape(flags[1])}(?![^\s'\"])", command):
            continue
        found = re.search(r"(?:^|\s)(?:-hff|--hf-file|-m|--model)\s+['\"]?([^\s'\"]+)", command)
        if found:
            return found.group(1)
        return "something else"
    return ""


def drift_of_file(weights: Any, block: Optional[str], command: Optional[str],
                  llmstack: Any) -> List[str]:
    """Where llama-swap.yaml's `block` or a running `command` names another file than models.ini."""
    said = []
    mine = weights.path or weights.file
    if block is not None:
        other = weights_drift(weights, block, llmstack)
        if other:
            said.append(f"llama-swap.yaml has {llmstack.visible(other)}, models.ini {mine}")
    if command is not None:
        other = weights_drift(weights, command, llmstack)
        if other:
            said.append(f"{llmstack.visible(other)} is running, models.ini has {mine}")
    return said


def drift_of_values(tier: Any, weights: Any, meta: Optional[Mapping[str, Any]],
                    llmstack: Any) -> List[str]:
    """Where the running engine has other values for a tier; `meta` None: it does not know it."""
    if meta is None:
        return ["the running engine does not know this tier"]
    said = []
    for key, value in (("ctx_size", tier.ctx_size), ("quant", weights.quant)):
        running = meta.get(key, value)
        if running != value:
            running = llmstack.visible(str(running))
            said.append(f"the running engine has {key} {running}, models.ini {value}")
    return said


def engine_view(engine: Any, llmstack: Any) -> Tuple[Dict[str, str], Dict[str, Dict[str, Any]]]:
    """What an engine says: (model -> its command line, model -> what it has from models.ini)."""
    upstream = llmstack.engine_upstream(engine)
    try:
        running = llmstack.asked_json(upstream, "/running")["running"]
        rows = {str(row["model"]): str(row["cmd"]) for row in running}
        meta = {}
        for model in llmstack.asked_json(upstream, "/v1/models")["data"]:
            told = model.get("meta") or {}
            meta[str(model["id"])] = told.get("llmstack") or told.get("llamaswap") or {}
        return rows, meta
    except (KeyError, TypeError, AttributeError):
        return {}, {}


def find_drift(places: Any, config: Any, llmstack: Any) -> Dict[str, List[str]]:
    """Tier -> where models.ini and what runs, or will, disagree."""
    record = llmstack.running_record(places)
    text = llmstack.read_text(places.in_state("llama-swap.yaml"))
    channel = "current"
    if "(channel next)" in text:
        channel = "next"
    rows: Dict[str, str] = {}
    meta: Dict[str, Dict[str, Any]] = {}
    serves = True                               # llama-swap does, or will
    if record is not None:
        channel = record.channel
        rows, meta = engine_view(record, llmstack)
        serves = record.kind == "llama-swap"
    blocks: Dict[str, str] = {}
    if serves:
        blocks = swap_yaml_commands(text)
    drift: Dict[str, List[str]] = {}
    for tier in llmstack.local_tiers(config):
        weights = llmstack.weights_for(tier.on_channel(channel))
        said = drift_of_file(weights, blocks.get(tier.name), rows.get(tier.name), llmstack)
        if meta:
            said += drift_of_values(tier, weights, meta.get(tier.name), llmstack)
        if said:
            drift[tier.name] = said
    return drift


# ---- what is to be done


class Need(NamedTuple):
    """Something that `check` has found for the user to do."""

    tier: str                                   # "" for what is no tier's
    what: str
    command: str = ""                           # of llmstack; "" where the user has to edit


def weights_needs(found: Mapping[str, Any], tier: Any, label: str) -> List[Need]:
    """What is to be done about a tier's file of a channel."""
    fetch = f"`llmstack download {tier.name}` fetches it"
    what, command = found["problem"], ""
    if found["local"] == "outdated":
        command = "download"
    elif not what and found["local"] == "partial":
        what, command = f"not whole yet; {fetch}", "download"
    elif not what and found["local"] == "missing" and label == "current":
        what, command = f"not here yet; {fetch}", "download"
    if not what:
        return []
    return [Need(tier.name, f"{tier.name} ({label}): {what}", command)]


def check_server(config: Any, env: Mapping[str, str], data: str,
                 llmstack: Any) -> Tuple[Optional[str], List[Need]]:
    """(llama-server's name, what is to be done about it)."""
    try:
        program = llmstack.find_llama_server(config, env, data)
    except llmstack.UserError as exc:           # a program that is named and not there
        return None, [Need("", str(exc))]
    if program:
        return llmstack.program_name(program), []
    if llmstack.local_tiers(config):
        return None, [Need("", "there is no llama-server on this machine", "setup")]
    return None, []


def check_path(weights: Any, llmstack: Any) -> Dict[str, Any]:
    """A file of this disk as `check` shows it."""
    size = llmstack.file_size(weights.path)
    local, problem = "missing", f"there is no {weights.path}"
    if size:
        local, problem = "intact", ""
        damage = llmstack.file_damage(weights.path)
        if damage:
            local, problem = "damaged", f"{weights.path} {damage}"
    return {
        "path": weights.path,
        "exists": bool(size),
        "size_bytes": size,
        "local": local,
        "problem": problem,
        "quant": weights.quant,
    }


def check_weights(weights: Any, hub: Mapping[str, Any], env: Mapping[str, str],
                  llmstack: Any) -> Dict[str, Any]:
    """A tier's file as `check` shows it. `hub`: what ask_repo says of it."""
    if weights.path:
        return check_path(weights, llmstack)
    state, why = local_state(weights, env, hub, llmstack)
    problem = hub.get("problem", "")
    if why and not problem:
        problem = f"the local copy is {state}: {why}"
    return {
        "repo": weights.repo,
        "url": f"{llmstack.hub_endpoint(env)}/{weights.repo}",
        "file": weights.file,
        "quant": weights.quant,
        "exists": hub.get("exists"),
        "size_bytes": hub.get("size_bytes"),
        "changed": hub.get("changed"),
        "local": state,
        "problem": problem,
    }


def check_local(tier: Any, hub: HubFiles, busy: Iterable[Tuple[str, str]],
                env: Mapping[str, str], llmstack: Any) -> Dict[str, Any]:
    """A local tier's files, channel -> check_weights. `busy`: those that are being fetched."""
    files = {}
    for label in ("current", "next"):
        weights = llmstack.weights_for(tier.on_channel(label))
        if weights.channel != label:
            continue
        found = check_weights(weights, hub.get((weights.repo, weights.file), {}), env, llmstack)
        if (tier.name, label) in busy and found["local"] in ("missing", "partial"):
            found["local"] = "downloading"
        files[label] = found
    return files


def tier_needs(tier: Any, row: Mapping[str, Any]) -> List[Need]:
    """What is to be done about a tier. `row`: as check_stack has it."""
    needs = []
    if row.get("problem"):
        needs.append(Need(tier.name, f"{tier.name}: {row['problem']}"))
    mends_drift = ""
    if tier.backend == "gguf":
        mends_drift = "restart"
    for label in ("current", "next"):
        if label in row:
            needs += weights_needs(row[label], tier, label)
    for what in row["drift"]:
        needs.append(Need(tier.name, f"{tier.name}: DRIFT! {what}", mends_drift))
    return needs


def todo_words(needs: Sequence[Need], fetch_bytes: float) -> str:
    """The commands that do what is needed, in their order, then what only the user can mend."""
    words = []
    for command in ("setup", "download", "restart"):
        names = [need.tier for need in needs if need.command == command]
        if command == "download":
            command = " ".join([command, *dict.fromkeys(names)])
        if names:
            words.append(f"`llmstack {command}`")
        if names and fetch_bytes and command.startswith("download"):
            words[-1] += f" ({fetch_bytes / 1e9:.1f} GB)"
    mended = dict.fromkeys(need.tier or need.what for need in needs if not need.command)
    if mended:
        words.append("mend " + ", ".join(mended))
    return ", then ".join(words)


def tier_row(tier: Any, drift: Sequence[str], problem: str,
             files: Mapping[str, Any]) -> Dict[str, Any]:
    """A tier as `check --json` has it. `files`: of check_local, for a local one."""
    row = {"tier": tier.name, "role": tier.role, "backend": tier.backend, "drift": drift}
    if tier.backend == "gguf":
        return {**row, **files}
    return {**row, "model": tier.model, "model_next": tier.model_next or None, "problem": problem}


def all_drift(places: Any, config: Any, env: Mapping[str, str],
              llmstack: Any) -> Dict[str, List[str]]:
    """find_drift, and where litellm_config.yaml says other things than models.ini."""
    drift = find_drift(places, config, llmstack)
    litellm = llmstack.read_litellm_file(places, env)
    for difference in llmstack.litellm_differences(config, litellm):
        name, _, what = difference.partition(": ")
        drift.setdefault(name, []).append(what)
    return drift


def probe_problems(config: Any, places: Any, llmstack: Any) -> List[str]:
    """What a probe has found that keeps a tier from working, a line each."""
    probes = llmstack.known_probes(llmstack.true_config(config, places), os.environ, places.data)
    errors = {name: row.get("template_error") for name, row in probes.items()}
    return [f"{name}: its template does not compile: {llmstack.visible(error)}"
            for name, error in errors.items() if isinstance(error, str) and error]


def check_stack(places: Any, config: Any, env: Mapping[str, str], offline: bool,
                names: Sequence[str], llmstack: Any) -> Dict[str, Any]:
    """The value `check --json` prints: what is configured, on the hub, here and queued, by tier.

    `needs` says what the user must do, `todo` in one line. `names`: of tiers, all without.
    Errors: UserError for a name that is no tier's.
    """
    tiers = list(config.tiers)
    if names:
        tiers = llmstack.load_extra("download").named_tiers(config, names, llmstack)
    hub: HubFiles = {}
    notes: List[str] = []
    asked = None
    if not offline:
        asked = llmstack.hub_endpoint(env)
        hub, notes = ask_hub([tier for tier in tiers if tier.backend == "gguf"], env, llmstack)
    drift = all_drift(places, config, env, llmstack)
    unset = {**llmstack.missing_credentials(config, env),
             **llmstack.unserved_hosted(places, config, env)}
    busy = {(row["tier"], row["label"]) for row in llmstack.download_rows(places)
            if row["state"] in ("queued", "running")}
    server, needs = check_server(config, env, places.data, llmstack)
    rows = []
    for tier in tiers:
        files: Dict[str, Any] = {}
        if tier.backend == "gguf":
            files = check_local(tier, hub, busy, env, llmstack)
        row = tier_row(tier, drift.get(tier.name, []), unset.get(tier.name, ""), files)
        rows.append(row)
        needs += tier_needs(tier, row)
    needs += [Need("", problem) for problem in probe_problems(config, places, llmstack)]
    notes += llmstack.refused_notes(config, env, places.data)
    fetch = [row["current"] for row in rows if "current" in row]
    fetch_bytes = sum(file["size_bytes"] or 0 for file in fetch if file["local"] == "missing")
    return {
        "ok": not needs,
        "models_ini": places.models_ini,
        "hub": asked,
        "cache": llmstack.hub_cache_dir(env),
        "llama_server": server,
        "llama_swap": llmstack.find_llama_swap(env, places.data) or None,
        "tiers": rows,
        "needs": [need.what for need in needs],
        "todo": todo_words(needs, fetch_bytes),
        "notes": notes,
    }


# ---- the profiles' models


class ProfileFile(NamedTuple):
    """A model of the profiles, with what they say of it and what the hub does."""

    repo: str
    file: str
    size_gb: float                              # that counts: of share/models.json, else size_gb
    profiles: Tuple[str, ...]
    hub_gb: float = 0.0                         # 0: the hub has not said
    problem: str = ""


def counted_gb(weights: Any, models: Any, llmstack: Any) -> float:
    """The size that a file counts with. `models`: those of share/models.json."""
    known = llmstack.known_header(weights.file, weights.size_gb, models)
    if known:
        return float(known.tensor_bytes / 1e9)
    return float(weights.size_gb)


def profile_files(llmstack: Any) -> List[ProfileFile]:
    """Every file that a profile names, on either channel, once for each size it counts with."""
    found: Dict[Tuple[str, str, float], Dict[str, None]] = {}
    models = llmstack.known_models()
    for name in llmstack.PROFILES:
        text = llmstack.read_profile(name).decode("utf-8")
        for tier in llmstack.local_tiers(llmstack.parse_models_ini(text)[0]):
            for weights in llmstack.both_weights(tier):
                size_gb = counted_gb(weights, models, llmstack)
                found.setdefault((weights.repo, weights.file, size_gb), {})[name] = None
    return [ProfileFile(*key, tuple(users)) for key, users in sorted(found.items())]


def judged_file(row: ProfileFile, told: Mapping[str, Any]) -> ProfileFile:
    """`told`: what ask_repo says of it."""
    hub_gb = (told.get("size_bytes") or 0) / 1e9
    problem = str(told.get("problem") or "")
    if not problem and hub_gb and abs(hub_gb - row.size_gb) > SIZE_TOLERANCE * hub_gb:
        problem = f"the hub has {hub_gb:.2f} GB"
    return row._replace(hub_gb=hub_gb, problem=problem)


def check_profiles(env: Mapping[str, str], llmstack: Any) -> List[ProfileFile]:
    """The profiles' models against the hub. Errors: UserError where it cannot be asked."""
    rows = profile_files(llmstack)
    told: HubFiles = {}
    for repo in dict.fromkeys(row.repo for row in rows):
        files = [row.file for row in rows if row.repo == repo]
        found = ask_repo(repo, list(dict.fromkeys(files)), env, llmstack)
        told.update({(repo, file): said for file, said in found.items()})
    return [judged_file(row, told[row.repo, row.file]) for row in rows]


# ---- as people read it


class CheckLine(NamedTuple):
    """A tier's row of `check`, or that of its queued file; `note` may be a sentence."""

    tier: str
    role: str
    model: str
    size: str
    state: str
    note: str


def check_file_line(row: Mapping[str, Any], label: str, llmstack: Any) -> CheckLine:
    """A tier's row, or with the label "next" that of its queued file."""
    file, name = row[label], row["tier"]
    title, fetch = name, f"llmstack download {name}"
    drift = [f"DRIFT! {what}" for what in row["drift"]]
    if label == "next":
        title, fetch, drift = "  next", "queued", []
    notes = [file["problem"], *drift]
    if file["local"] == "missing" and not file["problem"]:
        notes = [fetch, *drift]
    return CheckLine(
        tier=title,
        role=row["role"] or "-",
        model=file.get("file") or os.path.basename(file["path"]),
        size=llmstack.size_words(file["size_bytes"] or 0),
        state=file["local"],
        note="; ".join(filter(None, notes)),
    )


def check_lines(row: Mapping[str, Any], llmstack: Any) -> List[CheckLine]:
    """The rows of a tier of check_stack: one, and one for its queued file."""
    if row["backend"] == "gguf":
        return [check_file_line(row, label, llmstack)
                for label in ("current", "next") if label in row]
    notes = [row["problem"], *(f"DRIFT! {what}" for what in row["drift"])]
    if row["model_next"]:
        notes.append(f"queued: {row['model_next']}")
    state = "served"
    if row["problem"]:
        state = "not served"
    return [CheckLine(row["tier"], row["role"] or "-", row["model"], "", state,
                      "; ".join(filter(None, notes)))]


def where_lines(row: Mapping[str, Any]) -> List[str]:
    """Where the files of a tier of check_stack come from."""
    lines = []
    for label in ("current", "next"):
        file = row.get(label)
        if file is None:
            continue
        where = file.get("path") or f"{file['url']} {file['file']}"
        if file.get("changed"):
            where += f", changed {file['changed']}"
        lines.append(f"{label:<8}  {where}")
    return lines


def render_check(found: Mapping[str, Any], width: int, colour: Callable[[str, str], str],
                 detailed: bool, llmstack: Any) -> List[str]:
    """The value of check_stack as a table, and a line of what to do.

    `detailed`: with where each file comes from.
    """
    lines = [line for row in found["tiers"] for line in check_lines(row, llmstack)]
    shown: List[str] = llmstack.render_table(lines, width, colour)
    if detailed:
        for row in found["tiers"]:
            for line in where_lines(row):
                shown += llmstack.wrapped_lines(line, width, " " * 10)
    swap = found["llama_swap"] or "none; the embedded engine serves"
    shown += ["", f"llama-server  {found['llama_server'] or 'none'}"]
    shown += llmstack.wrapped_lines(f"llama-swap    {swap}", width, " " * 14)
    if found["ok"]:
        return [*shown, colour("All is as it should be.", "32")]
    todo: List[str] = llmstack.wrapped_lines(f"To do: {found['todo']}.", width, "  ")
    todo[0] = todo[0].replace("To do:", colour("To do:", "33"))
    return shown + todo


def render_profiles(rows: Sequence[ProfileFile], llmstack: Any) -> List[str]:
    """The files of the profiles as people read them."""
    lines = []
    for row in rows:
        mark = llmstack.paint("as said", "32")
        if row.problem:
            mark = llmstack.paint("differs", "31")
        words = f"{mark}  {row.size_gb:.2f} GB  {row.repo}:{row.file}"
        lines.append(f"{words}  (profile {', '.join(row.profiles)})")
        if row.problem:
            lines.append(f"         {llmstack.visible(row.problem)}")
    return lines


# ---- the command


def run_profiles(is_json: bool, llmstack: Any) -> Any:
    """`check --profiles`. Errors: UserError where the hub cannot be asked."""
    rows = check_profiles(os.environ, llmstack)
    found = [row._asdict() for row in rows]
    code = int(any(row.problem for row in rows))
    return llmstack.Result(found, render_profiles(rows, llmstack), code, is_json)


def main(argv: Sequence[str], llmstack: Any) -> Any:
    parser = llmstack.extra_parser("check", __doc__)
    parser.add_argument("tiers", metavar="TIER", nargs="*",
                        help="these only, and where their files come from")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub")
    parser.add_argument("--profiles", action="store_true",
                        help="instead: the models of all profiles, and their sizes, on the hub")
    args = parser.parse_args(list(argv))
    if args.profiles:
        return run_profiles(args.json, llmstack)
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    config = llmstack.planned_config(places, llmstack.warn)
    found = check_stack(places, config, os.environ, args.offline, args.tiers, llmstack)
    width = llmstack.output_columns()
    lines = render_check(found, width, llmstack.paint, bool(args.tiers), llmstack)
    return llmstack.Result(found, lines, int(not found["ok"]), args.json, found["notes"])
