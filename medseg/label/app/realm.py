"""Login server for MONAI Label, with accounts in a file and tokens signed by this process.

MONAI Label delegates logins to an OpenID server such as Keycloak, of which it uses three endpoints: the public key, the
configuration with the token endpoint, and tokens for a name and a password. This server implements only these, on a
loopback address and a free port, for machines without an OpenID server.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.label.accounts import Accounts

__all__ = ["Realm"]

logger = logging.getLogger("medseg.label")

_SECONDS: Final = 12 * 3600
_LONGEST_FORM: Final = 10_000
_CONFIGURATION: Final = "/.well-known/openid-configuration"


class Realm:
    """Login server of one process. Its key is in memory only, so its tokens are invalid after a restart.

    Args:
        accounts: Accounts that may log in.
        roles: MONAI Label roles of every account.
    """

    def __init__(self, accounts: Accounts, roles: Sequence[str]) -> None:
        self.accounts = accounts
        self.roles = list(roles)
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    @property
    def address(self) -> str:
        """URL of the realm, for `MONAI_LABEL_AUTH_REALM_URI`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/realms/medseg"

    def start(self) -> None:
        """Serve in a daemon thread."""
        threading.Thread(target=self._server.serve_forever, name="realm", daemon=True).start()

    def public_key(self) -> str:
        """Return the public key of the tokens' signatures, base64-encoded DER."""
        encoded = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return base64.b64encode(encoded).decode("ascii")

    def token(self, name: str) -> str:
        """Return a signed token of an account whose password has been verified."""
        now = int(time.time())
        claims = {
            "preferred_username": name,
            "name": name,
            "realm_access": {"roles": self.roles},
            "iat": now,
            "exp": now + _SECONDS,
        }
        token: str = jwt.encode(claims, self._key, algorithm="RS256")
        return token


def _handler(realm: Realm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(_CONFIGURATION):
                self.answer({"token_endpoint": f"{realm.address}/token"})
            else:
                self.answer({"realm": "medseg", "public_key": realm.public_key()})

        def do_POST(self) -> None:
            content_length = self.headers.get("Content-Length", "")
            length = int(content_length) if content_length.isdecimal() else 0
            if not self.path.endswith("/token") or not 0 < length <= _LONGEST_FORM:
                self.answer({"error": "invalid_request"}, HTTPStatus.BAD_REQUEST)
                return
            form = parse_qs(self.rfile.read(length).decode("utf-8", "replace"))
            name, password = (form.get(field, [""])[0] for field in ("username", "password"))
            if not realm.accounts.check(name, password):
                logger.warning("login refused: unknown name or wrong password")
                self.answer({"error": "invalid_grant"}, HTTPStatus.UNAUTHORIZED)
                return
            self.answer({"access_token": realm.token(name), "token_type": "bearer", "expires_in": _SECONDS})

        def answer(self, content: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing, since requests contain names."""

    return Handler
