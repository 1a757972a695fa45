"""Make a tier's queued upgrade its current model.

The values of hf_repo_next, hf_file_next, model_next, size_gb_next and quant_next take the places of
those without _next, whose lines go. No other byte of models.ini changes.

examples:
  llmstack promote code-smart
  llmstack promote plan && llmstack restart
"""

from __future__ import annotations

import os
from typing import Any, List, Sequence

SUFFIX = "_next"
KEYS = ("hf_repo", "hf_file", "model", "size_gb", "quant")


def promoted(text: str, tier: Any, llmstack: Any) -> str:
    """The text of a models.ini in which a tier runs what was queued."""
    config = llmstack.load_extra("config")
    for key in KEYS:
        options = llmstack.TIER_OPTIONS
        queued = config.written(text, config.Place(tier.name, key + SUFFIX, options[key + SUFFIX]),
                                llmstack)
        if queued is None:
            continue
        lines: List[str] = text.split("\n")
        del lines[queued.number - 1]
        text = "\n".join(lines)
        if queued.value:
            place = config.Place(tier.name, key, options[key])
            text = config.with_value(text, place, queued.value, llmstack)
    return text


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("promote", __doc__)
    parser.add_argument("tier", metavar="TIER")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    config_extra = llmstack.load_extra("config")
    data = config_extra.read_ini(places, llmstack)
    bom = b"\xef\xbb\xbf" if data.startswith(b"\xef\xbb\xbf") else b""
    text = llmstack.decode_models_ini(data, places.models_ini)
    config, _ = llmstack.parse_models_ini(text, places.models_ini)
    tier = config.by_name(args.tier)
    if tier is None:
        names = [tier.name for tier in config.tiers]
        raise llmstack.UserError(f"there is no tier {llmstack.unknown_word(args.tier, names)}",
                                 "its tiers are " + ", ".join(names), 2)
    if not tier.has_next:
        raise llmstack.UserError(f"{tier.name} has no queued upgrade",
                                 "name one in hf_file_next or model_next of its section")
    if tier.path:
        raise llmstack.UserError(f"{tier.name} runs the file that `path` names",
                                 "take that line out, so that hf_repo and hf_file count")
    new = promoted(text, tier, llmstack)
    changed, _ = llmstack.parse_models_ini(new, places.models_ini)
    config_extra.write_ini(places, bom + new.encode(), llmstack)
    now, before = changed.by_name(tier.name), tier
    said = f"{tier.name} runs {now.hf_file or now.model}; it was {before.hf_file or before.model}"
    llmstack.say(llmstack.visible(said, 300))
    return 0
