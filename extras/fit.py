"""Show what each tier takes in memory, and what fits together here.

Weights, KV cache and buffers of each tier, from the header of its GGUF on this disk or the hub.
Exit code 1 when a tier cannot fit.

examples:
  llmstack fit                              # memory, tier by tier
  llmstack fit --next code-smart            # of the queued upgrade of one
"""

from __future__ import annotations

import os
import re
import textwrap
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

COLUMNS = 60                                    # of the table, where no name is long
PARTS = ("weights", "KV", "state", "compute", "CUDA", "least cache")
SOURCES = {                                     # what a tier's need is reckoned by
    "local": "by its file",
    "hub": "by its header on the hub",
    "dimensions": "by its published dimensions",
    "size_gb": "by size_gb x 1.1",
    "broken": "its file is broken",
    "unknown": "its size is not known",
    "hosted": "hosted",
}


class Device(NamedTuple):
    """What llama-server can load layers on; MiB."""

    name: str                                   # as `device` of models.ini names it
    description: str
    total_mib: int
    free_mib: int


DEVICE = re.compile(r"\s+([\w.:-]+): (.+) \(([0-9]{1,9}) MiB, ([0-9]{1,9}) MiB free\)\s*\Z")


def parse_devices(text: str) -> List[Device]:
    """What `llama-server --list-devices` prints. Source: arg.cpp, b11669."""
    found = filter(None, map(DEVICE.match, text.splitlines()))
    return [Device(m.group(1), m.group(2), int(m.group(3)), int(m.group(4))) for m in found]


def list_devices(program: Sequence[str], llmstack: Any) -> List[Device]:
    """The devices of a llama-server; none where it has none, or is too old to say."""
    if not program:
        return []
    return parse_devices(llmstack.program_output([*program, "--list-devices"]))


def fit_sets(config: Any, fits: Sequence[Any], budgets_gb: Sequence[float],
             llmstack: Any) -> List[Tuple[Tuple[str, ...], float]]:
    """Every set of the matrix, whether or not it fits, with what it needs in GB.

    With a budget, the sets that grow within it follow.
    """
    need = {f.name: f.need_gb for f in fits}
    needs = {f.name: f.needs for f in fits}
    sets = [s.tiers for s in llmstack.residency_sets(config)]
    grown = []
    if budgets_gb:
        known = config._replace(tiers=tuple(t for t in config.tiers if t.name in need))
        grown = [s.tiers for s in llmstack.residency_sets(known, needs, budgets_gb)]
    sets += [tiers for tiers in grown if len(tiers) > 1 and tiers not in sets]
    return [(tiers, sum(need[t] for t in tiers)) for tiers in sets if need.keys() >= set(tiers)]


def running_machine(places: Any, config: Any, llmstack: Any) -> Optional[Any]:
    """The budget that the project's daemon goes by, None where there is none.

    It was taken before the daemon's own models filled the card. A memory_gb in models.ini is news.
    """
    record = llmstack.running_record(places)
    if record is None:
        return None
    told = llmstack.asked_json(llmstack.router_upstream(record, places.env), "/llmstack/memory")
    budget_gb, host_gb, source = told.get("budget_gb"), told.get("host_gb"), told.get("source")
    if not isinstance(budget_gb, float) or not isinstance(host_gb, float):
        return None
    if config.memory_gb or not isinstance(source, str) or "memory_gb" in source:
        return None
    cards = told.get("cards")
    each: Tuple[float, ...] = ()
    if isinstance(cards, list):
        each = tuple(gb for gb in cards if isinstance(gb, float))
    has_gpu, has_cuda = told.get("gpu") is True, told.get("cuda") is True
    return llmstack.Machine(budget_gb, source, has_gpu, has_cuda, host_gb, each)


def chosen_tiers(config: Any, names: Sequence[str], llmstack: Any) -> List[str]:
    """The names of the tiers to show, all without `names`. Errors: UserError."""
    for name in names:
        if config.by_name(name) is None:
            raise llmstack.UserError(f"there is no tier {name}",
                                     "one of " + ", ".join(t.name for t in config.tiers), 2)
    asked = set(names)
    return [t.name for t in config.tiers if not asked or asked & {t.name, *t.aliases}]


def wrapped(text: str, indent: str) -> List[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=indent, subsequent_indent=indent,
                         break_long_words=False, break_on_hyphens=False)


def card_words(needs: Sequence[float], cards: Sequence[int], devices: Sequence[Device]) -> str:
    """`4.20 on CUDA0 and 2.10 on CUDA1`, by the names that llama-server gives them."""
    words = []
    for card in cards:
        name = devices[card].name if card < len(devices) else f"card {card}"
        words.append(f"{needs[card]:.2f} on {name}")
    return " and ".join(words)


