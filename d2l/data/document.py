"""Decoding of a document's bytes, as `internalize` and `ask` read them."""

from d2l.errors import DataError


def decode_document(data: bytes, source: str) -> str:
    """Decode a document's bytes as UTF-8 text.

    Args:
        source: name of the file or stream, for error messages.

    Raises:
        DataError: the bytes are not text, or only white space.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = len(data) - len(error.object) + error.start  # the codec counts from behind a byte order mark
        found = f"byte 0x{data[start]:02x} at {start:,}"
        raise DataError(f"{source}: expected text in UTF-8, found {found}; convert it to a .txt or .md file") from None
    if "\0" in text:
        raise DataError(
            f"{source}: expected text in UTF-8, found a zero byte at {data.index(0):,}; is it a binary file?"
        )
    if not text.strip():
        raise DataError(f"{source}: the document is empty")
    return text
