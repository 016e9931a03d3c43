"""`mla-harness show`."""

from __future__ import annotations

from typing import Annotated

import typer

from cases import parse
from cases.contract import contract_of


def show(case: Annotated[str, typer.Argument(help="The case, as text.")]) -> None:
    """Draw a batch: its rows, blocks and metadata."""
    from harness.picture import draw

    parsed = parse(case)
    contract_of(parsed, case)
    print(draw(parsed))


COMMAND = show
