"""Atomic downloads with retries."""

from __future__ import annotations

import http.client
import logging
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from pogo_torchrl.files import atomic_write
from pogo_torchrl.progress import progress_bar

_LOGGER = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 4.0, 16.0)
"""Delays before the second, third and fourth attempt, in seconds."""

_TRANSIENT = (408, 425, 429)
"""HTTP status codes below 500 worth a retry."""


def download(url: str, path: Path, *, timeout: float = 30.0, progress: bool = True) -> None:
    """Download a file, with a progress bar and retries.

    The file is written atomically: it is downloaded to a temporary name next to ``path`` and
    renamed once complete.

    Args:
        url: an ``http``, ``https`` or ``file`` URL. Proxies are read from the environment.
        path: destination of the file; its folder must exist.
        timeout: timeout for connecting and for each read, in seconds. Defaults to ``30.0``.
        progress: show a progress bar on stderr. Defaults to ``True``.

    Raises:
        FileNotFoundError: when the server does not have the file.
        ConnectionError: when the server is unreachable, times out, closes the connection early or
            returns another error. Transient errors are retried three times first.
        OSError: when the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     source = Path(folder, "source")
        ...     _ = source.write_bytes(b"data")
        ...     download(source.as_uri(), Path(folder, "copy"), progress=False)
        ...     Path(folder, "copy").read_bytes()
        b'data'
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return _attempt(url, path, timeout, progress)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"{url}: {error.reason}") from error
            reason = f"HTTP {error.code}, {error.reason}"
            if error.code < 500 and error.code not in _TRANSIENT:
                wait = None
        except urllib.error.URLError as error:
            if isinstance(error.reason, FileNotFoundError):
                raise FileNotFoundError(f"{url}: no such file") from error
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
        if wait is None:
            raise ConnectionError(f"{url}: {reason}")
        _LOGGER.warning("%s: %s; retrying in %g s.", url, reason, wait)
        time.sleep(wait)


def _attempt(url: str, path: Path, timeout: float, progress: bool) -> None:
    with urllib.request.urlopen(url, timeout=timeout) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length is not None else None
        bar = progress_bar(
            total=total, unit="B", unit_scale=True, desc=path.name, disable=not progress
        )
        with bar, atomic_write(path) as file:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            if total is not None and file.tell() != total:
                raise ConnectionError(f"connection closed after {file.tell()} of {total} bytes")
