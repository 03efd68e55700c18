"""How names of people are spelled in folders and tables: which are numbers, and which are one name. No torch here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal

from utils import UserError

_DECIMAL = re.compile(r"[+-]?(\d{1,17}(\.\d{0,17})?|\.\d{1,17})(e\+?\d)?", re.ASCII)


def whole_number(name: str) -> int | None:
    """The whole number that a name spells, as in `7`, `0007`, `+7`, `7.0` and `7e0`; None if it is none."""
    text = _plain(name)
    value = Decimal(text) if _DECIMAL.fullmatch(text) else None
    return int(value) if value is not None and value == value.to_integral_value() else None


def require_one_spelling(places: Mapping[str, str]) -> None:
    """Raise UserError if two names differ only in zeros, case or blanks: they are probably one person.

    places  where each name stands, for the message
    """
    spelled: dict[str, str] = {}
    for name, place in places.items():
        earlier = spelled.setdefault(spelling(name), name)
        if earlier != name:
            raise UserError(
                f"{place}: {name!r} is another spelling of {earlier!r}, {places[earlier]}; write one person's name in "
                "one way, or rename one of two people"
            )


def _plain(name: str) -> str:
    """A name in lower case, without blanks and invisible characters, letters with accents in one encoding."""
    text = unicodedata.normalize("NFC", name).casefold()
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")


def spelling(name: str) -> str:
    """The spelling that stands for all those of a name which differ only in zeros, case or blanks."""
    text = _plain(name)
    if _DECIMAL.fullmatch(text):
        return str(Decimal(text).normalize() + 0)
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)
