"""Uploads folders to the hub and downloads them, with huggingface_hub; its errors become one line.

`HF_ENDPOINT` sets another hub than huggingface.co, `HF_TOKEN` a login, `HF_HOME` another cache; with `HF_HUB_OFFLINE=1`
only the cache is used.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import disable_progress_bars

import hybridzoo
from hybridzoo.train.errors import UserError
from hybridzoo.train.hub.card import PLACE
from hybridzoo.train.hub.folder import CARD, CONFIG, FILES, check_repository, split_name, weights_in
from hybridzoo.train.plain import printable
from hybridzoo.train.published import Unavailable, knock

HOME = "https://huggingface.co"
_LOGIN = "give --token, set HF_TOKEN, or log in by: hf auth login"


def push(folder: Path, repository: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a folder that `export` wrote, as one commit; the repository is created if it does not exist.

    In the model card, USER/NAME is replaced by the repository's name. Hidden files are not uploaded.

    Args:
        folder: folder with weights, config and model card.
        repository: USER/NAME.
        private: make a new repository private; an existing one is not changed.
        token: a login that may write; default `HF_TOKEN`, or the stored login of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        UserError: no such folder or name; the hub refuses, or cannot be reached.
    """
    check_repository(repository, "--repo-id")
    missing = [name for name in (CONFIG, CARD) if not (folder / name).is_file()]
    if weights_in(folder) is None or missing:
        raise UserError(f"{folder}: is not a folder written by `hybridzoo hub export`")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    with _told(repository, "upload to"):
        api = HfApi(endpoint=_endpoint(), token=token, library_name="hybridzoo", library_version=hybridzoo.__version__)
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        operations: list[Any] = []
        for path in files:
            name, content = path.relative_to(folder).as_posix(), path.read_bytes() if path.name == CARD else None
            if content is not None:
                content = content.replace(PLACE.encode(), repository.encode())
            operations.append(CommitOperationAdd(name, content if content is not None else str(path)))
        api.create_commit(repository, operations, commit_message="Upload a model by hybridzoo")
    return str(made)


def bring(name: str) -> Path:
    """Download `hf-hub:USER/NAME` or `hf-hub:USER/NAME@REVISION`, and return the weights; the config is next to them.

    Raises:
        UserError: unknown name, no model there, or the hub refuses or cannot be reached.
    """
    repository, revision = split_name(name)
    how: dict[str, Any] = {"endpoint": _endpoint(), "library_name": "hybridzoo"}
    try:
        knock(_endpoint() or HOME)  # the hub's client would try for half a minute
    except Unavailable:
        how["local_files_only"] = True
    with _told(repository, "download from"):
        try:
            config = Path(hf_hub_download(repository, CONFIG, revision=revision or None, **how))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise UserError(f"{name}: holds no {CONFIG}: not a model in timm's layout or ours") from error
        for file in FILES:
            try:
                return Path(hf_hub_download(repository, file, revision=config.parent.name, **how))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    raise UserError(f"{name}: holds none of {', '.join(FILES)}")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@contextlib.contextmanager
def _told(repository: str, doing: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into one line that says what to do."""
    host = urlsplit(_endpoint() or HOME).netloc
    if not sys.stderr.isatty():  # huggingface_hub draws progress bars into files too
        disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"{repository}: is not a repository name ({_line(error)})") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repository}: cannot {doing} the hub: HF_HUB_OFFLINE is set") from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else f"no connection to {host}"
        raise UserError(f"{repository}: is not in the cache, and {reason}") from error
    except HfHubHTTPError as error:
        answer = _answer(error.response.status_code, error.server_message)
        raise UserError(f"{repository}: cannot {doing} {host}: {answer}") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a local file
        status = re.search(r"HTTP status \w+ error \((\d{3})", str(error))  # hf_xet has only this text
        answer = _answer(int(status[1])) if status else f"no connection ({_line(error)})"
        raise UserError(f"{repository}: cannot {doing} {host}: {answer}") from error
    except (ValueError, LookupError, RuntimeError) as error:  # an invalid answer, or a card that the hub refuses
        raise UserError(f"{repository}: cannot {doing} {host}: {_line(error)}") from error


def _answer(status: int, message: str | None = None) -> str:
    """What an HTTP status means, with the server's own message."""
    said = f" ({printable(' '.join(message.split()))[:200]})" if message else ""
    meaning = {
        401: f"it needs a login{said}; {_LOGIN}",
        403: f"this login is not allowed to do this{said}; {_LOGIN}",
        404: f"there is no such repository, or this login cannot see it{said}",
        409: f"somebody else is changing the repository{said}; try again",
        413: f"it does not accept files of this size{said}",
        429: f"too many requests{said}; try again later",
    }
    return f"{status}, {meaning.get(status, f'it answers with an error{said}; try again later')}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text)[:200]
