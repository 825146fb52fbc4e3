"""What a label server is started with, and how its processes are told."""

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

# Trainings run in processes of their own, which read their options from the environment.
_STATE: Final = "MEDSEG_LABEL_STATE"
_BUNDLES: Final = "MEDSEG_LABEL_BUNDLES"
_MODELS: Final = "MEDSEG_LABEL_MODELS"

# How the files of a folder end that count as images; volumes that are one file, and pictures, as cameras name them too.
_IMAGES: Final = tuple(
    ending for entry in FORMATS.values() for ending in (entry.images if entry.kind == "image" else entry.written)
)
ENDINGS: Final = (*_IMAGES, *(ending.upper() for ending in _IMAGES))


def default_state() -> Path:
    """Return the folder for accounts, trained copies and logs: `medseg-label` among the user's data."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "medseg-label"


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_remote_store(studies: str) -> bool:
    """Whether the studies are in a DICOMweb store and not in a folder."""
    return studies.startswith(("http://", "https://"))


@dataclass(frozen=True)
class LabelOptions:
    """Options of a label server.

    Attributes:
        studies: folder of images, or address of a DICOMweb store.
        state: folder for accounts, trained copies, masks and logs.
        bundles: bundle folders, or folders of such; the shipped bundles if there are none.
        models: names of the bundles to offer; all if there are none.
        host: address to listen on.
        port: port to listen on.
        login: whether viewers have to log in.
        encrypted: whether the server speaks TLS itself, or something before it does.
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
        """File of accounts."""
        return self.state / "accounts.json"

    @property
    def key(self) -> Path:
        """File of the secret of pseudonyms."""
        return self.state / "pseudonyms.key"

    @property
    def tuned(self) -> Path:
        """Folder of trained copies."""
        return self.state / "models"

    @property
    def work(self) -> Path:
        """Folder of running trainings."""
        return self.state / "work"

    @property
    def results(self) -> Path:
        """Folder of masks on their way to a viewer."""
        return self.state / "results"

    @property
    def app(self) -> Path:
        """Folder that MONAI Label takes for the app: an entry file and the log."""
        return self.state / "app"

    @property
    def sessions(self) -> Path:
        """Folder of images that viewers sent along for a while."""
        return self.state / "sessions"

    @property
    def temporary(self) -> Path:
        """Folder for what is sent along with one request, which others on this machine shall not see."""
        return self.state / "tmp"

    def check(self) -> None:
        """Refuse what is not safe or cannot be.

        Raises:
            RequestError: says what, and what to do.
        """
        if not is_remote_store(self.studies) and not Path(self.studies).is_dir():
            raise RequestError(
                f"no folder of studies '{self.studies}': give a folder of images, or the address of a DICOMweb store "
                "that starts with http:// or https://"
            )
        if not is_remote_store(self.studies):
            check_folder(Path(self.studies))  # labels are saved there
        if not 0 < self.port < 2**16:
            raise RequestError(f"port {self.port} is none: use 1 to 65535")
        if is_loopback(self.host):
            return
        if not self.login:
            raise RequestError(
                f"'{self.host}' can be reached from other machines, and without login anybody there could read and "
                "change the images: leave out --no-login, or listen on 127.0.0.1"
            )
        if not self.encrypted:
            raise RequestError(
                f"'{self.host}' can be reached from other machines, and passwords and images would go in the clear: "
                "give --tls-certificate and --tls-key, or --behind-proxy if something before this server encrypts"
            )

    def check_port(self) -> None:
        """Refuse an address that cannot be listened on.

        Raises:
            RequestError: another program listens there, or it is none of this machine's.
        """
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise RequestError(
                f"cannot listen on port {self.port} of '{self.host}' ({error.strerror}): stop the program that does, "
                "or give another --port or --host"
            ) from error

    @property
    def origin(self) -> str:
        """Address of the server's own pages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.encrypted else 'http'}://{host}:{self.port}"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other servers from the state folder while the block runs: each empties parts of it when it starts.

        Raises:
            RequestError: another server has it.
        """
        import fcntl  # not on Windows, where MONAI Label's environment cannot be set up anyway

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
        """Return the variables that tell another process of this server its options."""
        return {
            _STATE: str(self.state),
            _BUNDLES: os.pathsep.join(map(str, self.bundles)),
            _MODELS: os.pathsep.join(self.models),
        }

    @classmethod
    def from_environment(cls, studies: str, environment: Mapping[str, str] | None = None) -> LabelOptions:
        """Return the options that `environment` told; addresses and login are the server's own affair."""
        told = os.environ if environment is None else environment
        bundles = tuple(Path(part) for part in told.get(_BUNDLES, "").split(os.pathsep) if part)
        models = tuple(part for part in told.get(_MODELS, "").split(os.pathsep) if part)
        return cls(studies, Path(told.get(_STATE) or default_state()), bundles, models)
