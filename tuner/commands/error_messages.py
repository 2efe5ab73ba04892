"""What the command line says where a command fails, and the exit code that follows."""

import sys
import traceback

from tuner.errors import SpaceError, TunerError


def refuse_windows() -> int:
    link = "https://learn.microsoft.com/windows/wsl/install"
    hint = f"on Windows use WSL2 ({link}) and install it there"
    print(f"tuner: error: tuner runs on Linux and macOS; {hint}", file=sys.stderr)
    return SpaceError.code


def print_error(error: TunerError, debug: bool) -> int:
    if debug:
        print(getattr(error, "traceback", "") or traceback.format_exc(), file=sys.stderr)
    for problem in error.problems:
        print(f"tuner: error: {problem}", file=sys.stderr)
    return error.code


def report_bug(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    problem = f"{type(error).__name__}: {error}; run again with --debug and report what it prints"
    print(f"tuner: error: a bug in tuner: {problem}", file=sys.stderr)
    return 1
