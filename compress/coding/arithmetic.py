"""Binary arithmetic coding with given probabilities, in integers: the same bytes on every machine.

The code of a sequence of bits is a number in an interval of [0, 1) whose length is the product of the bits'
probabilities (Witten, Neal and Cleary 1987, "Arithmetic Coding for Data Compression").  It is written in as few bytes
as an interval of this length needs, or in one fewer where that is possible, so nothing is spent on an end mark: the
reader knows how many bits there are.  Of the numbers with as many bytes, usually several, a checksum of the bits
chooses one.  The length and this choice show most damage, at no cost.
"""

import zlib
from collections.abc import Sequence

PRECISION = 16
"""Probabilities are integers, in units of 2^-PRECISION, above 0 and below 2^PRECISION."""
START = 1 << 24
LEAST = 1 << 22
"""Least length of the interval before it is scaled by 2^8.  All intervals then stay below 2^30: CPython computes with
such integers faster than with larger ones."""


def encoded(bits: Sequence[int], probabilities: Sequence[int]) -> bytes:
    """The code of a sequence of bits (0 or 1), given each one's probability of being 1."""
    length, terms = START, [0]  # the interval begins at the sum of terms[k] / (START * 2^8k)
    for bit, probability in zip(bits, probabilities, strict=True):
        of_one = (length >> PRECISION) * probability
        if bit:
            terms[-1] += length - of_one
            length = of_one
        else:
            length -= of_one
        while length < LEAST:
            length <<= 8
            terms.append(0)
    return _number(_sum(terms), length, len(terms) + 2, zlib.crc32(bytes(bits)))


class Decoder:
    """Reads bits one by one from the bytes of `encoded`; any bytes give some bits, which `check_end` may refute.

    length, offset: of the interval, and of the code within it; checksum: of the bits read.
    Raises OSError for no bytes at all.
    """

    def __init__(self, code: bytes):
        if not code:
            raise OSError("the file is empty")
        self.code = code
        self.length = START
        self.offset = int.from_bytes(code[:3].ljust(3, b"\0"), "big")
        self.position = 3
        self.checksum = 0

    def bit(self, probability: int) -> int:
        """The next bit, given its probability of being 1."""
        of_one = (self.length >> PRECISION) * probability
        of_zero = self.length - of_one
        bit = int(self.offset >= of_zero)
        if bit:
            self.offset -= of_zero
        self.length = of_one if bit else of_zero
        self.checksum = zlib.crc32(bytes([bit]), self.checksum)
        while self.length < LEAST:
            self.length <<= 8
            self.offset = self.offset << 8 | self.next_byte()
        return bit

    def next_byte(self) -> int:
        """The byte after those read so far; 0 beyond the end."""
        position, self.position = self.position, self.position + 1
        return self.code[position] if position < len(self.code) else 0

    def check_end(self) -> None:
        """Raises OSError unless the code is exactly what `encoded` gives for the bits that have been read."""
        read = int.from_bytes(self.code[: self.position].ljust(self.position, b"\0"), "big")
        if self.code != _number(read - self.offset, self.length, self.position, self.checksum):
            raise OSError("the code is damaged, or of a map or picture of another size")


def _sum(terms: list[int]) -> int:
    """Sum of terms[k] * 2^8(n-k) for k = 0 ... n."""
    digits, carry = bytearray(len(terms)), 0
    for k in range(len(terms) - 1, -1, -1):
        carry += terms[k]
        digits[k] = carry & 255
        carry >>= 8
    return carry << 8 * len(terms) | int.from_bytes(digits, "big")


def _number(start: int, length: int, size: int, checksum: int) -> bytes:
    """A number in the interval [start, start + length) / 2^8size, in few bytes, but one at least."""
    most = max(1, size - (length.bit_length() - 1) // 8)  # a multiple of 2^-8most lies in any interval of this length
    for count in range(max(1, most - 1), most + 1):
        unit = 8 * (size - count)
        first, last = -(-start >> unit), (start + length - 1) >> unit
        if first <= last:
            return (first + checksum % (last - first + 1)).to_bytes(count, "big")
    raise AssertionError("an interval longer than the unit holds a multiple of it")
