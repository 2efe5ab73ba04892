"""The URL of a study's database.

Its ${NAME}s are replaced only to connect. It is shown and stored without its password.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote

VARIABLE_PATTERN = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
URL_PATTERN = re.compile(
    r"(?P<begin>[^:]+://)(?:(?P<user>[^:/?@]*)(?::(?P<password>[^@]*))?@)?(?P<rest>.*)", re.DOTALL
)
PASSWORD_PARAMETERS = ("password", "sslpassword")  # what a query may hold


def find_url_problems(url: str) -> list[str]:
    """What is wrong with a written URL, as far as this shows without a connection.

    The problems never contain the password.
    """
    unset = [name for name in VARIABLE_PATTERN.findall(url) if not os.environ.get(name)]
    problems = [
        f"${{{name}}} is not set; export {name}=… before the command"
        for name in dict.fromkeys(unset)
    ]
    if url.startswith("postgres://"):
        problems.append("the scheme is called postgresql://, not postgres://")
    if url.startswith("sqlite:") and not sqlite_path(url):
        problems.append(
            "a database in memory ends with its process; leave storage out, or name a file as "
            "sqlite:///study.db"
        )
    match = URL_PATTERN.fullmatch(url)
    if match and "@" in re.split(r"[/?]", match["rest"], maxsplit=1)[0]:
        problems.append(
            "an @ in a user's name or password is written %40; better, write ${NAME} and set that "
            "variable"
        )
    return problems


def expand_variables(url: str) -> str:
    """The URL with the values of the environment's variables.

    A value in the place of a user or a password is quoted, as a URL requires; others are not.
    """
    match = URL_PATTERN.fullmatch(url)
    if match is None or match["user"] is None:
        return substitute_variables(url, os.environ)
    quoted = {name: quote(value, safe="") for name, value in os.environ.items()}
    credentials = substitute_variables(match["user"], quoted)
    if match["password"] is not None:
        credentials += ":" + substitute_variables(match["password"], quoted)
    return f"{match['begin']}{credentials}@{substitute_variables(match['rest'], os.environ)}"


def substitute_variables(text: str, values: Mapping[str, str]) -> str:
    return VARIABLE_PATTERN.sub(lambda match: values.get(match[1], ""), text)


def without_password(url: str) -> str:
    """The URL as it may be shown and written.

    Variables stay as their names; a password that is written out is left out.
    """
    match = URL_PATTERN.fullmatch(url)
    if match is None:
        return url
    server, _, query = match["rest"].partition("?")
    parameters = [
        parameter
        for parameter in query.split("&")
        if parameter and not _is_literal(_password_of(parameter))
    ]
    credentials = ""
    if match["user"] is not None:
        shows_password = bool(match["password"]) and not _is_literal(match["password"])
        password = f":{match['password']}" if shows_password else ""
        credentials = f"{match['user']}{password}@"
    shown_query = "?" + "&".join(parameters) if parameters else ""
    return f"{match['begin']}{credentials}{server}{shown_query}"


def _password_of(parameter: str) -> str:
    """The value of a query's `name=value` where the name is a password's; else ''."""
    name, _, value = parameter.partition("=")
    return value if name in PASSWORD_PARAMETERS else ""


def _is_literal(word: str) -> bool:
    return VARIABLE_PATTERN.sub("", word) != ""


def literal_password(url: str) -> str | None:
    """The password that is written in a URL.

    None where the URL leaves it to a variable, PGPASSWORD or ~/.pgpass.
    """
    passwords = find_passwords(url)
    return unquote(passwords[0]) if passwords and without_password(url) != url else None


def find_passwords(url: str) -> list[str]:
    match = URL_PATTERN.fullmatch(url)
    if match is None:
        return []
    query = match["rest"].partition("?")[2].split("&")
    passwords = [match["password"] or "", *map(_password_of, query)]
    return [password for password in passwords if password]


def hide_passwords(text: str, url: str) -> str:
    """`text` without the passwords to which `url` expands."""
    for word in find_passwords(expand_variables(url)):
        for spelling in (word, unquote(word)):
            text = text.replace(spelling, "***")
    return text


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite database; None for any other URL, and for one in memory."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(\?.*)?", url)
    return Path(match[1]) if match and match[1] != ":memory:" else None


def escape_braces(url: str) -> str:
    return url.replace("{", "{{").replace("}", "}}")  # RDBStorage runs str.format on it
