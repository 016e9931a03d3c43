"""`mla-harness list`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from harness import listing
from harness.plan import require_match


def list_(
    what: Annotated[str, typer.Argument(help="|".join(listing.LISTINGS))],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    suite: Annotated[str, typer.Option(help="Which suite's cases.")] = "smoke",
) -> None:
    """List what there is."""
    require_match("listing", what, listing.LISTINGS)
    rows = listing.LISTINGS[what](suite)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    width = max((len(str(row["name"])) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['summary']}")


COMMAND = list_
