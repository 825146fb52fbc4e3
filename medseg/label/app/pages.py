"""Login form and session cookie for browser viewers such as OHIF, which send no token."""

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
    """Add the page `/login` to the server; its cookie is restricted to this server and hidden from scripts.

    Args:
        app: FastAPI application.
        encrypted: Whether browsers connect through TLS, so that the cookie can be marked as secure.
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
    """Add the cookie's token to the headers of a request that has the cookie but no token."""
    token = request.cookies.get(_COOKIE)
    if token and "authorization" not in request.headers:
        header = (b"authorization", f"Bearer {token}".encode("latin-1", "replace"))
        request.scope["headers"] = [*request.scope["headers"], header]


def needs_login_page(request: Any, *, refused: bool = False) -> Any:
    """Return a redirect to the login page if a browser opens OHIF without a valid login, otherwise None.

    Args:
        request: HTTP request.
        refused: Whether the token of the request was refused, because it has expired or the server was restarted.
    """
    asked = request.method == "GET" and request.url.path.startswith("/ohif")
    known = not refused and (request.cookies.get(_COOKIE) or "authorization" in request.headers)
    return RedirectResponse("/login", HTTPStatus.SEE_OTHER) if asked and not known else None


def _page(message: str, status: HTTPStatus = HTTPStatus.OK) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(message=message), status)
