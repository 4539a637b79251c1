"""Word sentences that hold numbers, and read text that users write."""

from __future__ import annotations

import codecs

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CSV_SEPARATORS = ",;\t"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the singular for one; `plural` is the noun with s.

    >>> counted(1, "volume"), counted(0, "volume"), counted(2, "copy", "copies")
    ('1 volume', '0 volumes', '2 copies')
    """
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def decode_text(content: bytes) -> str:
    """Decode UTF-8 with or without a byte-order mark, or UTF-16 as shells of Windows write it.

    Raises:
        UnicodeDecodeError: it is in another encoding.

    >>> decode_text("a".encode("utf-8-sig")), decode_text("a".encode("utf-16"))
    ('a', 'a')
    """
    return content.decode("utf-16" if content.startswith(UTF16_MARKS) else "utf-8-sig")


def csv_separator(header: str) -> str:
    """Return what separates the columns of a CSV file, by its first line.

    Spreadsheets write semicolons where a comma is the decimal point, and tabs as "Unicode text".

    >>> csv_separator("id;group"), csv_separator("id"), csv_separator('id\\t"a,b;c"\\tgroup')
    (';', ',', '\\t')
    """
    unquoted = "".join(header.split('"')[::2])
    return max(CSV_SEPARATORS, key=unquoted.count)
