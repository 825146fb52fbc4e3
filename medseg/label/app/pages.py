"""Login for viewers in a browser, such as OHIF, which send no token of their own: a form, and a cookie."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

import requests
from fastapi.responses import HTMLResponse, RedirectResponse
from monailabel.config import settings
from monailabel.endpoints.user import auth

__all__ = ["add_login_page", "needs_login_page", "with_token"]

_COOKIE: Final = "medseg_token"
_SECONDS: Final = 12 * 3600
_PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>medseg label server</title>
<style>body{{font:16px sans-serif;max-width:20em;margin:15vh auto}}input{{width:100%;margin:.3em 0 1em}}</style>
<h1>Log in</h1><p role="alert">{message}</p><form method="post" action="/login">
<label>Name<input name="username" autocomplete="username" required autofocus></label>
<label>Password<input name="password" type="password" autocomplete="current-password" required></label>
<input type="submit" value="Log in"></form></html>"""


def add_login_page(app: Any, *, encrypted: bool) -> None:
    """Add `/login` to the server; the cookie goes to this server only, and is out of reach of scripts.

    Args:
        app: FastAPI's.
        encrypted: whether browsers reach the server through TLS, and may be told to send the cookie only so.
    """

    async def form(request: Any) -> HTMLResponse:
        return _page("")

    async def log_in(request: Any) -> Any:
        entered = await request.form()
        data = {
            "client_id": settings.MONAI_LABEL_AUTH_CLIENT_ID,
            "username": str(entered.get("username", "")),
            "password": str(entered.get("password", "")),
            "grant_type": "password",
        }
        answer = requests.post(auth.token_uri(), data=data, timeout=settings.MONAI_LABEL_AUTH_TIMEOUT)
        if not answer.ok:
            return _page("Unknown name or wrong password.", HTTPStatus.UNAUTHORIZED)
        found = RedirectResponse("/ohif/", HTTPStatus.SEE_OTHER)
        found.set_cookie(
            _COOKIE, answer.json()["access_token"], _SECONDS, httponly=True, samesite="strict", secure=encrypted
        )
        return found

    app.add_route("/login", form, methods=["GET"], include_in_schema=False)
    app.add_route("/login", log_in, methods=["POST"], include_in_schema=False)


def with_token(request: Any) -> None:
    """Give a request that brings the cookie, and no token of its own, the token in the cookie."""
    token = request.cookies.get(_COOKIE)
    if token and "authorization" not in request.headers:
        header = (b"authorization", f"Bearer {token}".encode("latin-1", "replace"))
        request.scope["headers"] = [*request.scope["headers"], header]


def needs_login_page(request: Any, *, refused: bool = False) -> Any:
    """Return a redirection to the form for a browser that opens OHIF without a login; None for all else.

    Args:
        request: a browser's, or any other.
        refused: whether the login that it brings does not count any more: it is from before the server's last start,
            or too old.
    """
    asked = request.method == "GET" and request.url.path.startswith("/ohif")
    known = not refused and (request.cookies.get(_COOKIE) or "authorization" in request.headers)
    return RedirectResponse("/login", HTTPStatus.SEE_OTHER) if asked and not known else None


def _page(message: str, status: HTTPStatus = HTTPStatus.OK) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(message=message), status)
