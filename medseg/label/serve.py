"""Start a label server: `medseg label serve`.

Options and bundles are checked before MONAI Label is imported. By default the server listens on this machine only and
requires a login.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import RequestError
from medseg.label.accounts import Accounts
from medseg.label.served_bundles import find_served_bundles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medseg.label.options import LabelOptions
    from medseg.label.served_bundles import ServedBundles

__all__ = ["serve"]

_FIRST_ACCOUNT: Final = "annotator"
_NO_ENVIRONMENT: Final = """no module '{name}' in this environment: the label server needs its own environment with \
Python 3.11, since MONAI Label and medseg require different versions of pydicom. In medseg's source folder run

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
        options: Options of the server.
        say: Function that prints a line on the terminal.
        certificate: PEM file of the TLS certificate; without one, the server does not encrypt.
        key: PEM file of the certificate's key.

    Raises:
        RequestError: An option is unsafe or invalid, no bundle can be served, or MONAI Label is not installed.
    """
    options.check()
    bundles = find_served_bundles(options.tuned, folders=options.bundles, names=options.models)
    options.check_port()
    _check_environment()
    with options.alone():
        _describe(bundles, options, say)
        if not bundles.served:
            raise RequestError("no bundle to serve: all were refused, for the reasons above")
        _server().run(options, certificate=certificate, key=key)


def _check_environment() -> None:
    if importlib.util.find_spec("monailabel") is None:
        raise RequestError(_NO_ENVIRONMENT.format(name="monailabel"))


def _describe(bundles: ServedBundles, options: LabelOptions, say: Callable[[str], None]) -> None:
    """Print the served bundles and the login; a new password is shown once and never logged."""
    for name, served in bundles.served.items():
        state = "trained here" if served.current is served.tuned else "" if served.ready else "no weights yet: train it"
        say(f"serving: {name}{f' ({state})' if state else ''}")
    for name, reason in bundles.refused.items():
        say(f"refused: {name}: {reason}")
    if options.login and not Accounts(options.accounts).names:
        password = Accounts(options.accounts).add(_FIRST_ACCOUNT)
        again = f"`medseg label add-account {_FIRST_ACCOUNT}` sets a new one"
        say(f"login: {_FIRST_ACCOUNT}, password: {password} (shown once; {again})")


def _server() -> Any:
    try:
        return importlib.import_module("medseg.label.app.server")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("medseg"):
            raise
        raise RequestError(_NO_ENVIRONMENT.format(name=error.name)) from error
