"""`tuner run --dashboard`: the dashboard in a process of its own beside the search."""

import subprocess

import typer

from tuner.commands.console import Console
from tuner.commands.session import Folders, study_name
from tuner.config.space import Space
from tuner.dashboard import background
from tuner.dashboard import server as serving
from tuner.dashboard.guard import new_token


def start_dashboard(
    space: Space, folders: Folders, port: int, console: Console
) -> subprocess.Popen[bytes]:
    """Starts the dashboard as its own process, so that its failure does not end the search."""

    free_port = serving.choose_port(port)
    if port not in (0, free_port):
        console.warn(f"port {port} on 127.0.0.1 is taken; the dashboard is on {free_port}")
    token = new_token()
    page = serving.address(free_port, "", token)
    console.emit_event("dashboard", url=page)
    if console.mode == "quiet":  # nobody can guess the address
        typer.echo(page)
    console.print_line(f"browse {page} while the search runs")
    url = space.settings.storage or ""
    return background.start_process(study_name(space), folders.studies, free_port, url, token)
