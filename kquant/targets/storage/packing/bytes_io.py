"""Numbers as bytes: seven bits in each, the highest bit says that more follow."""

from __future__ import annotations

from kquant.errors import PackError

_LONGEST = 9


class Writer:
    """Collects bytes."""

    def __init__(self) -> None:
        self._content = bytearray()

    def byte(self, value: int) -> None:
        """A number from 0 to 255."""
        self._content.append(value)

    def number(self, value: int) -> None:
        """A number of at least 0."""
        while value > 127:
            self._content.append(value & 127 | 128)
            value >>= 7
        self._content.append(value)

    def signed(self, value: int) -> None:
        """Any number."""
        self.number(2 * value if value >= 0 else -2 * value - 1)

    def content(self) -> bytes:
        """What was written."""
        return bytes(self._content)


class Reader:
    """Reads what a Writer wrote.

    Each method raises PackError where the bytes end.
    """

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def byte(self) -> int:
        """See `Writer.byte`."""
        if self._at >= len(self._content):
            raise PackError("the packed file is damaged: it ends too early")
        self._at += 1
        return self._content[self._at - 1]

    def number(self) -> int:
        """See `Writer.number`."""
        value = 0
        for k in range(_LONGEST):
            byte = self.byte()
            value |= (byte & 127) << (7 * k)
            if byte < 128:
                return value
        raise PackError("the packed file is damaged: it has a number that is too long")

    def signed(self) -> int:
        """See `Writer.signed`."""
        value = self.number()
        return -(value + 1 >> 1) if value & 1 else value >> 1

    def at_most(self, limit: int) -> int:
        """A number that must not be larger.

        Raises:
            PackError: it is.
        """
        value = self.number()
        if value > limit:
            raise PackError(f"the packed file is damaged: it counts {value} of at most {limit}")
        return value

    def rest(self) -> bytes:
        """What was not read yet."""
        return self._content[self._at :]
