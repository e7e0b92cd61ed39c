"""Damage bytes at random, the same for the same seed: no coverage, no state, a few microseconds an input."""

from __future__ import annotations

from random import Random

# What a format gives a meaning to: hostile where a mutation puts it.
TOKENS = (
    *(b"r\xff\xff\xff\x7f", b"B\xff\xff\xff\xff", b"\x96\0\0\0\0\1\0\0\0", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f"),
    *(b"p99999999999\n", b"L" + b"9" * 40 + b"L\n", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nbytearray\n", b"cbuiltins\nrange\n", b"ctorch\nTensor\n"),
    *(
        b"(J\0\0\0\x40tR",
        b"\x8a\x05\0\0\0\0\x40\x85R",
        b"2\x86" * 40,
        b"\x85" * 90,
        b"h\0h\0\x86\x94",
        b"\x8f",
        b"\x91",
    ),
    *(
        b"(",
        b")",
        b"R",
        b"b",
        b"\x81",
        b"u",
        b"e",
        b"s",
        b"a",
        b"t",
        b"}",
        b"]",
        b"0",
        b"1",
        b".",
        b"Q",
        b"\x94",
        b"N.",
    ),
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"\xff\xff\xff\xff", b"\0" * 8),
    *(b"[", b"{", b'"', b"-1", b"1e999", b"null", b"F64", b"BOOL", b"I64", b"U8", b"9223372036854775807", b"\\ud800"),
)


def mutated(chance: Random, seeds: list[bytes]) -> bytes:
    """One of the seeds, changed in a few places."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(9):
            case 0 | 1 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case 2 if place < len(data):
                data[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 3:
                data[place:place] = chance.choice(TOKENS)
            case 4:
                token = chance.choice(TOKENS)
                data[place : place + len(token)] = token
            case 5:
                del data[place : place + chance.choice((1, 2, 4, 17, 200))]
            case 6:
                start = chance.randrange(len(data) + 1)
                data[place:place] = data[start : start + chance.choice((1, 4, 30, 300))]
            case 7 if place + 4 <= len(data):
                data[place : place + 4] = chance.choice((0, 1, 1 << 16, 0x7FFFFFFF, 0xFFFFFFFF)).to_bytes(4, "little")
            case 8 if chance.random() < 0.2:
                del data[place:]
            case _:
                data[place:place] = chance.randbytes(chance.randrange(1, 5))
    return bytes(data)
