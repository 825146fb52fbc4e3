"""Options of a label server, and how they are passed to its child processes."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

from medseg.errors import RequestError
from medseg.files import check_folder
from medseg.io.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["ENDINGS", "LabelOptions", "default_state", "is_loopback", "is_remote_store"]

# Trainings run in child processes, which read their options from the environment.
_STATE: Final = "MEDSEG_LABEL_STATE"
_BUNDLES: Final = "MEDSEG_LABEL_BUNDLES"
_MODELS: Final = "MEDSEG_LABEL_MODELS"

# Suffixes of image files: single-file volumes and 2D images, in the upper case of cameras as well.
_IMAGES: Final = tuple(
    ending for entry in FORMATS.values() for ending in (entry.images if entry.kind == "image" else entry.written)
)
ENDINGS: Final = (*_IMAGES, *(ending.upper() for ending in _IMAGES))


def default_state() -> Path:
    """Return the folder of accounts, trained copies and logs: `medseg-label` in the user's data folder."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "medseg-label"


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_remote_store(studies: str) -> bool:
    """Return whether the studies are in a DICOMweb store rather than in a folder."""
    return studies.startswith(("http://", "https://"))


@dataclass(frozen=True)
class LabelOptions:
    """Options of a label server.

    Attributes:
        studies: Folder of images, or URL of a DICOMweb store.
        state: Folder of accounts, trained copies, masks and logs.
        bundles: Bundle folders, or folders of bundles; the shipped bundles if empty.
        models: Names of the bundles to serve; all if empty.
        host: Address to listen on.
        port: Port to listen on, 1 to 65535.
        login: Whether viewers must log in.
        encrypted: Whether connections are encrypted by TLS, of this server or of a proxy in front of it.
    """

    studies: str
    state: Path
    bundles: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    login: bool = True
    encrypted: bool = False

    @property
    def accounts(self) -> Path:
        """File of the accounts."""
        return self.state / "accounts.json"

    @property
    def key(self) -> Path:
        """File of the pseudonyms' secret key."""
        return self.state / "pseudonyms.key"

    @property
    def tuned(self) -> Path:
        """Folder of the bundle copies trained on this server."""
        return self.state / "models"

    @property
    def work(self) -> Path:
        """Folder of running trainings."""
        return self.state / "work"

    @property
    def results(self) -> Path:
        """Folder of masks that are sent to viewers."""
        return self.state / "results"

    @property
    def app(self) -> Path:
        """Folder of MONAI Label's app: an entry file and the log."""
        return self.state / "app"

    @property
    def sessions(self) -> Path:
        """Folder of images that viewers uploaded for a session."""
        return self.state / "sessions"

    @property
    def temporary(self) -> Path:
        """Folder of uploads for a single request, private to the user of the server."""
        return self.state / "tmp"

    def check(self) -> None:
        """Refuse unsafe or invalid options.

        Raises:
            RequestError: An option is unsafe or invalid.
        """
        if not is_remote_store(self.studies) and not Path(self.studies).is_dir():
            raise RequestError(
                f"no such folder of studies '{self.studies}': give a folder of images, or the URL of a DICOMweb store "
                "that starts with http:// or https://"
            )
        if not is_remote_store(self.studies):
            check_folder(Path(self.studies))  # labels are saved there
        if not 0 < self.port < 2**16:
            raise RequestError(f"invalid port {self.port}: use 1 to 65535")
        if is_loopback(self.host):
            return
        if not self.login:
            raise RequestError(
                f"no login on '{self.host}', which other machines can reach: anyone could read and change the images. "
                "Remove --no-login, or listen on 127.0.0.1"
            )
        if not self.encrypted:
            raise RequestError(
                f"no encryption on '{self.host}', which other machines can reach: passwords and images would be sent "
                "unencrypted. Give --tls-certificate and --tls-key, or --behind-proxy if a proxy terminates TLS"
            )

    def check_port(self) -> None:
        """Refuse an address that the server cannot listen on.

        Raises:
            RequestError: The port is in use, or the address does not belong to this machine.
        """
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise RequestError(
                f"cannot listen on port {self.port} of '{self.host}' ({error.strerror}): stop the program that uses "
                "it, or give another --port or --host"
            ) from error

    @property
    def origin(self) -> str:
        """URL origin of the server's own pages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.encrypted else 'http'}://{host}:{self.port}"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the state folder while the block runs, since each server clears parts of it at its start.

        Raises:
            RequestError: Another server holds the lock.
        """
        import fcntl  # missing on Windows, where MONAI Label's environment cannot be installed either

        check_folder(self.state)
        with (self.state / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RequestError(
                    f"another label server uses '{self.state}': stop it, or give this one another --state folder"
                ) from error
            yield

    def environment(self) -> dict[str, str]:
        """Return the environment variables that pass the options to a child process."""
        return {
            _STATE: str(self.state),
            _BUNDLES: os.pathsep.join(map(str, self.bundles)),
            _MODELS: os.pathsep.join(self.models),
        }

    @classmethod
    def from_environment(cls, studies: str, environment: Mapping[str, str] | None = None) -> LabelOptions:
        """Return the options in the environment variables; address and login are not passed to child processes."""
        variables = os.environ if environment is None else environment
        bundles = tuple(Path(part) for part in variables.get(_BUNDLES, "").split(os.pathsep) if part)
        models = tuple(part for part in variables.get(_MODELS, "").split(os.pathsep) if part)
        return cls(studies, Path(variables.get(_STATE) or default_state()), bundles, models)
