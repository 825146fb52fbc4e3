"""Start a label server: `medseg label serve`.

Options and bundles are checked before MONAI Label is imported. It listens on this machine only and asks for a login,
unless its options say otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import RequestError
from medseg.label.accounts import Accounts
from medseg.label.served_bundles import find_offers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medseg.label.options import LabelOptions
    from medseg.label.served_bundles import Offers

__all__ = ["serve"]

_FIRST_ACCOUNT: Final = "annotator"
_NO_ENVIRONMENT: Final = """no module '{name}' in this environment: the label server needs one of its own, with Python \
3.11, since MONAI Label requires other versions than medseg does. In medseg's source folder run

  make label-environment
  .venv-label/bin/medseg label serve --studies FOLDER

or, without make,

  python3.11 -m venv .venv-label
  .venv-label/bin/pip install --constraint constraints-label.txt torch
  .venv-label/bin/pip install --no-deps --requirement constraints-label.txt
  .venv-label/bin/pip install --no-deps ."""


def serve(
    options: LabelOptions, *, say: Callable[[str], None], certificate: Path | None = None, key: Path | None = None
) -> None:
    """Serve until the process is stopped.

    Args:
        options: Where to listen, what to serve, who may use it.
        say: Called with each line for the person who starts the server.
        certificate: PEM file, to speak TLS.
        key: PEM file of the certificate's key.

    Raises:
        RequestError: An option is unsafe or invalid, no bundle can be served, or MONAI Label is not installed.
    """
    options.check()
    offers = find_offers(options.tuned, folders=options.bundles, names=options.models)
    options.check_port()
    _check_environment()
    with options.alone():
        _describe(offers, options, say)
        if not offers.offered:
            raise RequestError("no bundle to serve: every one was refused, for the reasons above")
        _server().run(options, certificate=certificate, key=key)


def _check_environment() -> None:
    if importlib.util.find_spec("monailabel") is None:
        raise RequestError(_NO_ENVIRONMENT.format(name="monailabel"))


def _describe(offers: Offers, options: LabelOptions, say: Callable[[str], None]) -> None:
    """List what is served and how to log in; a password is shown once and logged nowhere."""
    for name, offer in offers.offered.items():
        state = "trained here" if offer.current is offer.tuned else "" if offer.ready else "no weights yet: train it"
        say(f"serving: {name}{f' ({state})' if state else ''}")
    for name, reason in offers.refused.items():
        say(f"refused: {name}: {reason}")
    if options.login and not Accounts(options.accounts).names:
        password = Accounts(options.accounts).add(_FIRST_ACCOUNT)
        again = f"`medseg label add-account {_FIRST_ACCOUNT}` sets another"
        say(f"login: {_FIRST_ACCOUNT}, password: {password} (shown once; {again})")


def _server() -> Any:
    try:
        return importlib.import_module("medseg.label.app.server")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("medseg"):
            raise
        raise RequestError(_NO_ENVIRONMENT.format(name=error.name)) from error
