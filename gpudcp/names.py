"""The keys of a state dict, held and sent once."""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from threading import Lock
from typing import Any

from gpudcp.arrays import Path


class Names:
    """The keys of a flat state dict, in order, and the path of each in the nested dict that it comes from.

    Pickled once compressed; unpickled once for each digest, as all ranks of a job mostly have the same keys.
    """

    __slots__ = ("_digest", "_packed", "fqns", "paths")

    def __init__(self, fqns: Sequence[str], paths: Mapping[str, Path] | None) -> None:
        self.fqns = tuple(fqns)
        self.paths = paths
        """None where the state dict was not flattened."""
        self._packed: bytes | None = None
        self._digest: bytes | None = None

    @property
    def packed(self) -> bytes:
        """Both, as compressed JSON."""
        if self._packed is None:
            nested = None
            if self.paths is not None:
                own = set(self.fqns)
                nested = {fqn: path for fqn, path in self.paths.items() if path != (fqn,) or fqn not in own}
            self._packed = zlib.compress(_encoded([self.fqns, nested]), 1)
        return self._packed

    @property
    def digest(self) -> bytes:
        """16 bytes that no other keys have."""
        if self._digest is None:
            self._digest = blake2b(self.packed, digest_size=16).digest()
        return self._digest

    def __len__(self) -> int:
        return len(self.fqns)

    def __reduce__(self) -> tuple[Any, ...]:
        return _known_names, (self.digest, self.packed)

    @classmethod
    def unpacked(cls, packed: bytes, *, most_nbytes: int | None = None) -> Names:
        """What `packed` gave.

        Raises:
            ValueError: it is longer than ``most_nbytes``, or no JSON.
            zlib.error: it is not compressed.
        """
        # 0 is no limit.
        stream = zlib.decompressobj()
        data = stream.decompress(packed, most_nbytes or 0)
        if not stream.eof:
            raise ValueError(f"names of more than {most_nbytes} bytes in {len(packed)}, or cut ones")
        fqns, nested = json.loads(data.decode("utf-8", "surrogatepass"))
        paths = None
        if nested is not None:
            paths = {fqn: (fqn,) for fqn in fqns} | {fqn: tuple(path) for fqn, path in nested.items()}
        names = cls(fqns, paths)
        names._packed = packed
        return names


def _encoded(value: Any) -> bytes:
    # Not escaped, and so nothing but what it is: two escaped halves of a character would be read as the character.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


_MOST_KNOWN = 64
_known: OrderedDict[bytes, Names] = OrderedDict()
_known_lock = Lock()


def _known_names(digest: bytes, packed: bytes) -> Names:
    with _known_lock:
        names = _known.get(digest)
        if names is None:
            names = _known[digest] = Names.unpacked(packed)
            names._digest = digest
            if len(_known) > _MOST_KNOWN:
                _known.popitem(last=False)
        return names
