"""Documents that a command line names: text files, or stdin."""

from pathlib import Path

import typer

from d2l.errors import DataError

STDIN = "-"


def read_document(name: str, advice: str = "pass a text file, or - for stdin") -> str:
    """Read the text of a document.

    Args:
        name: a file, or `-` for stdin.
        advice: what to change where there is no such file.

    Raises:
        DataError: the file cannot be read, or is not text.
    """
    from d2l.data.document import decode_document

    if name == STDIN:
        return decode_document(typer.get_binary_stream("stdin").read(), "stdin")
    try:
        return decode_document(Path(name).read_bytes(), name)
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror}; {advice}") from None
