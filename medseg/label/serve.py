"""Start a label server: `python -m medseg.label.serve --studies FOLDER`.

Arguments and bundles are checked before MONAI Label is imported. It listens on this machine only and asks for a login,
unless it is told otherwise.
"""

from __future__ import annotations

import argparse
import getpass
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import MedsegError, RequestError, visible
from medseg.files import check_folder
from medseg.label.accounts import Accounts
from medseg.label.options import LabelOptions, default_state, is_remote_store
from medseg.label.served_bundles import find_offers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.label.served_bundles import Offers

__all__ = ["main"]

_FIRST_ACCOUNT = "annotator"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.add_account:
            check_folder(asked.state.expanduser())
            return _add_account(Accounts(asked.state.expanduser() / "accounts.json"), asked.add_account)
        options = _options(asked)
        options.check()
        offers = find_offers(options.tuned, folders=options.bundles, names=options.models)
        options.check_port()
        with options.alone():
            _tell(offers, options)
            if not offers.offered:
                raise RequestError("there is no bundle that could be offered")
            server = _server()
            server.run(options, certificate=asked.tls_certificate, key=asked.tls_key)
    except MedsegError as error:
        _say(f"Error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medseg.label.serve", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--studies", default="", help="folder of images, or address of a DICOMweb store")
    parser.add_argument("--bundles", nargs="*", type=Path, default=[], help="bundle folders, or folders of such")
    parser.add_argument("--models", nargs="*", default=[], help="names of the bundles to offer; all by default")
    parser.add_argument("--state", type=Path, default=default_state(), help="folder for accounts, models and logs")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (this machine only by default)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no-login", action="store_true", help="ask nobody for a password")
    parser.add_argument("--tls-certificate", type=Path, help="PEM file, to speak TLS")
    parser.add_argument("--tls-key", type=Path, help="PEM file of the certificate's key")
    parser.add_argument("--behind-proxy", action="store_true", help="something before this server encrypts")
    parser.add_argument("--add-account", metavar="NAME", help="ask for a password, add the account and stop")
    return parser


def _options(asked: argparse.Namespace) -> LabelOptions:
    if not asked.studies:
        raise RequestError("--studies is needed: a folder of images, or the address of a DICOMweb store")
    if (asked.tls_certificate is None) != (asked.tls_key is None):
        raise RequestError("--tls-certificate and --tls-key belong together: give both, or neither")
    for path in (asked.tls_certificate, asked.tls_key):
        if path is not None and not path.is_file():
            raise RequestError(f"no file '{path}': TLS needs a certificate and its key, as PEM files")
    return LabelOptions(
        studies=asked.studies if is_remote_store(asked.studies) else str(Path(asked.studies).absolute()),
        state=asked.state.expanduser().absolute(),
        bundles=tuple(path.absolute() for path in asked.bundles),
        models=tuple(asked.models),
        host=asked.host,
        port=asked.port,
        login=not asked.no_login,
        encrypted=asked.behind_proxy or asked.tls_certificate is not None,
    )


def _add_account(accounts: Accounts, name: str) -> int:
    password = getpass.getpass(f"Password for {name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    accounts.add(name, password)
    _say(f"account '{name}' added")
    return 0


def _tell(offers: Offers, options: LabelOptions) -> None:
    """Say on the terminal what is offered and how to log in; a password is shown once and logged nowhere."""
    for name, offer in offers.offered.items():
        state = "trained here" if offer.current is offer.tuned else "" if offer.ready else "no weights yet: train it"
        _say(f"offered: {name}{f' ({state})' if state else ''}")
    for name, reason in offers.refused.items():
        _say(f"refused: {name}: {reason}")
    if options.login and not Accounts(options.accounts).names:
        password = Accounts(options.accounts).add(_FIRST_ACCOUNT)
        _say(f"login: {_FIRST_ACCOUNT}, password: {password} (shown once; --add-account {_FIRST_ACCOUNT} sets another)")


def _server() -> Any:
    try:
        return importlib.import_module("medseg.label.app.server")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("medseg"):
            raise
        raise RequestError(
            f"{error.name} is missing: the label server needs an environment of its own; `make label-server` sets it up"
        ) from error


def _say(text: str) -> None:
    sys.stderr.write(visible(text) + "\n")


if __name__ == "__main__":
    sys.exit(main())
