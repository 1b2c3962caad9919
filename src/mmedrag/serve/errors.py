"""What a request is refused with: a status, one line, and a stable code."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request that is not served. ``message`` is for the caller and names no path."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """The one shape of an error, that of the OpenAI API."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": None}}


def bad(message: str, code: str = "bad_request") -> Refused:
    return Refused(400, code, message)
