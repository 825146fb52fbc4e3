"""Server process: MONAI Label's HTTP interface with medseg's app, login and logs."""

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

# Entry module that MONAI Label expects in the app's folder.
_ENTRY = (
    '"""Entry module for MONAI Label, rewritten at each start."""\n\n'
    'from medseg.label.app.main import MedsegApp\n\n__all__ = ["MedsegApp"]\n'
)
_ROLES = ("monailabel-admin", "monailabel-reviewer", "monailabel-annotator", "monailabel-user")


def run(options: LabelOptions, *, certificate: Path | None = None, key: Path | None = None) -> None:
    """Serve until the process is stopped.

    Args:
        options: Checked options of the server.
        certificate: PEM file of the TLS certificate; without one, the server does not encrypt.
        key: PEM file of the certificate's key.

    Raises:
        RequestError: The app cannot be built, or the studies' records cannot be read.
    """
    _prepare(options, _realm(options))
    pseudonyms = Pseudonyms(read_key(options.key))
    logging.config.dictConfig(_logging(options, pseudonyms))
    # MONAI Label reads its settings at import.
    from monailabel.app import app
    from monailabel.interfaces.utils.app import app_instance

    from medseg.label.app import middleware

    # MONAI Label's child processes fail when they print this setting.
    os.environ.pop("MONAI_LABEL_CORS_ORIGINS", None)
    middleware.patch_monailabel()
    try:
        instance = app_instance()
    except (OSError, ValueError) as error:
        raise RequestError(
            f"MONAI Label cannot open the studies '{options.studies}' ({in_a_line(error)}): check that its records "
            "there (datastore_v2.json, labels/) are readable and writable, or move them away"
        ) from error
    instance.pseudonyms = pseudonyms
    instance.learn_names()
    middleware.add_request_checks(app, options, pseudonyms, learn=instance.learn_names)
    _log_images(instance.datastore(), options)
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


def _log_images(datastore: Any, options: LabelOptions) -> None:
    """Log the number of images, or why the store does not answer."""
    try:
        count = len(datastore.list_images())
    except Exception as error:
        # The server starts anyway: the store may be started later.
        logger.warning("the DICOMweb store '%s' does not answer yet: %s", options.studies, in_a_line(error))
        return
    where = "series match the filter of the store" if is_remote_store(options.studies) else "images in the folder"
    logger.log(logging.INFO if count else logging.WARNING, "%d %s", count, where)


def _realm(options: LabelOptions) -> str:
    """Return the URL of the login realm: from the environment, or medseg's own; empty without login."""
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
    """Create the folders, and set the environment of MONAI Label and of its child processes."""
    options.state.mkdir(parents=True, exist_ok=True)
    options.state.chmod(0o700)
    # Including viewers' sessions: MONAI Label does not start after an interrupted upload.
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
            # Programs of this environment, such as dcmqi.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
    )
    defaults = {
        "MONAI_LABEL_CORS_ORIGINS": f'["{options.origin}"]',
        "MONAI_LABEL_DATASTORE_FILE_EXT": json.dumps([f"*{ending}" for ending in ENDINGS]),
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(options.state / "dicomweb"),
        # Lifetime of a store's cached lists, in seconds; MONAI Label's two hours would hide newly saved labels.
        "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "5",
        # Scores are computed on request, not after each selection of an image.
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "False",
        # MONAI Label requires the variable to exist.
        "PYTHONPATH": "",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Image ids must not match files in the folder where the server was started.
    os.chdir(options.app)
    tempfile.tempdir = None


def _logging(options: LabelOptions, pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Return the logging config: warnings of other packages, messages of medseg, and names hidden in both."""
    handler = {"filters": ["hide"], "formatter": "line"}
    jobs = ("train", "batch_infer", "scoring")
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"hide": {"()": HidingFilter, "pseudonyms": pseudonyms}, "ours": {"()": _OursFilter}},
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {
            "terminal": {"class": "logging.StreamHandler", "stream": sys.stderr, **handler},
            # MONAI Label sends this file to viewers that request the log.
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
            # It warns about an optional decoder with each image.
            "monai.data.nvimgcodec_pydicom_plugin": {"level": "ERROR"},
            **{f"task_{job}": {"level": "INFO", "filters": ["ours"]} for job in jobs},
        },
    }


class _OursFilter(logging.Filter):
    """Passes the lines of medseg and the errors in the output of a job's process."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line belongs in the log."""
        text = record.getMessage()
        return "medseg: " in text or "Error: " in text
