"""Sweeps and searches as jobs of a Ray cluster: submit, follow, list, stop."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import tyro
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.arguments import (
    STORAGE,
    leading,
    make_sweep,
    named,
    one_line,
    parse,
    require_names,
    sweep_form,
    wide_terminal,
)
from cluster.display import count, duration
from cluster.outside import PACKAGES, sources
from cluster.recipes import load_sweep
from cluster.sweep import Sweep, validate
from cluster.tracking import TOLD, shown
from sim.checks import require

for _name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # they tell of every upload

GRACE = 60  # seconds between SIGTERM and SIGKILL of a stopped job; Ray's own 3 are few for the ledger of many members
ANSWER_WAIT = 5.0  # seconds for a dashboard to answer
NO_AGENT = "No available agent"  # says Ray where it will have one soon
LOST_AFTER = 60.0  # seconds without a connection after which a job is followed no longer
STOPPED = 130  # exit code of a job that was stopped, as of a command that was interrupted

SUBMIT_HELP = """Run `headway sweep`, or `headway search`, as a job of a Ray cluster and follow its log; the exit code
is the job's.

Every flag of `headway sweep RECIPE --help`, or of `headway search RECIPE --help`, is allowed beside these. Where the
recipe, its system or its probes are of your own package, that is sent along; name with --ship what else these import.
For example

  headway submit quick --seeds 8 --address http://HOST:8265 --tracking-uri http://MLFLOW:5000 --out /shared/headway
  headway submit search quick --widths 32 --space train.learning_rate=1e-4..1e-2:log --address ...

Ctrl-C leaves the job running. The same command again goes on where a job was stopped or lost.
"""
JOBS_HELP = "List the jobs of a Ray cluster, or follow one: its log from the start; the exit code is the job's."
STOP_HELP = "Stop a job. Its members at work become KILLED in the ledger; the same command again goes on."


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterOptions:
    """Which cluster."""

    address: str | None = None
    """URL of the cluster's dashboard, http://HOST:8265. Default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitOptions(ClusterOptions):
    """Where a sweep or a search runs as a job, what is sent along, and where its output goes."""

    out: str | None = None
    """Folder for reports and, unless `store` is given, checkpoints: absolute, as the cluster sees it."""
    store: str | None = None
    """Absolute folder or object-store URL for checkpoints; several nodes need one that all can reach."""
    tracking_uri: str | None = None
    """MLflow server, or sqlite:////ABSOLUTE/PATH on a cluster of one node. Default: MLFLOW_TRACKING_URI."""
    storage: str | None = None
    """Of a search: Optuna's database. Default: HEADWAY_STORAGE, or optuna.db beside `out`."""
    wait: bool = True
    """Follow the job until it ends."""
    installed: bool = False
    """Run the headway that is installed on the cluster; of this one nothing is sent."""
    ship: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A file or folder of your own that the job needs beside headway; may be given several times."""


def submit_command(arguments: Sequence[str], console: Console) -> int:
    """`headway submit`."""
    command, told = (arguments[0], arguments[1:]) if arguments and arguments[0] in READ else ("sweep", arguments)
    prog = f"headway submit {command}".removesuffix(" sweep")
    names, rest = require_names(told, prog, ("RECIPE",), "a recipe")
    if {"-h", "--help"} & set(rest):
        parse(SubmitOptions, ["--help"], SubmitOptions(), f"{prog} {' '.join(names or ['RECIPE'])}", SUBMIT_HELP)
    (recipe,), (options, overrides) = names, split_arguments(rest, prog)
    if command != "search":
        require(options.storage is None, "storage", shown(options.storage or ""), "left out but for a search")
    options = with_environment(options, command)
    require_lasting(options)
    stored = ["--storage", options.storage] if options.storage else []
    work = READ[command](recipe, [*overrides, *stored], f"{prog} {recipe}")
    files = own_files(recipe, work.sweep, options.ship)
    client = open_jobs(options.address)
    with staged(files, options.installed) as folder, plain_errors(client.get_address()):
        job = submit_when_ready(
            client,
            entrypoint=entrypoint(command, recipe, overrides, options),
            runtime_env=runtime_env(options, folder),
            metadata={"sweep": work.name},
        )
    console.print(f"job {job}: {command} {escape(work.name)}, {work.extent}")
    if options.wait:
        return follow(client, job, console)
    tell_more(job, client, console)
    return 0


def submit_when_ready(client: JobSubmissionClient, **job: Any) -> str:
    """The job's id. A cluster that has just begun has no agent yet to take one: it is asked again for a minute."""
    deadline = time.monotonic() + LOST_AFTER
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(2.0)


