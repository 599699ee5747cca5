"""Whole numbers in as few bytes as they need."""


def varint(number: int) -> bytes:
    """A number from 0 on in groups of 7 bits, lowest first; the top bit of a byte says that more follow (LEB128)."""
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def read_varint(data: bytes, start: int = 0) -> tuple[int, int]:
    """(the number, the place after it).  Raises ValueError where the data end before, and for more than 35 bits."""
    number = 0
    for index in range(start, min(start + 5, len(data))):
        number |= (data[index] & 127) << 7 * (index - start)
        if data[index] < 128:
            return number, index + 1
    raise ValueError("the data end within a number" if start + 5 > len(data) else "a number of more than 35 bits")
