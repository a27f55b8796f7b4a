"""Paths into params: `task.encoder.layers.3.dropout`, and `rules["a.b"]` for a key that is not a plain word."""

from __future__ import annotations

import json
import re

from megaseq.base.errors import must

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_\-]+|\*")
_QUOTED_KEY = re.compile(r'\["(?:[^"\\]|\\.)*"\]')


def join(path: str, key: str) -> str:
    """Appends `key` to `path`; a key that is not a plain word is written `["key"]`."""
    if _PLAIN_KEY.fullmatch(key) and key != "*":
        return f"{path}.{key}" if path else key
    return f"{path}[{quoted(key)}]"


def concat(path: str, rest: str) -> str:
    """Appends the path `rest` to `path`."""
    if not path or not rest:
        return path or rest
    return path + rest if rest.startswith("[") else f"{path}.{rest}"


def split(path: str) -> list[str]:
    """Splits `a.b["c.d"].e` into its keys.

    Raises:
        ParamsError: The path has an empty or malformed part.
    """
    keys, end = scan(path)
    if end != len(path) or not keys:
        raise must(path or '""', 'be names joined by dots, or ["..."] for other keys', path, "Mend the path")
    return keys


def scan(text: str) -> tuple[list[str], int]:
    """Reads the longest path at the start of `text`; returns its keys and where it ends."""
    keys: list[str] = []
    at = 0
    while at < len(text):
        if bracket := _QUOTED_KEY.match(text, at):
            keys.append(str(json.loads(bracket.group()[1:-1])))
            at = bracket.end()
            continue
        start = at
        if keys:
            if text[at] != ".":
                break
            start = at + 1
        plain = _PLAIN_KEY.match(text, start)
        if plain is None:
            break
        keys.append(plain.group())
        at = plain.end()
    return keys, at


# What YAML 1.2 does not call printable, and what some readers take for the end of a line.
_ESCAPED = re.compile("[\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def quoted(text: str) -> str:
    """Writes `text` as a JSON string that is also a YAML 1.2 double-quoted scalar on one line."""
    plain = json.dumps(text, ensure_ascii=False)
    return _ESCAPED.sub(lambda match: f"\\u{ord(match.group()):04x}", plain)