def split_arguments(arguments: Sequence[str], prog: str) -> tuple[SubmitOptions, list[str]]:
    """The options of the submission, and, in their order, all others. ValueError in one line."""
    captured = io.StringIO()
    with contextlib.redirect_stderr(captured), wide_terminal():
        try:
            return tyro.cli(SubmitOptions, args=list(arguments), prog=prog, return_unknown_args=True)
        except SystemExit:
            raise ValueError(one_line(captured.getvalue())) from None


def with_environment(options: SubmitOptions, command: str) -> SubmitOptions:
    """With the places that variables name where no flag does."""
    storage = options.storage or (os.environ.get(STORAGE) if command == "search" else None)
    return replace(options, tracking_uri=options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), storage=storage)


def require_lasting(options: SubmitOptions) -> None:
    """Raise ValueError where output would go into the folder that the job works in, which Ray deletes."""
    kept = "as the folder that a job works in is deleted after it"
    require(is_absolute(options.out), "out", options.out, f"an absolute path, {kept}")
    lasting = options.store is None or is_absolute(options.store) or "://" in options.store
    require(lasting, "store", options.store, f"an absolute path or a URL, {kept}")
    uri = options.tracking_uri or ""
    lasting = is_absolute(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:") else "://" in uri
    require(lasting, "tracking_uri", options.tracking_uri, f"http://HOST:PORT or sqlite:////ABSOLUTE/PATH, {kept}")


def is_absolute(path: str | None) -> bool:
    """Whether a path means the same wherever a process stands; the cluster's machines run Linux."""
    return path is not None and PurePosixPath(path).is_absolute()


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a job will do, as it will read it: its name in the ledger, a sweep that has its recipe's system and probes,
    and its extent in words."""

    name: str
    sweep: Sweep
    extent: str


def read_search(recipe: str, overrides: Sequence[str], prog: str) -> Work:
    """A search as the job will read it. ValueError for whatever the job would refuse."""
    from cluster.search_config import parse_search

    search = parse_search([recipe, *overrides])
    require(search.settings.workers is None, "workers", search.settings.workers, "left out for a job")
    storage = search.options.storage or "sqlite:////"
    lasting = is_absolute(storage.removeprefix("sqlite:///")) if storage.startswith("sqlite:") else "://" in storage
    allowed = "a database URL such as sqlite:////ABSOLUTE/PATH, as the folder that a job works in is deleted after it"
    require(lasting, "storage", storage, allowed)
    return Work(name=search.name, sweep=search.sweep, extent=count(search.options.points, "point"))


def read_sweep(recipe: str, overrides: Sequence[str], prog: str) -> Work:
    """A sweep as the job will read it. ValueError for whatever the job would refuse."""
    default = load_sweep(recipe)
    form, filled = sweep_form(default)
    options = parse(form, overrides, filled, prog, SUBMIT_HELP)
    require(not options.dry_run, "dry_run", True, "left out; `headway sweep RECIPE --dry-run` plans without a cluster")
    require(options.settings.workers is None, "workers", options.settings.workers, "left out for a job")
    sweep = make_sweep(options, default)
    return Work(name=sweep.id, sweep=sweep, extent=count(len(validate(sweep)), "member"))


READ: Mapping[str, Callable[[str, Sequence[str], str], Work]] = {"sweep": read_sweep, "search": read_search}


def own_files(recipe: str, sweep: Sweep, ship: Sequence[Path]) -> list[Path]:
    """What the job needs beside headway: a stored config, `ship`, and the packages of recipe, system and probes."""
    stored = [Path(recipe).expanduser()] if recipe.endswith(".json") else []
    named = [name.partition(":")[0] for name in (recipe, *sweep.probe.probes) if ":" in name]
    shipped = {path.expanduser().resolve() for path in ship}
    found = sources([*named, type(sweep.system).__module__])
    return [*stored, *ship, *(path for path in found if path.resolve() not in shipped)]


def entrypoint(command: str, recipe: str, overrides: Sequence[str], options: SubmitOptions) -> str:
    """The job's command. Tracking URI and `storage`, which may hold a password, go by `runtime_env` instead: they are
    not in its line, but whoever may ask the cluster for its jobs can read them."""
    recipe = Path(recipe).name if recipe.endswith(".json") else recipe
    store = ["--store", options.store] if options.store else []
    return shlex.join(["python", "-m", "cluster.cli", command, recipe, *overrides, "--out", str(options.out), *store])


def runtime_env(options: SubmitOptions, folder: Path | None) -> dict[str, Any]:
    """What Ray sets up for the job. Its variables must differ from those of `dispatch.ray_cluster`."""
    variables = {"MLFLOW_TRACKING_URI": str(options.tracking_uri), "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE)}
    if options.storage:
        variables[STORAGE] = options.storage
    return {"env_vars": variables, **({"working_dir": str(folder)} if folder else {})}


@contextlib.contextmanager
def staged(files: Sequence[Path], installed: bool) -> Iterator[Path | None]:
    """A folder with what the job needs: headway's packages unless installed there, and `files`; or None for nothing.

    A folder of its own, as Ray packs all of it, and here may be site-packages. No `.rayignore`: it would hold for
    `files` too.
    """
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="headway-job-") as name:
        folder = Path(name)
        if not installed:
            for package in PACKAGES:
                _copy(root / package, folder / package)
            if (root / "pyproject.toml").is_file():
                _copy(root / "pyproject.toml", folder / "pyproject.toml")
        for path in files:
            source = path.expanduser().resolve()
            require(source.exists(), "ship", str(path), "a file or folder that exists")
            require(not (folder / source.name).exists(), "ship", str(path), "of a name that nothing else sent has")
            _copy(source, folder / source.name)
        yield folder if any(folder.iterdir()) else None


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


def open_jobs(address: str | None) -> JobSubmissionClient:
    """A client of the dashboard that answers at the URL, with a token where the cluster asks for one. Or ValueError."""
    url = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "").rstrip("/")
    allowed = "the URL of a cluster's dashboard, such as http://HOST:8265"
    require(urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname is not None, "address", url, allowed)
    headers = authorization(url)
    with plain_errors(url), _named_address(url):
        return JobSubmissionClient(url, headers=headers)


@contextlib.contextmanager
def _named_address(url: str) -> Iterator[None]:
    """Ray's client prefers these variables to its own argument."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def authorization(url: str) -> dict[str, str]:
    """Headers that the dashboard at the URL lets in, whatever RAY_AUTH_MODE says here. ValueError if it lets none in.

    Without that variable Ray's client sends no token, even to a cluster that wants one. The token goes out only to a
    cluster that asks, or where the variable says so.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    token = find_token() if mode == "token" else None
    status = _answer(url, _bearer(token))
    if status == 401 and mode not in ("token", "disabled") and (token := find_token()):
        status = _answer(url, _bearer(token))
    if status in (401, 403):
        raise ValueError(_refused(url, status))
    require(status == 200, "address", url, f"a Ray dashboard (/api/version answers with status {status})")
    return _bearer(token)


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def find_token() -> str | None:
    """The cluster's token, where Ray looks for it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").read_text().strip()
    except OSError:
        return None


def _answer(url: str, headers: Mapping[str, str]) -> int:
    """The status with which a dashboard tells its version."""
    try:
        request = urllib.request.Request(f"{url}/api/version", headers=dict(headers))
        with urllib.request.urlopen(request, timeout=ANSWER_WAIT) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        raise ValueError(f"address: no Ray dashboard answers at {url!r} ({getattr(error, 'reason', error)})") from error


def _refused(url: str, status: int) -> str:
    what = "asks for a token" if status == 401 else "does not take this token"
    return f"address: the cluster at {url!r} {what}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's own"


@contextlib.contextmanager
def plain_errors(url: str) -> Iterator[None]:
    """What Ray's client raises, as ValueError in one line."""
    try:
        yield
    except AuthenticationError as error:
        raise ValueError(_refused(url, 403 if "failed" in error.message else 401)) from error
    except (RuntimeError, OSError) as error:
        if "status code 404" in str(error):
            raise ValueError(f"job: it is unknown at {url!r}; `headway jobs --address {url}` lists all") from error
        text = [line for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"address: the cluster at {url!r} refused ({text[-1] if text else error!r})") from error


def jobs_command(arguments: Sequence[str], console: Console) -> int:
    """`headway jobs`."""
    names, rest = leading(arguments)
    options = parse(ClusterOptions, rest, ClusterOptions(), "headway jobs", JOBS_HELP)
    client = open_jobs(options.address)
    for job in names:
        with plain_errors(client.get_address()):
            submitted = client.get_job_info(job).type == JobType.SUBMISSION
        require(submitted, "job", job, "one that was submitted")
        return follow(client, job, console)
    table = Table("job", "sweep", "status", "begun", "took", "exit code")
    with plain_errors(client.get_address()):
        found = [info for info in client.list_jobs() if info.type == JobType.SUBMISSION]
    for info in sorted(found, key=lambda info: info.start_time or 0):
        begun = (info.start_time or 0) / 1000
        took = (info.end_time or 1000 * time.time()) / 1000 - begun
        code = str(exit_code(info)) if info.status.is_terminal() else "-"
        sweep = (info.metadata or {}).get("sweep", "-")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(begun))
        table.add_row(info.submission_id, escape(sweep), str(info.status).lower(), when, duration(took), code)
    console.print(table)
    return 0


