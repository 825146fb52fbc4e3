"""Middleware of MONAI Label's HTTP interface: request checks, error responses and logs; and two patches."""

from __future__ import annotations

import json
import logging
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import numpy as np
import requests
from fastapi.responses import JSONResponse
from monailabel.config import settings
from monailabel.datastore import dicom as dicom_store
from monailabel.endpoints import infer
from monailabel.endpoints.user import auth
from monailabel.interfaces.exception import MONAILabelException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from medseg.errors import CaseError, MedsegError, RequestError, in_a_line
from medseg.io import load
from medseg.io.writers import to_numpy
from medseg.label.annotations import segment_infos
from medseg.label.app.pages import add_login_page, needs_login_page, with_token
from medseg.label.options import is_loopback, is_remote_store
from medseg.label.request_checks import check_path, check_query
from medseg.label.segments import with_terms

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from medseg.label.options import LabelOptions
    from medseg.label.privacy import Pseudonyms

__all__ = ["add_request_checks", "patch_monailabel"]

logger = logging.getLogger("medseg.label")

# MONAI Label requires no login for it, and it rebuilds the whole app.
_CLOSED = ("/reload",)


def patch_monailabel() -> None:
    """Replace two functions of MONAI Label 0.8.5 that are incorrect: token decoding and DICOM SEG writing."""
    auth.from_token = _user_of
    convert = dicom_store.nifti_to_dicom_seg
    dicom_store.nifti_to_dicom_seg = _with_names(convert, corrected=True)
    infer.nifti_to_dicom_seg = _with_names(convert, corrected=False)


def add_request_checks(app: Any, options: LabelOptions, pseudonyms: Pseudonyms, *, learn: Callable[[], None]) -> None:
    """Check every request before MONAI Label handles it, answer errors with their messages, and log pseudonyms.

    Args:
        app: FastAPI application.
        options: Options of the server.
        pseudonyms: Pseudonyms that logs show instead of names.
        learn: Function that adds the names of the current images to the pseudonyms.
    """
    if is_loopback(options.host):
        # Against DNS rebinding: a foreign page must not reach this server under its own host name.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", options.host])
    if options.login:
        add_login_page(app, encrypted=options.encrypted)
    for kind in (MedsegError, MONAILabelException, requests.RequestException, json.JSONDecodeError):
        app.add_exception_handler(kind, _answer)

    @app.middleware("http")  # type: ignore[untyped-decorator]
    async def guarded(request: Any, proceed: Callable[[Any], Awaitable[Any]]) -> Any:
        start = time.perf_counter()
        query = request.query_params.multi_items()
        if request.method == "POST" and not is_remote_store(options.studies):
            learn()  # a job may log the name of a file that was added after the start
        pseudonyms.learn([value for name, value in query if name in ("image", "label", "id", "session_id")])
        answer = _refusal(request.url.path, query) or (needs_login_page(request) if options.login else None)
        if answer is None:
            with_token(request)
            try:
                answer = await proceed(request)
            except Exception:
                logger.exception("a request failed")
                answer = JSONResponse({"detail": "internal server error: see the log of the server"}, 500)
        if options.login and answer.status_code == HTTPStatus.UNAUTHORIZED:
            answer = needs_login_page(request, refused=True) or answer
        seconds = time.perf_counter() - start
        logger.info("%s %s %s %.2f s", request.method, request.url.path, answer.status_code, seconds)
        return answer


def _refusal(path: str, query: Sequence[tuple[str, str]]) -> Any:
    if path.rstrip("/") in _CLOSED:
        return JSONResponse({"detail": "disabled on this server"}, 404)
    try:
        check_path(path)
        check_query(query)
    except RequestError as error:
        return JSONResponse({"detail": str(error)}, 400)
    return None


async def _answer(request: Any, error: Exception) -> Any:
    """Return the response for an error."""
    text = str(getattr(error, "msg", "") or error)
    if isinstance(error, requests.HTTPError):
        # From the login server, or from a DICOMweb store.
        refused = error.response is not None and error.response.status_code == 401
        if refused and request.url.path.startswith("/auth"):
            return JSONResponse({"detail": "unknown name or wrong password"}, 401)
        return JSONResponse({"detail": text}, 502)
    if isinstance(error, requests.RequestException):
        other = "the login server" if request.url.path.startswith(("/auth", "/login")) else "the DICOMweb store"
        return JSONResponse({"detail": f"{other} does not answer: {in_a_line(error)}"}, 502)
    if isinstance(error, json.JSONDecodeError):
        return JSONResponse({"detail": f"the request's parameters are not valid JSON: {error}"}, 400)
    if isinstance(error, (RequestError, MONAILabelException)):
        return JSONResponse({"detail": text}, 400)
    return JSONResponse({"detail": text}, 422 if isinstance(error, CaseError) else 500)


def _user_of(token: str) -> Any:
    """Return the user of a token.

    MONAI Label's own function passes no algorithm, which PyJWT requires since version 2.

    Raises:
        jwt.InvalidTokenError: The token is not signed by the realm, or has expired.
    """
    if not settings.MONAI_LABEL_AUTH_ENABLE:
        return auth.DEFAULT_USER
    key = auth.get_public_key(settings.MONAI_LABEL_AUTH_REALM_URI)
    claims = jwt.decode(token, key, algorithms=["RS256"], options={"verify_aud": False, "require": ["exp"]})
    roles: Any = claims
    for step in settings.MONAI_LABEL_AUTH_TOKEN_ROLES.split("#"):
        roles = roles.get(step, {}) if isinstance(roles, dict) else {}
    return auth.User(
        username=claims.get(settings.MONAI_LABEL_AUTH_TOKEN_USERNAME, ""),
        email=claims.get(settings.MONAI_LABEL_AUTH_TOKEN_EMAIL),
        name=claims.get(settings.MONAI_LABEL_AUTH_TOKEN_NAME),
        roles=list(roles),
    )


def _with_names(convert: Callable[..., str], *, corrected: bool) -> Callable[..., str]:
    """Wrap MONAI Label's writer of DICOM SEG so that each segment has the name and codes of its value."""

    def converted(series: str, label: str, label_info: Any, *args: Any, **kwargs: Any) -> str:
        values = [int(value) for value in np.unique(to_numpy(load(label, label=True))) if value]
        if not values:
            raise CaseError("empty mask: DICOM SEG cannot represent it, nothing was written")
        infos = zip(segment_infos(label_info or [], values), values, strict=True)
        named = [with_terms(info, value, corrected=corrected) for info, value in infos]
        written = convert(series, label, named, *args, **kwargs)
        if not Path(written).is_file():
            raise CaseError("cannot write the mask as DICOM SEG: its geometry does not match the slices of the series")
        return written

    return converted
