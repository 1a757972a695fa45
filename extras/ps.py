"""Show the requests that are being answered now.

examples:
  llmstack ps
  llmstack ps --json
"""

from __future__ import annotations

import json
import os
from typing import Any, Dict, List, Sequence

HEADINGS = ("id", "conversation", "model", "tier", "stage", "since")


def ask_requests(upstream: Any, llmstack: Any) -> List[Dict[str, Any]]:
    """The rows of /llmstack/requests. Errors: UserError."""
    try:
        response, body = upstream.get("/llmstack/requests", 5.0)
        said = json.loads(body)
    except (OSError, ValueError, RecursionError):
        response, said = None, None
    if response is not None and response.status == 404:
        raise llmstack.UserError("this router does not tell what it is doing",
                                 "`llmstack restart` brings up one that does")
    if response is not None and response.status == 401:
        raise llmstack.UserError("the router wants its key", "set LLMSTACK_API_KEY to it")
    rows = said.get("requests") if isinstance(said, dict) else said
    if response is None or response.status != 200 or not isinstance(rows, list):
        raise llmstack.UserError(f"no answer from {upstream.url}", "see `llmstack status`")
    return [row for row in rows if isinstance(row, dict)]


def cells(row: Dict[str, Any], llmstack: Any) -> List[str]:
    """A request as the columns of the table."""
    texts = [llmstack.visible(str(row.get(key, "")), 40) for key in HEADINGS[:-1]]
    since_s = row.get("since_s")
    if isinstance(since_s, (int, float)) and 0 <= since_s < 1e9:
        return [*texts, llmstack.span_words(since_s)]
    return [*texts, ""]


def ps_lines(rows: Sequence[Dict[str, Any]], llmstack: Any) -> List[str]:
    """The requests as a table without its empty columns."""
    if not rows:
        return ["Nothing is being answered."]
    texts = [cells(row, llmstack) for row in rows]
    columns = [column for column in zip(HEADINGS, *texts) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for line in zip(*columns):
        padded = [f"{cell:<{width}}" for cell, width in zip(line, widths)]
        lines.append("  ".join(padded).rstrip())
    return lines


def main(argv: Sequence[str], llmstack: Any) -> Any:
    parser = llmstack.extra_parser("ps", __doc__)
    parser.add_argument("--demo", action="store_true", help="the demo's")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(list(argv))
    upstream, _ = llmstack.running_router(llmstack.find_places(os.environ, args.demo))
    rows = ask_requests(upstream, llmstack)
    return llmstack.Result(rows, ps_lines(rows, llmstack), is_json=args.json)
