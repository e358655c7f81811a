"""What a shared library defines, wants and mentions: just enough of ELF64 to see which symbols only CANN can supply.

Binutils may be absent where a compiler is present, and libtorch_cpu alone has too many symbols for a library that makes
an object of each. Layouts are those of the System V ABI, chapters 4 and 5.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from ....artifacts.errors import TargetError

_IDENT_ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_DYNAMIC_ENTRY = struct.Struct("<QQ")
_SHT_PROGBITS, _SHT_DYNAMIC, _SHT_DYNSYM = 1, 6, 11
_DT_NEEDED = 1
_STB_WEAK = 2
_SHF_WRITE, _SHF_EXECUTABLE = 1, 4


@dataclass(frozen=True)
class SharedLibrary:
    """`needed` libraries by SONAME, symbols `defined` for others, symbols `wanted` of any other (not weakly)."""

    needed: tuple[str, ...]
    defined: frozenset[str]
    wanted: frozenset[str]
    mentioned: frozenset[str]


@dataclass(frozen=True)
class _Section:
    kind: int
    flags: int
    start: int
    size: int
    link: int


def read_library(path: Path, mention: re.Pattern[bytes] | None = None) -> SharedLibrary:
    """Read a library's dynamic symbols. `mention` collects the C strings in its read-only data that match in full.

    Raises TargetError when it is not a whole little-endian ELF64 file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data, mention)
    except (ValueError, IndexError, StopIteration, struct.error) as error:
        raise TargetError(f"{path}: not a readable ELF64 shared library ({error}); reinstall its package") from error


def _read(data: mmap.mmap, mention: re.Pattern[bytes] | None) -> SharedLibrary:
    if data[:6] != _IDENT_ELF64_LITTLE_ENDIAN:
        raise ValueError("expected 64-bit little-endian")
    sections = _sections(data)
    symbols = next(s for s in sections if s.kind == _SHT_DYNSYM)
    names = _strings(data, sections[symbols.link])
    defined, wanted = set(), set()
    table = data[symbols.start : symbols.start + symbols.size]
    for name, info, _, section, _, _ in _SYMBOL.iter_unpack(table):
        text = names[name : names.index(b"\0", name)].decode()
        if section:
            defined.add(text)
        elif text and info >> 4 != _STB_WEAK:
            wanted.add(text)
    return SharedLibrary(
        needed=_needed(data, sections, names),
        defined=frozenset(defined),
        wanted=frozenset(wanted),
        mentioned=frozenset(_mentioned(data, sections, mention) if mention else ()),
    )


def _sections(data: mmap.mmap) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    if size != _SECTION.size:
        raise ValueError(f"section headers of {size} bytes")
    sections = []
    for i in range(count):
        _, kind, flags, _, start, length, link, _, _, _ = _SECTION.unpack_from(data, table + i * size)
        sections.append(_Section(kind, flags, start, length, link))
    return sections


def _strings(data: mmap.mmap, section: _Section) -> bytes:
    return data[section.start : section.start + section.size]


def _needed(data: mmap.mmap, sections: list[_Section], names: bytes) -> tuple[str, ...]:
    libraries = []
    for section in sections:
        if section.kind == _SHT_DYNAMIC:
            table = data[section.start : section.start + section.size]
            for tag, value in _DYNAMIC_ENTRY.iter_unpack(table):
                if tag == _DT_NEEDED:
                    libraries.append(names[value : names.index(b"\0", value)].decode())
    return tuple(libraries)


def _mentioned(data: mmap.mmap, sections: list[_Section], mention: re.Pattern[bytes]) -> set[str]:
    whole_string = re.compile(rb"(?<=\0)(?:" + mention.pattern + rb")(?=\0)")
    mentions: set[str] = set()
    for section in sections:
        if section.kind == _SHT_PROGBITS and not section.flags & (_SHF_WRITE | _SHF_EXECUTABLE):
            mentions.update(text.decode() for text in whole_string.findall(_strings(data, section)))
    return mentions
