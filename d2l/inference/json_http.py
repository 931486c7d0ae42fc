"""JSON over HTTP with one server, which may be down, slow, or answer nonsense: every such case is a `ServerError`."""

import http.client
import json
import socket
import threading
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import SplitResult, urlsplit

from d2l.errors import ConfigError, ServerError

MAX_BYTES = 2**25  # of an answer: a thousand log-probabilities take 0.1 MB
_SHOWN = 300  # characters of a server's own words in a message


class JsonServer:
    """A server at a URL. It follows no redirect and uses no proxy: nothing goes anywhere but there.

    Args:
        url: such as `http://localhost:8000`; a last `/v1` is left out.
        timeout: seconds for one whole answer, from the connection to the last byte.
        connect_timeout: seconds for the connection.
        api_key: sent as a bearer token.

    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(self, url: str, timeout: float, connect_timeout: float = 5.0, api_key: str | None = None) -> None:
        self._place = _split(url)
        self.url = self._place.geturl()
        self.timeout, self.connect_timeout = timeout, connect_timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Any:
        """Return the JSON at a path; see `post`."""
        return self._request("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """Send JSON and return the JSON of the answer.

        Raises:
            ServerError: kind `down`, `slow`, `status` (with its number), or `nonsense`.
        """
        return self._request("POST", path, json.dumps(body).encode())

    def _request(self, method: str, path: str, body: bytes | None) -> Any:
        where = f"{method} {self.url}{path}"
        connection = self._connect(where)
        assert connection.sock is not None
        late = threading.Event()  # a timeout of the socket would start again with every byte
        alarm = threading.Timer(self.timeout, _hang_up, (connection.sock, late))
        alarm.daemon = True
        alarm.start()
        try:
            connection.request(method, self._place.path + path, body, self._headers)
            with connection.getresponse() as response:
                status, text = response.status, response.read(MAX_BYTES + 1)
                kind, left = response.headers.get_content_type(), response.length  # bytes promised and not sent
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):  # the socket's own may come first
                raise ServerError("slow", f"{where}: no whole answer within {self.timeout:g} s") from None
            broken = f"{where}: the answer breaks off or is not HTTP ({type(error).__name__}: {error})"
            raise ServerError("nonsense", broken) from None
        finally:
            alarm.cancel()
            connection.close()
        if late.is_set():
            raise ServerError("slow", f"{where}: no whole answer within {self.timeout:g} s")
        if len(text) > MAX_BYTES:
            raise ServerError("nonsense", f"{where}: the answer is longer than {MAX_BYTES:,} bytes")
        if left:
            raise ServerError("nonsense", f"{where}: the answer breaks off, {left:,} bytes before its end")
        if status != http.client.OK:
            raise ServerError("status", f"{where}: status {status}: {_reason(text)}", status)
        return _decode(text, where, kind)

    def _connect(self, where: str) -> http.client.HTTPConnection:
        secure = self._place.scheme == "https"
        make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._place.hostname is not None
        connection = make(self._place.hostname, self._place.port, timeout=self.connect_timeout)
        try:
            connection.connect()
        except (OSError, UnicodeError) as error:
            connection.close()
            kind = "slow" if isinstance(error, TimeoutError) else "down"
            raise ServerError(kind, f"{where}: no connection ({error})") from None
        assert connection.sock is not None
        connection.sock.settimeout(self.timeout)
        return connection


def _split(url: str) -> SplitResult:
    try:
        place = urlsplit(url.strip().rstrip("/").removesuffix("/v1").rstrip("/"))
        usable = place.scheme in ("http", "https") and place.hostname and place.port != 0
    except ValueError:
        usable = False
    if not usable or place.username or place.query or place.fragment or not url.isprintable() or " " in url:
        raise ConfigError([f"expected a server's address such as http://localhost:8000. Got {url!r}"])
    return place


def _hang_up(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


def _decode(text: bytes, where: str, kind: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        said = f"{type(error).__name__}: {str(error)[:_SHOWN]}"
        raise ServerError("nonsense", f"{where}: the answer ({kind}) is not JSON. {said}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _reason(text: bytes) -> str:
    """Return a server's own words about an error: the message in its JSON, or the start of its text, on one line."""
    words = text.decode("utf-8", "replace")
    try:
        found = json.loads(words)
        while isinstance(found, dict):
            found = next((found[key] for key in ("error", "message", "detail") if key in found), str(found))
        words = str(found)
    except (ValueError, RecursionError):
        pass
    return (
        " ".join("".join(char if char.isprintable() else " " for char in words).split())[:_SHOWN] or "no reason given"
    )
