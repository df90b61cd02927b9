"""`fewstep serve`: keys are made and models are served."""

from __future__ import annotations

import asyncio
import logging
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.command import UsageError
from fewstep.cli.running import runtime_of
from fewstep.core.env import cpu_count
from fewstep.models.bundle import read_card

try:
    from fewstep.serve.app import Server
    from fewstep.serve.keys import Door, Keys
    from fewstep.serve.running import require_private, run
    from fewstep.serve.worker import Served
except ModuleNotFoundError as error:
    if str(error.name).startswith("fewstep"):
        raise
    raise UsageError(
        f'fewstep serve needs the package {error.name}; install what it needs: pip install "fewstep[serve]"'
    ) from None

if TYPE_CHECKING:
    from fewstep.cli.serving import Serve


def serve(options: Serve) -> int:
    if options.new_key is not None:
        return _new_key(options)
    named = names_of(options.models)
    _check(options)
    cards = {name: read_card(source) for name, source in named}
    if options.batch > 1 and all(card.contract.stream is None for card in cards.values()):
        raise UsageError(f"--batch joins calls of streams, and {', '.join(cards)} makes whole clips; leave --batch out")
    runtimes = {name: runtime_of(options, source, card=cards[name]) for name, source in named}
    first, *others = runtimes.values()
    if any(other != first for other in others):
        raise UsageError(
            f"{', '.join(runtimes)} would be run in different ways by themselves; say how: --dtype, --offload, "
            "--guidance-calls; or serve them apart"
        )
    threads = max(1, cpu_count() - 1) if options.threads is None else options.threads
    served = Served(models=named, runtime=first, threads=threads, trust=options.trust, batch=options.batch)
    door = Door() if options.keys is None else Door(Keys.read(options.keys))
    server = Server(served, door=door, origins=options.origin, folder=options.folder, table=options.jobs)
    require_private(options.host, server)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")

    def ready(address: str) -> None:
        print(f"fewstep serves {', '.join(runtimes)} at {address}", flush=True)
        if options.open:
            webbrowser.open(address)

    asyncio.run(run(server, options.host, options.port, options.watch_port, ready))
    return 0


def names_of(models: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Names by which clients ask, and where the models are. UsageError for a name that two of them have."""
    if not models:
        raise UsageError("name a model, such as world/stream, or a run's student/")
    found = dict[str, str]()
    for model in models:
        name, given, source = model.partition("=")
        if not given:
            name, source = _name_of(model), model
        if not name or not source:
            raise UsageError(f"{model}: give a folder, or NAME=FOLDER")
        if name in found:
            raise UsageError(
                f"{found[name]} and {source} are both called {name!r}; give one another name: NAME={source}"
            )
        found[name] = source
    return tuple(found.items())


def _name_of(source: str) -> str:
    """The name of a folder; of a run's result that of the run; built-ins and names on the hub are names already."""
    path = Path(source)
    if not path.is_dir():
        return source
    path = path.resolve()
    return path.parent.name if path.name in ("student", "teacher") and path.parent.name else path.name


def _new_key(options: Serve) -> int:
    if options.keys is None or options.new_key is None:
        raise UsageError("--new-key: say which file it is added to, too: --keys FILE")
    print(Keys.add(options.keys, options.new_key))
    return 0


def _check(options: Serve) -> None:
    for name, port in (("port", options.port), ("watch-port", options.watch_port)):
        if port is not None and not 0 <= port <= 65535:
            raise UsageError(f"--{name} must be from 0 to 65535, got {port}")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {options.threads}")
    if options.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {options.batch}")
    for origin in options.origin:
        scheme, found, host = origin.partition("://")
        if not (found and scheme in ("http", "https") and host and "/" not in host):
            raise UsageError(
                f"--origin {origin}: an origin is http:// or https:// and a host, such as https://example.com"
            )
