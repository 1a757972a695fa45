"""Show every GGUF on this disk: which tier runs it, its size, when it was last used.

Looked through are the hub cache, whose models other programs may use as well, and the paths that
models.ini names.

examples:
  llmstack list
  llmstack list --json
"""

from __future__ import annotations

import os
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple


class Held(NamedTuple):
    """One model on this disk."""

    name: str                                   # OWNER/NAME:FILE, or a path
    paths: Tuple[str, ...]                      # of all its parts that are here
    size_bytes: int
    used_s: float                               # seconds since the epoch, as far as the disk knows
    problem: str                                # why it cannot be loaded, "" where it can
    tiers: Tuple[str, ...]                      # of this project


def wanted_by(config: Any, llmstack: Any) -> Dict[Tuple[str, str], List[str]]:
    """(repository, file) -> the tiers that need it. A path has no repository."""
    found: Dict[Tuple[str, str], List[str]] = {}
    for tier in config.tiers:
        if tier.backend != "gguf":
            continue
        for weights in llmstack.both_weights(tier):
            where = (weights.repo, weights.file) if weights.repo else ("", weights.path)
            names = found.setdefault(where, [])
            label = f"{tier.name} (next)" if weights.channel == "next" else tier.name
            if label not in names:
                names.append(label)
        for where in {*llmstack.hub_files(tier), *llmstack.hub_files(tier.on_channel("next"))}:
            found.setdefault(where, []).append(tier.name)
    return found


def cache_files(cache: str) -> Iterator[Tuple[str, str, str]]:
    """(repository, file, path) of every GGUF in the hub cache, of whatever commit."""
    try:
        folders = sorted(os.listdir(cache))
    except OSError:
        return
    for folder in folders:
        if not folder.startswith("models--"):
            continue
        repo = folder[len("models--"):].replace("--", "/", 1)
        snapshots = os.path.join(cache, folder, "snapshots")
        for root, _, names in os.walk(snapshots):
            for name in sorted(names):
                path = os.path.join(root, name)
                parts = os.path.relpath(path, snapshots).split(os.sep)
                if name.endswith(".gguf"):
                    yield repo, "/".join(parts[1:]), path


def is_model_here(llmstack: Any, name: str, paths: Sequence[str], tiers: Sequence[str]) -> Held:
    """What there is to say of a model whose parts are `paths`."""
    size_bytes, used_s, problem = 0, 0.0, ""
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            problem = "is not here"
            continue
        size_bytes += status.st_size
        used_s = max(used_s, status.st_atime, status.st_mtime)
        problem = problem or llmstack.file_damage(path)
    return Held(name, tuple(paths), size_bytes, used_s, problem, tuple(tiers))


def held_models(config: Any, env: Any, llmstack: Any) -> List[Held]:
    """Every model on this disk, by name."""
    wanted = wanted_by(config, llmstack)
    parts: Dict[Tuple[str, str], Dict[str, str]] = {}
    for repo, file, path in cache_files(llmstack.hub_cache_dir(env)):
        first = llmstack.split_parts(file)[0]
        parts.setdefault((repo, first), {})[file] = path
    found = []
    for (repo, first), paths in parts.items():
        tiers = wanted.get((repo, first), [])
        if llmstack.choose_projector([first]):
            tiers = tiers + wanted.get((repo, llmstack.ANY_PROJECTOR), [])
        held = is_model_here(llmstack, f"{repo}:{first}", list(paths.values()), tiers)
        missing = [part for part in llmstack.split_parts(first) if part not in paths]
        if missing:
            held = held._replace(problem=f"lacks {len(missing)} of its parts")
        found.append(held)
    for (repo, path), tiers in wanted.items():
        if not repo and path:
            found.append(is_model_here(llmstack, path, [path], tiers))
    return sorted(found, key=lambda held: held.name)


def find_held(models: Sequence[Held], asked: str, llmstack: Any) -> Held:
    """The one that a name, or an end of it, means. Errors: UserError."""
    those = [held for held in models if held.name == asked]
    those = those or [held for held in models if held.name.split(":")[0] == asked]
    those = those or [held for held in models if held.name.endswith(("/" + asked, ":" + asked))]
    if len(those) == 1:
        return those[0]
    if those:
        names = ", ".join(held.name for held in those)
        raise llmstack.UserError(f"{asked} may be any of {len(those)} models",
                                 llmstack.visible(f"one of {names}"), 2)
    near = llmstack.unknown_word(asked, [held.name for held in models])
    raise llmstack.UserError(f"there is no model {near} on this disk",
                             "`llmstack list` names them", 2)


def remove(held: Held, kept: Sequence[Held], cache: str) -> int:
    """Delete a model of the hub cache, links and data; the bytes that are free then.

    Data that another model's link leads to stays. Errors: OSError.
    """
    needed: Set[str] = {os.path.realpath(path) for other in kept for path in other.paths}
    root, freed = os.path.realpath(cache) + os.sep, 0
    for path in held.paths:
        data = os.path.realpath(path)
        if os.path.islink(path):
            os.unlink(path)
        is_ours = data.startswith(root)         # a link may lead to a file of the user's
        if is_ours and data not in needed and os.path.isfile(data):
            freed += os.stat(data).st_size
            os.unlink(data)
    return freed


def remove_agreed(unwanted: Sequence[Held], models: Sequence[Held], question: str, hint: str,
                  llmstack: Any) -> Optional[int]:
    """Delete these of the models, once a person says so; the bytes, or None where nobody does.

    Without a question nobody is asked. Errors: UserError.
    """
    if question and not llmstack.agreed(question, "nothing is deleted", hint):
        return None
    kept = [held for held in models if held not in unwanted]
    freed, cache = 0, llmstack.hub_cache_dir(os.environ)
    for held in unwanted:
        try:
            freed += remove(held, kept, cache)
        except OSError as exc:
            raise llmstack.UserError(f"{held.name} cannot be deleted: {exc}",
                                     llmstack.path_hint(exc)) from None
    return freed


def list_lines(models: Sequence[Any], llmstack: Any) -> List[str]:
    """Two lines a model."""
    if not models:
        return ["There is no model on this disk. `llmstack download` fetches the tiers' own."]
    lines = []
    for held in models:
        used = llmstack.span_words(max(0.0, time.time() - held.used_s)) + " ago"
        tiers = ", ".join(held.tiers) or "no tier of this project"
        state = held.problem or "complete"
        lines.append(llmstack.visible(held.name, 200))
        lines.append(llmstack.visible(
            f"  {held.size_bytes / 1e9:,.2f} GB, {state}, used {used}: {tiers}", 200))
    return lines


def main(argv: Sequence[str], llmstack: Any) -> Any:
    parser = llmstack.extra_parser("list", __doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    models = held_models(llmstack.planned_config(places), os.environ, llmstack)
    rows = [held._asdict() for held in models]
    return llmstack.Result(rows, list_lines(models, llmstack), is_json=args.json)