def stop_command(arguments: Sequence[str], console: Console) -> int:
    """`headway stop`: 0 once the job has ended, 1 if it has not within the grace period."""
    (job,), options = named(arguments, ClusterOptions(), "headway stop", STOP_HELP, ("JOB",), "a job")
    client, begun = open_jobs(options.address), time.monotonic()
    with plain_errors(client.get_address()):
        if not client.stop_job(job):
            console.print(f"job {job} had ended already: {str(client.get_job_info(job).status).lower()}")
            return 0
        while not client.get_job_info(job).status.is_terminal():
            if time.monotonic() - begun > GRACE + LOST_AFTER:
                console.print(f"[red]job {job} has not ended[/red] after {duration(time.monotonic() - begun)}")
                return 1
            time.sleep(0.2)
        told = TOLD in map(str.strip, client.get_job_logs(job).splitlines())
    console.print(f"job {job}: {str(client.get_job_info(job).status).lower()} in {time.monotonic() - begun:.1f} s")
    if told:
        console.print("members at work are KILLED in the ledger; the same command again goes on from their checkpoints")
    else:
        console.print("it had not opened the ledger, or could not tell it; the same command again puts that right")
    return 0


def follow(client: JobSubmissionClient, job: str, console: Console) -> int:
    """Print a job's log until it ends; its exit code. Ctrl-C, or a connection lost for long, leaves the job alone."""
    log = _Log(client, job)
    try:
        while True:
            try:
                asyncio.run(log.tail())
                info = client.get_job_info(job)
                log.seen_at = time.monotonic()
                if info.status.is_terminal():
                    break
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                if time.monotonic() - log.seen_at > LOST_AFTER:
                    console.print(f"[red]lost sight of job {job}[/red] ({escape(str(error))}); it may go on")
                    tell_more(job, client, console)
                    return 1
            time.sleep(1.0)
    except KeyboardInterrupt:
        console.print(f"\njob {job} goes on")
        tell_more(job, client, console)
        return STOPPED
    code = exit_code(info)
    console.print(f"job {job}: {str(info.status).lower()}, exit code {code}")
    if info.status == JobStatus.FAILED and info.driver_exit_code is None:
        console.print(f"[red]it never ran[/red]: {escape((info.message or 'no reason given').strip())}")
    return code


class _Log:
    """A job's log as far as it was printed; every new connection sends it again from the start."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self.client, self.job, self.printed, self.seen_at = client, job, 0, time.monotonic()

    async def tail(self) -> None:
        sent = 0
        async for text in self.client.tail_job_logs(self.job):
            print(text[max(0, self.printed - sent) :], end="", flush=True)
            sent += len(text)
            self.printed, self.seen_at = max(self.printed, sent), time.monotonic()


def exit_code(info: JobDetails) -> int:
    """Of a job that has ended: its driver's own, 128 + the number of the signal that killed it, 130 if it was stopped,
    1 if it never ran."""
    if info.status == JobStatus.STOPPED:
        return STOPPED
    code = info.driver_exit_code
    if code is None:
        return 0 if info.status == JobStatus.SUCCEEDED else 1
    return int(code) if code >= 0 else 128 - int(code)


def tell_more(job: str, client: JobSubmissionClient, console: Console) -> None:
    """How to follow and how to stop a job."""
    console.print(f"follow:  headway jobs {job} --address {client.get_address()}", soft_wrap=True)
    console.print(f"stop:    headway stop {job} --address {client.get_address()}", soft_wrap=True)
