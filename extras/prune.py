"""Delete the models of the hub cache that no tier of this project names.

Other projects and other programs may use them: they are shown, and you are asked.

examples:
  llmstack prune
  llmstack prune --yes
"""

from __future__ import annotations

import os
from typing import Any, Sequence


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("prune", __doc__)
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    args = parser.parse_args(list(argv))
    listing = llmstack.load_extra("list")
    places = llmstack.find_places(os.environ)
    models = listing.held_models(llmstack.load_config(places), os.environ, llmstack)
    unnamed = [held for held in models if not held.tiers]
    if not unnamed:
        llmstack.say("Every model in the hub cache belongs to a tier of this project.")
        return 0
    for held in unnamed:
        llmstack.say(llmstack.visible(f"{held.size_bytes / 1e9:10,.2f} GB  {held.name}", 200))
    llmstack.say("Other projects and programs may use them.")
    question = f"Delete these {len(unnamed)}? [y/N] "
    hint = "say --yes, or delete one: llmstack rm MODEL"
    if args.yes:
        question = ""
    freed = listing.remove_agreed(unnamed, models, question, hint, llmstack)
    if freed is None:
        return 0
    llmstack.say(f"{freed / 1e9:,.2f} GB are free again.")
    return 0
