"""Delete every parked conversation.

What the models' slots held when they stopped, of all projects on this machine. Models that are
loaded keep theirs until they stop: `llmstack stop --forget` ends both.

examples:
  llmstack forget                           # what is parked, of all projects
  llmstack stop --forget                    # and what loaded models hold
"""

from __future__ import annotations

import os
from typing import Any, Sequence


def main(argv: Sequence[str], llmstack: Any) -> int:
    llmstack.extra_parser("forget", __doc__).parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.say_forgotten(places)
    if llmstack.running_record(places):
        llmstack.say("Loaded models keep theirs until they stop:"
                     " `llmstack stop --forget` ends both.")
    return 0
