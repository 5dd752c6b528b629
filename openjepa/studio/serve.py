"""The studio's server: on this machine alone unless told, nothing served but the page, nothing asked from elsewhere."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from openjepa.errors import UserError, first_line, needs
from openjepa.studio.studio import MOST_BYTES, Studio

LOCAL = ("127.0.0.1", "localhost")
POLICY = (  # what the page may load: this server's own, whatever a library would like
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
)
FETCHED = re.compile(r"/(?:file|proxy)[=/]https?:/|/run-history/", re.IGNORECASE)  # by Gradio, for whoever asks
ELSEWHERE = re.compile(rb"""<(?:link|script|meta)\b[^>]*["']https?://[^>]*>(?:\s*</script>)?""")

Message = dict[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class Guarded:
    """ASGI: tells every browser the policy, and takes what names another server out of the page itself.

    What would be fetched from another server is refused, and what another site's page sends.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        if refused(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"refused"})
            return
        held: list[Message] = []  # of a page: its length is known when all of it is there

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": headers}
                if any(k.lower() == b"content-type" and v.startswith(b"text/html") for k, v in headers):
                    held.append(message)
                    return
            elif held:
                held.append(message)
                if not message.get("more_body"):
                    for part in rewritten(held):
                        await send(part)
                return
            await send(message)

        await self.app(scope, receive, guarded)


def refused(scope: Message) -> bool:
    """Whether a request asks for what lies on another server, or is sent by another site's page, as browsers tell."""
    if scope["type"] != "http":
        return False
    site = dict(scope["headers"]).get(b"sec-fetch-site", b"none")
    return bool(FETCHED.search(scope["path"])) or (scope["method"] == "POST" and site not in (b"same-origin", b"none"))


async def fetch_nothing(url: str, cache_dir: str) -> str:
    """In the place of Gradio's download of an address that is sent where a file is expected."""
    raise ValueError("only files that were uploaded are taken")


def rewritten(held: list[Message]) -> list[Message]:
    body = ELSEWHERE.sub(b"", b"".join(part.get("body", b"") for part in held[1:]))
    headers = [(k, v) for k, v in held[0]["headers"] if k.lower() != b"content-length"]
    start = {**held[0], "headers": [*headers, (b"content-length", str(len(body)).encode())]}
    return [start, {"type": "http.response.body", "body": body}]


def refuse_taken(host: str, port: int) -> None:
    """Raises UserError for an address that cannot be listened at."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: give 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: --port takes another") from error
        raise UserError(f"cannot listen at {host}, port {port}: {first_line(error)}") from error


def launch(studio: Studio, host: str, port: int) -> tuple[Any, str]:
    """The page, served by a thread, and its address. Raises UserError."""
    refuse_taken(host, port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)  # an empty list of them means these to Gradio
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with needs("studio"):
        from gradio import networking, processing_utils
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    from openjepa.studio import page

    processing_utils.async_ssrf_protected_download = fetch_nothing
    # Gradio asks its own server whether it is there: not by way of a proxy, and a busy machine may take more than its 3 s.
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY", ""), *LOCAL, host]
    os.environ["no_proxy"] = ",".join(filter(None, dict.fromkeys(direct)))
    networking.url_ok = lambda url: True
    guards = [Middleware(Guarded)]
    if host in LOCAL:  # another site's name that leads here is not asked for
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL)))
    blocks = page.build(studio)
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
            allowed_paths=[], max_file_size=MOST_BYTES, strict_cors=True, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, run_history=False, show_error=False, footer_links=[], app_kwargs={"middleware": guards},
            state_session_capacity=100, theme=page.theme(), css=page.STYLE,
        )  # fmt: skip
    except OSError as error:  # somebody else took it meanwhile
        raise UserError(f"port {port} of {host} is in use: --port takes another") from error
    return blocks, address


def leave(number: int, frame: object) -> None:
    """A signal that would end the process at once, and leave its folder there."""
    raise SystemExit(128 + number)


def serve(studio: Studio, host: str, port: int) -> None:
    """Until it is interrupted or ended. What was uploaded and drawn lies in a folder of its own, and goes with it.

    Raises UserError.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    with tempfile.TemporaryDirectory(prefix="openjepa-studio-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks, address = launch(studio, host, port)
        try:
            print(f"studio: {address} (Ctrl-C ends it)", flush=True)
            if host not in LOCAL:
                print(f"note: whoever reaches {host} can use it; nobody is asked who they are", flush=True)
            threading.Event().wait()
        finally:
            blocks.close(verbose=False)
