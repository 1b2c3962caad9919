"""A command as a user types it, in this process: what it prints, and its exit code checked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmedrag.cli.main import main


def call(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> Any:
    """The JSON on stdout, or what stands on stderr where there is none."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) == code, err
    return json.loads(out) if out else err
