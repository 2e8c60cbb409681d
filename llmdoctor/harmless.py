"""Text and data made harmless for terminals and for programs that read them."""

import json
import math
import re
from typing import Any

from llmdoctor.errors import DataError

_NONCHARACTERS = "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000))
STEERING = re.compile(
    "["
    "\0-\x08\x0b-\x1f"  # C0 controls but tab and newline
    "\x7f-\x9f"  # DEL and C1 controls: a terminal reads U+009B as the start of an escape sequence, like ESC [
    "\u2028\u2029"  # line ends of some programs only
    "\u202a-\u202e\u2066-\u2069"  # bidi embeddings, overrides and isolates: what follows may read as something else
    "\ud800-\udfff\ufdd0-\ufdef" + _NONCHARACTERS + "]"  # what UTF-8 and XML do not have
)
_LONGEST = 500  # characters of a message of others
MARK = "\N{REPLACEMENT CHARACTER}"


def clean(text: str) -> str:
    """The text, equally long, with a visible mark for every character that could steer a terminal."""
    return text if text.isprintable() else STEERING.sub(MARK, text)


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says something, with the next one if it ends in a colon.

    The name of the exception if its message says nothing. Cut to 500 characters: it may quote what a stranger wrote.
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    first, second, *_ = [*(line.strip() for line in str(error).splitlines() if line.strip()), "", ""]
    text = f"{first} {second}" if first.endswith(":") else first or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def require_unicode(text: str, what: str) -> str:
    """The text. Raises DataError if it holds bytes that were not UTF-8, or half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not Unicode: character {error.start + 1} is {text[error.start]!r}. Save or send it as UTF-8"
        ) from None
    return text


def finite(data: Any) -> Any:
    """The data with null for nan and infinity, which JSON does not have."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def json_text(data: Any, *, indent: int | None = None) -> str:
    """JSON with other letters than ASCII as they are, escapes for what could steer a terminal, and null for nan."""
    text = json.dumps(finite(data), indent=indent, ensure_ascii=False, allow_nan=False)
    return STEERING.sub(lambda match: json.dumps(match[0])[1:-1], text)