def tier_lines(fit: Any, width: int, devices: Sequence[Device], llmstack: Any) -> List[str]:
    """A tier's row, and below it what it is made of and where that is known from."""
    total, largest, parts = f"~{fit.need_gb:.1f}", "?", []
    if fit.memory is not None:
        total, largest = f"{fit.need_gb:.2f}", f"{fit.largest_ctx:,}"
        sizes = zip(PARTS, fit.memory)
        parts = [f"{name} {size / 1e9:.2f}" for name, size in sizes if size]
    if fit.host_gb:
        parts.append(f"{fit.host_gb:.2f} of these on the host")
    if fit.cache_mib:
        parts.append(f"prompt cache up to {fit.cache_mib * llmstack.MIB / 1e9:.2f}")
    if fit.cards:
        parts.append(card_words(fit.needs, fit.cards, devices))
    parts.append(SOURCES[fit.source])
    verdict = llmstack.paint("does not fit", "31")
    if fit.fits:
        verdict = llmstack.paint("fits", "32")
    row = f"{fit.name:<{width}}{total:>8}{fit.ctx_size:>10,}{largest:>10}  {verdict}"
    return [row, *wrapped(", ".join(parts), "  "), *wrapped(fit.note, "  ")]


def device_lines(devices: Sequence[Device], llmstack: Any) -> List[str]:
    lines = []
    for device in devices:
        size_gb = device.total_mib * llmstack.MIB / 1e9
        free_gb = device.free_mib * llmstack.MIB / 1e9
        name = f"{device.name}: {llmstack.visible(device.description)}"
        lines += wrapped(f"{name}, {size_gb:.1f} GB, {free_gb:.1f} free now", "  ")
    return lines


def fit_lines(machine: Any, devices: Sequence[Device], fits: Sequence[Any],
              sets: Sequence[Dict[str, Any]], llmstack: Any) -> List[str]:
    width = max([4, *(len(fit.name) for fit in fits)])
    lines = wrapped(f"Budget {machine.budget_gb:.1f} GB: {machine.source}", "")
    lines += device_lines(devices, llmstack)
    lines += ["", f"{'tier':<{width}}{'GB':>8}{'ctx_size':>10}{'largest':>10}"]
    for fit in fits:
        lines += tier_lines(fit, width, devices, llmstack)
    if sets:
        lines += ["", "Together, in GB:"]
    for together in sets:
        lines.append(f"  {together['need_gb']:>6.2f}  {' + '.join(together['tiers'])}")
        if len(machine.cards) > 1:
            cards = range(len(machine.cards))
            lines += wrapped(card_words(together["each_gb"], cards, devices), " " * 10)
        if not together["fits"]:
            lines.append("          " + llmstack.paint("does not fit: they take turns", "33"))
    return lines


def together_rows(config: Any, fits: Sequence[Any], budgets_gb: Sequence[float],
                  llmstack: Any) -> List[Dict[str, Any]]:
    """The sets of tiers that are loaded together, and whether each fits."""
    needs_of = {fit.name: fit.needs for fit in fits}
    rows = []
    for tiers, need_gb in fit_sets(config, fits, budgets_gb, llmstack):
        each_gb = llmstack.needs_together(needs_of[name] for name in tiers)
        rows.append({"tiers": tiers, "need_gb": need_gb, "each_gb": each_gb,
                     "fits": llmstack.fits_together([each_gb], budgets_gb)})
    return rows


def seen_devices(config: Any, places: Any, llmstack: Any) -> List[Device]:
    """What llama-server lists; nothing where there is none to ask."""
    try:
        program = llmstack.find_llama_server(config, places.env, places.data)
    except llmstack.UserError:                  # which is said where it matters
        return []
    return list_devices(program, llmstack)


def as_row(fit: Any) -> Dict[str, Any]:
    row: Dict[str, Any] = fit._asdict()
    if fit.memory:
        row["memory"] = fit.memory.parts
    return row


def main(argv: Sequence[str], llmstack: Any) -> Any:
    parser = llmstack.extra_parser("fit", __doc__)
    parser.add_argument("tiers", metavar="TIER", nargs="*", help="these only")
    parser.add_argument("--next", action="store_const", const="next", default="",
                        help="the queued upgrades (hf_file_next)")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    config = llmstack.planned_config(places, llmstack.warn)
    chosen = chosen_tiers(config, args.tiers, llmstack)
    config = config.on_channel(llmstack.chosen_channel(places, config, args.next))
    config = llmstack.true_config(config, places, llmstack.warn)
    machine = running_machine(places, config, llmstack) or llmstack.this_machine(config)
    devices = seen_devices(config, places, llmstack) if machine.gpu else []
    fits = llmstack.measure_tiers(config, machine, os.environ, True)
    held = llmstack.held_contexts(places)
    fits = [fit._replace(ctx_size=min(fit.ctx_size, held.get(fit.name) or fit.ctx_size))
            for fit in fits if fit.name in chosen]
    sets = together_rows(config, fits, machine.budgets_gb, llmstack)
    found = {"budget_gb": machine.budget_gb, "budget_source": machine.source,
             "host_gb": machine.host_gb,
             "devices": [device._asdict() for device in devices],
             "tiers": [as_row(fit) for fit in fits], "sets": sets}
    lines = fit_lines(machine, devices, fits, sets, llmstack)
    return llmstack.Result(found, lines, int(not all(fit.fits for fit in fits)), args.json)
