"""What schemathesis is told beside the description: it loads this module."""

from __future__ import annotations

import re
from typing import Any

import schemathesis  # type: ignore[import-not-found, unused-ignore]  # of the group `fuzz`

_TIMELINE = re.compile(r"(1~)[1-9][0-9]{0,9}(-[0-9a-z]{8,32}~)")


@schemathesis.hook
def before_call(_context: object, case: Any, _kwargs: dict[str, Any]) -> None:
    """Have tokens come from the first timeline.

    One that only a later primary can have given out is answered with a 503, and should be: that primary may be
    there, and not known here yet. Here there is none, and a server's error is what is looked for.
    """
    if token := (case.headers or {}).get("Rocket-Session"):
        case.headers["Rocket-Session"] = _TIMELINE.sub(r"\g<1>1\g<2>", token)
