"""The server process: MONAI Label's HTTP interface with our app, our login and our logs."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from medseg.errors import RequestError, in_a_line
from medseg.label.accounts import Accounts
from medseg.label.options import ENDINGS, is_remote_store
from medseg.label.privacy import HidingFilter, Pseudonyms, read_key

if TYPE_CHECKING:
    from medseg.label.options import LabelOptions

__all__ = ["run"]

logger = logging.getLogger("medseg.label")

# What MONAI Label looks for in the app's folder.
_ENTRY = (
    '"""Entry of MONAI Label: written anew at each start."""\n\n'
    'from medseg.label.app.main import MedsegApp\n\n__all__ = ["MedsegApp"]\n'
)
_ROLES = ("monailabel-admin", "monailabel-reviewer", "monailabel-annotator", "monailabel-user")


def run(options: LabelOptions, *, certificate: Path | None = None, key: Path | None = None) -> None:
    """Serve until the process is stopped.

    Args:
        options: checked before.
        certificate: PEM file, to speak TLS.
        key: PEM file of its key.

    Raises:
        RequestError: the app cannot be built, or the studies have records that cannot be read.
    """
    _prepare(options, _realm(options))
    pseudonyms = Pseudonyms(read_key(options.key))
    logging.config.dictConfig(_logging(options, pseudonyms))
    # MONAI Label reads its settings when it is imported.
    from monailabel.app import app
    from monailabel.interfaces.utils.app import app_instance

    from medseg.label.app import middleware

    # Its own processes cannot print this setting, and stop.
    os.environ.pop("MONAI_LABEL_CORS_ORIGINS", None)
    middleware.patch_monailabel()
    try:
        instance = app_instance()
    except (OSError, ValueError) as error:
        raise RequestError(
            f"MONAI Label cannot open the studies '{options.studies}' ({in_a_line(error)}): check that its records "
            "there (datastore_v2.json, labels/) can be read and written, or move them away"
        ) from error
    instance.pseudonyms = pseudonyms
    instance.learn_names()
    middleware.guard(app, options, pseudonyms, learn=instance.learn_names)
    _tell_images(instance.datastore(), options)
    logger.info("serving on %s:%s, login %s", options.host, options.port, "on" if options.login else "off")
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


def _tell_images(datastore: Any, options: LabelOptions) -> None:
    """Log how many images there are, or what is wrong."""
    try:
        count = len(datastore.list_images())
    except Exception as error:
        # The server starts all the same: the store may come later.
        logger.warning("the DICOMweb store '%s' does not answer yet: %s", options.studies, in_a_line(error))
        return
    where = "series match the filter of the store" if is_remote_store(options.studies) else "images in the folder"
    logger.log(logging.INFO if count else logging.WARNING, "%d %s", count, where)


def _realm(options: LabelOptions) -> str:
    """Return the address of the login: one that the environment names, or our own; empty without login."""
    if not options.login:
        return ""
    given = os.environ.get("MONAI_LABEL_AUTH_REALM_URI", "")
    if given:
        return given
    from medseg.label.app.realm import Realm

    realm = Realm(Accounts(options.accounts), _ROLES)
    realm.start()
    return realm.address


def _prepare(options: LabelOptions, realm: str) -> None:
    """Make the folders, and tell MONAI Label and the processes it starts what they need."""
    options.state.mkdir(parents=True, exist_ok=True)
    options.state.chmod(0o700)
    # Sessions of viewers, too: MONAI Label does not start where the upload of one was cut short.
    for folder in (options.results, options.temporary, options.work, options.sessions):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (options.app / "logs", options.results, options.temporary, options.work, options.sessions):
        folder.mkdir(parents=True, exist_ok=True)
    (options.app / "main.py").write_text(_ENTRY, encoding="utf-8")
    os.environ.update(options.environment())
    os.environ.update(
        {
            "MONAI_LABEL_APP_DIR": str(options.app),
            "MONAI_LABEL_STUDIES": options.studies,
            "MONAI_LABEL_SERVER_PORT": str(options.port),
            "MONAI_LABEL_SESSION_PATH": str(options.sessions),
            "MONAI_LABEL_AUTH_ENABLE": str(options.login),
            "MONAI_LABEL_AUTH_REALM_URI": realm or "http://127.0.0.1/none",
            "MONAI_LABEL_TRACKING_ENABLED": "False",
            "TMPDIR": str(options.temporary),
            # Programs of this environment, such as the writer of DICOM SEG.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
    )
    defaults = {
        "MONAI_LABEL_CORS_ORIGINS": f'["{options.origin}"]',
        "MONAI_LABEL_DATASTORE_FILE_EXT": json.dumps([f"*{ending}" for ending in ENDINGS]),
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(options.state / "dicomweb"),
        # Seconds for which lists of a store are believed; MONAI Label's two hours hide labels that were just saved.
        "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "5",
        # Our scores are measured when they are asked for, not after each choice of an image.
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "False",
        # MONAI Label takes it for granted.
        "PYTHONPATH": "",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Ids of images shall not meet files of the folder that the server was started in.
    os.chdir(options.app)
    tempfile.tempdir = None


def _logging(options: LabelOptions, pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Return the set-up of logs: warnings of others, what is ours, and names hidden in all of it."""
    handler = {"filters": ["hide"], "formatter": "line"}
    jobs = ("train", "batch_infer", "scoring")
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"hide": {"()": HidingFilter, "pseudonyms": pseudonyms}, "ours": {"()": _OursFilter}},
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {
            "terminal": {"class": "logging.StreamHandler", "stream": sys.stderr, **handler},
            # MONAI Label sends this file to viewers that ask for the log.
            "file": {
                "class": "logging.handlers.RotatingFileHandler",
                "filename": str(options.app / "logs" / "app.log"),
                "maxBytes": 2**22,
                "backupCount": 2,
                "encoding": "utf-8",
                **handler,
            },
        },
        "root": {"level": "WARNING", "handlers": ["terminal", "file"]},
        "loggers": {
            "medseg": {"level": "INFO"},
            "uvicorn.error": {"level": "INFO"},
            # It tells of a decoder that is not needed, with each image.
            "monai.data.nvimgcodec_pydicom_plugin": {"level": "ERROR"},
            **{f"task_{job}": {"level": "INFO", "filters": ["ours"]} for job in jobs},
        },
    }


class _OursFilter(logging.Filter):
    """Of what a job's process prints, lets our own lines pass, and errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is meant for the log."""
        text = record.getMessage()
        return "medseg: " in text or "Error: " in text
