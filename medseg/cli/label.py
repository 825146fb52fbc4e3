"""`medseg label serve | add-account`: annotation with bundles in 3D Slicer or OHIF."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated

import typer

from medseg.cli import completion
from medseg.cli.console import notes, output
from medseg.cli.log import let_everyone_log
from medseg.cli.options import Command, Group, examples
from medseg.errors import RequestError
from medseg.files import check_folder
from medseg.label import serve as label_server
from medseg.label.accounts import Accounts
from medseg.label.options import LabelOptions, default_state, is_remote_store

__all__ = ["add_account", "app", "serve"]

app = typer.Typer(
    cls=Group,
    help="Annotate images in 3D Slicer or OHIF with bundles, through MONAI Label.",
    epilog=examples("medseg label serve --studies scans", "medseg label add-account ann"),
    no_args_is_help=True,
)

State = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        show_default="~/.local/share/medseg-label",
        help="Folder of accounts, trained bundles and logs.",
    ),
]


@app.command(
    cls=Command,
    epilog=examples(
        "medseg label serve --studies scans --models hippocampus_mri_unet --port 8010",
        "medseg label serve --studies http://127.0.0.1:8042/dicom-web --bundles my_bundles",
    ),
)
def serve(
    studies: Annotated[str, typer.Option(metavar="FOLDER|URL", help="Folder of images, or URL of a DICOMweb store.")],
    bundles: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            show_default="the shipped bundles",
            help="Folder of a bundle, or of several bundles. Repeatable.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="all",
            help="Name of a bundle to serve. Repeatable.",
            autocompletion=completion.bundle_names,
        ),
    ] = None,
    state: State = default_state(),  # noqa: B008  (read once, at start)
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="Port to listen on, 1 to 65535.")] = 8000,
    no_login: Annotated[
        bool, typer.Option("--no-login", help="Require no password; only for addresses of this machine.")
    ] = False,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="no TLS", help="PEM file of the server's certificate.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="no TLS", help="PEM file of the certificate's key.")
    ] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A proxy in front of this server terminates TLS.")
    ] = False,
) -> None:
    """Serve bundles to viewers for segmentation, correction of the masks, and fine-tuning on them.

    By default the server listens on this machine only and requires a login. It needs MONAI Label, in a separate
    environment.
    """
    _check_tls(tls_certificate, tls_key)
    options = LabelOptions(
        studies=studies if is_remote_store(studies) else str(Path(studies).absolute()),
        state=state.expanduser().absolute(),
        bundles=tuple(path.absolute() for path in bundles or ()),
        models=tuple(models or ()),
        host=host,
        port=port,
        login=not no_login,
        encrypted=behind_proxy or tls_certificate is not None,
    )
    let_everyone_log()
    try:
        label_server.serve(options, say=output.print, certificate=tls_certificate, key=tls_key)
    except KeyboardInterrupt:
        notes.print("Label server stopped.")


def _check_tls(certificate: Path | None, key: Path | None) -> None:
    if (certificate is None) != (key is None):
        raise RequestError("TLS needs both --tls-certificate and --tls-key: give both, or neither")
    for path in (certificate, key):
        if path is not None and not path.is_file():
            raise RequestError(f"no such file '{path}': TLS needs a certificate and its key, as PEM files")


@app.command(
    "add-account",
    cls=Command,
    epilog=examples("medseg label add-account ann", "medseg label add-account ann < password.txt"),
)
def add_account(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of letters, digits, and . _ - @")],
    state: State = default_state(),  # noqa: B008  (read once, at start)
) -> None:
    """Add an account of the label server, or change its password.

    The password is read from the terminal without echo, or from standard input.
    """
    folder = state.expanduser()
    check_folder(folder)
    password = getpass.getpass(f"Password for {name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    Accounts(folder / "accounts.json").add(name, password)
    output.print(f"account '{name}' added")
