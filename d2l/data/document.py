"""A document as text: what `internalize` and `ask` read."""

from d2l.errors import DataError


def decode_document(data: bytes, source: str) -> str:
    """A document's bytes as text.

    Args:
        source: where they come from, for the message.

    Raises:
        DataError: they are not text, or nothing but white space.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at {error.start:,}"
        raise DataError(f"{source}: expected text in UTF-8, found {found}; convert it to a .txt or .md file") from None
    if "\0" in text:
        raise DataError(
            f"{source}: expected text in UTF-8, found a zero byte at {data.index(0):,}; is it a binary file?"
        )
    if not text.strip():
        raise DataError(f"{source}: the document is empty")
    return text
