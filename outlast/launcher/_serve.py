"""Where the launcher listens, and whom it tells the address."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import ipaddress
import os
import secrets
import signal
import socket
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from outlast import __version__
from outlast.config import Config
from outlast.errors import ConfigError, OutlastError, UsageError

_SHORTEST_TOKEN = 32  # characters


@dataclass(frozen=True)
class Options:
    """The launcher's command line. *port* 0 is any that is free; *origin* a reverse proxy's own address."""

    host: str = "127.0.0.1"
    port: int = 0
    socket: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    origin: str | None = None
    token_file: Path | None = None


def serve(config: Config, options: Options, say: Callable[[str], None]) -> None:
    """Serve the page until SIGINT or SIGTERM; *say* is called with each line for the user.

    Raises:
        UsageError: an option cannot be had, or this process is root's.
        ConfigError: the web server's package is not installed.
        OutlastError: the address is taken.
    """
    if os.geteuid() == 0:
        raise UsageError(
            "launcher: it acts for one user, and must not be root",
            hint="start it as the user whose jobs these are",
        )
    tls = _tls(options)
    _refuse_open_air(options, tls)
    try:
        import aiohttp.web  # noqa: F401 - whether it is there
    except ModuleNotFoundError:
        raise ConfigError(
            "launcher: aiohttp is not installed",
            hint="install python3-aiohttp (apt, dnf) or outlast[launcher] (pip)",
        ) from None
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(config, options, tls, _token(options), say))


async def _serve(
    config: Config, options: Options, tls: ssl.SSLContext | None, token: str, say: Callable[[str], None]
) -> None:
    from aiohttp import web

    from outlast.launcher._web import Site

    scheme = "https" if tls else "http"
    listener = _listen(options)
    hosts, origins = _names(listener, scheme, options)
    user = getpass.getuser()
    site = Site(
        token=token,
        hosts=hosts,
        origins=origins,
        watcher=config.watcher.socket,
        scheduler=config.scheduler,
        facts={
            "user": user,
            "cluster": config.cluster,
            "host": socket.gethostname(),
            "home": str(Path.home()),
            "version": __version__,
        },
    )
    # Streams have no end of their own: they are cut off a moment after the signal.
    runner = web.AppRunner(site.app(), access_log=None, handle_signals=False, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.SockSite(runner, listener, ssl_context=tls).start()
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        _announce(listener, scheme, options, token, user, say)
        await stop.wait()
    finally:
        await runner.cleanup()
        if options.socket is not None:
            options.socket.unlink(missing_ok=True)


def _announce(
    listener: socket.socket, scheme: str, options: Options, token: str, user: str, say: Callable[[str], None]
) -> None:
    shown = "" if options.token_file else f"#token={token}"
    if options.origin:
        say(f"{options.origin}/{shown}")
    if options.socket is not None:
        say(f"outlast: the launcher listens at {options.socket}")
        return
    host, port = listener.getsockname()[:2]
    if not options.origin:
        say(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{shown}")
    say(f"outlast: whoever has this address can do with jobs and files what {user} can; Ctrl-C ends it")
    if ipaddress.ip_address(host).is_loopback:
        say(
            f"outlast: from another machine, first: ssh -L {port}:{host}:{port} {user}@{socket.gethostname()}"
        )


def _names(listener: socket.socket, scheme: str, options: Options) -> tuple[set[str], set[str]]:
    """Return the Host and Origin headers of requests that are meant for this server."""
    names: set[str] = set()
    if options.socket is None:
        host, port = listener.getsockname()[:2]
        names = {f"[{host}]:{port}" if ":" in host else f"{host}:{port}"}
        if ipaddress.ip_address(host).is_loopback:
            names.add(f"localhost:{port}")
        else:
            names |= {f"{name.lower()}:{port}" for name in (socket.gethostname(), socket.getfqdn())}
    origins = {f"{scheme}://{name}" for name in names}
    if options.origin is not None:
        parts = urlsplit(options.origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path not in ("", "/"):
            raise UsageError(
                f"{options.origin}: not an origin",
                hint="write scheme and host only, as in https://ood.example.org",
            )
        origins.add(f"{parts.scheme}://{parts.netloc}".lower())
        names.add(parts.netloc.lower())
    elif options.socket is not None:
        raise UsageError(
            "launcher: --socket is for a reverse proxy, whose address is needed",
            hint="add --origin https://PROXY",
        )
    return names, origins


def _listen(options: Options) -> socket.socket:
    if options.socket is not None:
        return _listen_at(options.socket)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise OutlastError(f"{options.host}:{options.port}: {why}", hint="choose another --port") from None
    listener.listen(128)
    return listener


def _listen_at(path: Path) -> socket.socket:
    if path.is_socket():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # nobody else may connect
    try:
        listener.bind(str(path))
    except OSError as error:
        raise OutlastError(f"{path}: {error.strerror}") from None
    finally:
        os.umask(mask)
    listener.listen(128)
    return listener


def _tls(options: Options) -> ssl.SSLContext | None:
    if options.tls_cert is None and options.tls_key is None:
        return None
    if options.tls_cert is None:
        raise UsageError("launcher: --tls-key without --tls-cert", hint="give both")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{options.tls_cert}: {error}") from None
    return context


def _refuse_open_air(options: Options, tls: ssl.SSLContext | None) -> None:
    """Refuse to send the token over a network that anybody may listen to."""
    try:
        address = ipaddress.ip_address(options.host)
    except ValueError:
        raise UsageError(f"--host {options.host}: not an address", hint="write 127.0.0.1 or ::1") from None
    if address.is_unspecified:
        raise UsageError(f"--host {options.host}: name one address, not all", hint="see docs/launcher.md")
    if not address.is_loopback and tls is None and options.socket is None:
        raise UsageError(
            f"--host {options.host}: over a network only with TLS",
            hint="add --tls-cert and --tls-key, or keep to 127.0.0.1 and use ssh -L",
        )


def _token(options: Options) -> str:
    path = options.token_file
    if path is None:
        return secrets.token_urlsafe(32)
    try:
        info = path.stat()
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise UsageError(f"{path}: others may read it", hint=f"chmod 600 {path}")
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{path}: a token has {_SHORTEST_TOKEN} characters or more, and no spaces")
    return token
