"""Delete a model from the hub cache of this machine.

MODEL is a name of `llmstack list`, or its file or repository where that says which one. What a tier
of this project runs is deleted only with --force; what lies outside the cache never is.

examples:
  llmstack rm unsloth/Qwen3-8B-GGUF:Qwen3-8B-Q4_K_M.gguf
  llmstack rm Qwen3-8B-Q4_K_M.gguf --yes
"""

from __future__ import annotations

import os
from typing import Any, Sequence


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("rm", __doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--force", action="store_true", help="also what a tier runs")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    args = parser.parse_args(list(argv))
    listing = llmstack.load_extra("list")
    places = llmstack.find_places(os.environ)
    models = listing.held_models(llmstack.planned_config(places), os.environ, llmstack)
    held = listing.find_held(models, args.model, llmstack)
    if ":" not in held.name or os.path.isabs(held.name):
        raise llmstack.UserError(f"{held.name} is not in the hub cache", "delete it yourself")
    if held.tiers and not args.force:
        raise llmstack.UserError(f"{held.name} belongs to {', '.join(held.tiers)}",
                                 "take it out of models.ini first, or say --force")
    question = f"Delete {held.name} ({held.size_bytes / 1e9:,.2f} GB)? [y/N] "
    if args.yes:
        question = ""
    freed = listing.remove_agreed([held], models, question, "say --yes", llmstack)
    if freed is None:
        return 0
    llmstack.say(f"Deleted {held.name}: {freed / 1e9:,.2f} GB are free again.")
    return 0
