"""Install what hosted tiers are served by.

LiteLLM's proxy from PyPI, 170 MB, into a private environment of llmstack; nothing is put into
your Python. Where LiteLLM is there already, nothing is done.

examples:
  llmstack install-litellm                  # what hosted tiers are served by
  llmstack install-litellm --force          # anew
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Sequence


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("install-litellm", __doc__)
    parser.add_argument("--force", "-f", action="store_true", help="install it anew")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    found = llmstack.find_litellm(os.environ, places.data)
    if found and not args.force:
        llmstack.say(f"LiteLLM is here: {found[0]}")
        return 0
    if args.force:
        directory = llmstack.environment_dir(llmstack.LITELLM, places.data)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, "ready"))
    llmstack.install_environment(llmstack.LITELLM, places.data, llmstack.say)
    llmstack.say("LiteLLM is installed. Name a hosted model in models.ini (code-ultra waits"
                 " there), then: llmstack restart")
    return 0
