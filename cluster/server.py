"""MLflow's own server on this machine: for the workers of a cluster, or for a look at a local store."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from cluster import tracking
from cluster.arguments import parse
from sim.checks import require

SERVER_HELP = """Serve MLflow from a folder of this machine until Ctrl-C: one SQLite file, artifacts through the server.

It has no password: who can reach the address can read and write. Widen --host only in a network you trust.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Where a local MLflow server keeps its data, and where it listens."""

    folder: Path = Path("headway-server")
    """Folder of the SQLite file and of the artifacts; made if need be."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 5000
    """Port to listen on."""
    allowed_hosts: tuple[str, ...] = ()
    """HOST:PORT by which clients call it where that is neither loopback nor a private address; others are refused."""


def server_command(arguments: Sequence[str], console: Console) -> int:
    """`headway server`: serves until Ctrl-C."""
    options = parse(ServerOptions, arguments, ServerOptions(), "headway server", SERVER_HELP)
    folder = options.folder.expanduser().absolute()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"port: {options.port} on {options.host!r} cannot be listened on ({reason})") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder: {str(folder)!r} cannot be made ({error.strerror})") from error
    uri = f"sqlite:///{folder}/mlflow.db"
    require_proxied(uri, folder)
    console.print(f"MLflow from {folder}; give sweeps", soft_wrap=True)
    console.print(f"  --tracking-uri http://{options.host}:{options.port}", soft_wrap=True)
    hosts = ["--allowed-hosts", ",".join(options.allowed_hosts)] if options.allowed_hosts else []
    artifacts = ["--artifacts-destination", (folder / "artifacts").as_uri()]
    serve_mlflow(uri, options.host, options.port, *artifacts, *hosts)


def require_proxied(uri: str, folder: Path) -> None:
    """Make the store, or require that its runs keep artifacts with the server: other nodes could not reach files."""
    client = tracking.connect(uri)
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    proxied = found is None or found.artifact_location.startswith("mlflow-artifacts:")
    require(proxied, "folder", str(folder), "one of the server's own: the ledger here keeps artifacts as local files")


def serve_mlflow(uri: str, host: str, port: int, *more: str) -> NoReturn:
    """Become MLflow's server on a database, so that whatever ends this process ends it too.

    One worker, as several would compete for a SQLite file. The URI goes by the environment: it may hold a password.
    """
    server = [sys.executable, "-m", "mlflow", "server", "--host", host]
    server += ["--port", str(port), "--workers", "1", *more]
    sys.stdout.flush()
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    os.execve(sys.executable, server, {**os.environ, **quiet, "MLFLOW_BACKEND_STORE_URI": uri})
