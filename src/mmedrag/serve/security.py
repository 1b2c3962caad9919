"""Who may do what: API keys hashed at rest, scopes, rate limits, hosts, security headers.

A key is ``mmr_NAME_SECRET`` with 32 random bytes of secret. The key file holds, one per line,
``NAME:SCOPES:SALT:SHA256(SALT + SECRET)``; a fast hash is right for a secret of 256 random bits
(a slow one is for passwords). Scopes: ``read`` (references, model list, metrics) and ``ask``
(answers and reports).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedrag.records import UserError
from mmedrag.runtime import append_bytes, open_log
from mmedrag.serve.errors import Refused
from mmedrag.serve.settings import KEYS, LOOPBACK

SCOPES = ("read", "ask")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Key:
    name: str
    scopes: frozenset[str]
    salt: str
    digest: str


class Keys:
    """The keys that may be used; none at all means that no key is asked for."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self._keys = {key.name: key for key in keys}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def check(self, header: str | None, scope: str) -> str:
        """The name of the key in an ``Authorization: Bearer`` header.

        Raises:
            Refused: 401 no or wrong key, 403 a key without ``scope``.
        """
        if not self._keys:
            return "-"
        kind, _, given = (header or "").partition(" ")
        parts = given.strip().split("_", 2)
        name, secret = (parts[1], parts[2]) if len(parts) == 3 else ("", "")
        key = self._keys.get(name, Key("", frozenset(), "", "0" * 64))
        right = hmac.compare_digest(digest(key.salt, secret), key.digest)
        if kind.lower() != "bearer" or parts[0] != "mmr" or not right:
            raise Refused(401, "unauthorised", "an API key is needed: Authorization: Bearer KEY")
        if scope not in key.scopes:
            raise Refused(403, "forbidden", f"this API key lacks the scope {scope!r}")
        return key.name


def digest(salt: str, secret: str) -> str:
    return hashlib.sha256((salt + secret).encode("utf-8", "replace")).hexdigest()


def new_key(path: Path, name: str, scopes: tuple[str, ...]) -> str:
    """Add a key to the key file (made with mode 0600) and return it: it is shown once.

    Raises:
        UserError: a name that is taken or not plain, or an unknown scope.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", name):
        raise UserError(f"key name {name!r}: expected letters, digits and hyphens")
    for scope in scopes:
        if scope not in SCOPES:
            raise UserError(f"scope {scope!r}: expected {' or '.join(SCOPES)}")
    if path.exists() and any(key.name == name for key in _read(path)):
        raise UserError(f"{path}: has a key named {name!r} already")
    secret, salt = secrets.token_urlsafe(32), secrets.token_hex(16)
    line = f"{name}:{','.join(sorted(set(scopes)))}:{salt}:{digest(salt, secret)}\n"
    with open_log(path, 0o600) as file:
        append_bytes(file, line.encode())
    return f"mmr_{name}_{secret}"


def load_keys(environment: dict[str, str] | os._Environ[str] = os.environ) -> Keys:
    """The keys of the file that ``MMEDRAG_API_KEYS`` names; none when it is not set.

    Raises:
        UserError: the file cannot be read, is open to others, or holds no sound key. Reading by
            the group is allowed: that is how orchestrators hand secrets to an unprivileged user.
    """
    name = environment.get(KEYS)
    if not name:
        return Keys()
    path = Path(name)
    found = _read(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o037:
        raise UserError(f"{path}: others can read or change the API keys, expected mode 600 or 640")
    if not found:
        raise UserError(f"{path}: holds no API key, make one with: mmedrag serve key NAME")
    return Keys(tuple(found))


def _read(path: Path) -> list[Key]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{path}: API keys cannot be read: {reason}") from None
    found: list[Key] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.strip().split(":")
        scopes = set(parts[1].split(",")) if len(parts) == 4 else set()
        sound = len(parts) == 4 and re.fullmatch(r"[0-9a-f]{64}", parts[3]) and parts[2]
        if not sound or not scopes or scopes - set(SCOPES):
            raise UserError(f"{path}:{number}: expected NAME:SCOPES:SALT:SHA256")
        if any(key.name == parts[0] for key in found):
            raise UserError(f"{path}:{number}: a second key named {parts[0]!r}")
        found.append(Key(parts[0], frozenset(scopes), parts[2], parts[3]))
    return found


def may_bind(host: str, keys: Keys) -> None:
    """Refuse to be reachable from elsewhere without keys."""
    if host not in LOOPBACK and not keys:
        raise UserError(
            f"--host {host}: reachable from other machines, which needs API keys: "
            f"make one with `mmedrag serve key NAME --file FILE` and set {KEYS}=FILE"
        )


class Rate:
    """A token bucket per caller: ``per_minute`` on average, ``burst`` at once; 0: no limit."""

    def __init__(
        self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate, self.burst, self.clock = per_minute / 60, max(1, burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, who: str) -> None:
        """Raises:
        Refused: 429, with the seconds until the next one is allowed.
        """
        if self.rate <= 0:
            return
        with self._lock:
            now = self.clock()
            tokens, last = self._buckets.pop(who, (float(self.burst), now))
            tokens = min(self.burst, tokens + (now - last) * self.rate)
            allowed = tokens >= 1
            self._buckets[who] = (tokens - 1 if allowed else tokens, now)
            while len(self._buckets) > 10_000:  # the longest unseen
                self._buckets.popitem(last=False)
        if not allowed:
            wait = int((1 - tokens) / self.rate) + 1
            raise Refused(429, "rate_limited", "too many requests from this caller", wait)


def same_site(headers: dict[str, str], allowed: tuple[str, ...]) -> None:
    """Refuse foreign ``Host`` names (DNS rebinding) and pages of other sites (``Origin``).

    Raises:
        Refused: 403.
    """
    host = _name(headers.get("host", ""))
    if "*" not in allowed and host not in allowed:
        raise Refused(403, "host", "this service is not known under that host name")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host", ""):
        raise Refused(403, "origin", "requests from pages of other sites are refused")


def _name(host: str) -> str:
    bare = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host
    return (bare if host.startswith("[") else bare.partition(":")[0]).lower()


class SecurityHeaders:
    """ASGI middleware: the same headers on every response, errors included; HEAD wherever GET."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server knows and sends no body

        async def secured(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                names = {name.lower() for name, _ in given}
                given += [
                    (name.encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.encode() not in names
                ]
                message = {**message, "headers": given}
            await send(message)

        await self.app(scope, receive, secured)
