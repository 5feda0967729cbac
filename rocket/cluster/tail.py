"""Reading a log while it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_LARGEST_PIECE = 256 * 1024


class Tail:
    """Reads a growing file in whole lines."""

    def __init__(self, path: Path, position: int) -> None:
        self._path = path
        self._position = position

    def new_lines(self) -> list[str]:
        """Return what has been written since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                piece = file.read(_LARGEST_PIECE)
        except FileNotFoundError:
            return []
        whole = len(piece) if len(piece) == _LARGEST_PIECE else piece.rfind(b"\n") + 1
        self._position += whole
        return piece[:whole].decode(errors="replace").splitlines()
