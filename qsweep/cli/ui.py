"""`qsweep ui`: MLflow's pages of a sweep, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from qsweep.cli.sweep import Sweep


def ui(
    sweep: Sweep, port: Annotated[int, typer.Option(min=0, max=65535, help="On loopback; 0 takes a free one.")] = 5000
) -> None:
    """Serve MLflow's UI and print the addresses of the sweep's Pareto page and of its report; Ctrl-C ends it. Where the
    sweep tracks to a server, they are that server's."""
    import signal
    from contextlib import suppress

    from qsweep.cli.console import say
    from qsweep.cli.sweep import find
    from qsweep.track import pareto_url, report_url, tracking_uri
    from qsweep.track import ui as serve

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # the server ends with it
    spec, folder = find(sweep)
    uri = tracking_uri(spec.track.uri, folder.root)
    with serve(uri, port) as address:
        say(pareto_url(folder.path, address) or address)
        if (report := report_url(folder.path, address)) is not None:
            say(f"report: {report}")
        if address != uri:
            say("Ctrl-C ends it.")
            with suppress(KeyboardInterrupt):
                signal.pause()
