"""Whether a compiled kernel's tensor-core products (wgmma, Hopper) read the shared memory that they should.

ptxas 12.8, which Triton 3.6 brings along, can lose the register of a tile's address where two tiles of different
swizzle share it, one after the other: it adds the descriptor's constant to whatever is there, and the product reads
garbage. That can be seen in the machine code. The upper half of a descriptor holds nothing but the swizzle's mode and
a stride, constants; so the walk below follows constants through registers, in the order of the code, to each product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STRIDES = (0x8, 0x10, 0x20, 0x40)  # of eight rows of 16, 32, 64, 128 bytes, in units of 16
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;")


@dataclass(frozen=True)
class Value:
    """A number, known but for the exclusive or with some that are not: ptxas swaps registers by three exclusive ors."""

    unknown: frozenset[object]
    rest: int = 0

    @staticmethod
    def new() -> Value:
        return Value(frozenset([object()]))

    def __xor__(self, other: Value) -> Value:
        return Value(self.unknown ^ other.unknown, self.rest ^ other.rest)

    @property
    def number(self) -> int | None:
        return None if self.unknown else self.rest


Known = dict[str, Value]  # by register, or place on the stack


def lost_descriptors(code: str) -> list[str]:
    """What nvdisasm prints of a kernel -> addresses of products with a descriptor that is not known to be one."""
    known: Known = {}
    lost = []
    for address, name, arguments in INSTRUCTION.findall(code):
        operands = [x.strip().replace(".reuse", "") for x in arguments.split(",")]
        if name.startswith("HGMMA"):
            first = int(re.search(r"gdesc\[UR(\d+)\]", arguments)[1])
            from_registers = bool(re.match(r"R\d+, R\d+", arguments))  # A; then only B has a descriptor
            uppers = [_value(known, f"UR{first + i}").number for i in ((3,) if from_registers else (1, 3))]
            if not all(x is not None and x & 0x3FFF in STRIDES and not x & 0x3FFFC000 for x in uppers):
                lost.append(address)
        else:
            _follow(known, name, operands)
    return lost


def _value(known: Known, operand: str) -> Value:
    if operand in ("RZ", "URZ"):
        return Value(frozenset())
    if re.fullmatch(r"-?0x[0-9a-f]+", operand):
        return Value(frozenset(), int(operand, 16) & 0xFFFFFFFF)
    return known.setdefault(operand, Value.new())


def _sum(values: list[int | None]) -> Value:
    return Value.new() if None in values else Value(frozenset(), sum(values) & 0xFFFFFFFF)


def _registers(operand: str, count: int) -> list[str]:
    kind, number = re.fullmatch(r"(U?R)(\d+)", operand).groups()
    return [f"{kind}{int(number) + i}" for i in range(count)]


def _follow(known: Known, name: str, operands: list[str]) -> None:
    """One instruction's effect on what is known. Lower halves' carries are none: addresses have 14 bits."""
    to, sources = operands[0], operands[1:]
    width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    if name.startswith(("STL", "LDL")):
        place = re.search(r"\[R1(?:\+(0x[0-9a-f]+))?\]", ",".join(operands))
        value = sources[0] if name.startswith("STL") else to
        if place and re.fullmatch(r"R\d+", value):
            for i, register in enumerate(_registers(value, width)):
                slot = f"stack {int(place[1] or '0', 16) + 4 * i}"
                if name.startswith("STL"):
                    known[slot] = _value(known, register)
                else:
                    known[register] = _value(known, slot)
        return
    if not re.fullmatch(r"U?R\d+", to):
        return
    found = [Value.new() for _ in range(width)]
    plain = [x for x in sources if not re.fullmatch(r"!?U?P\w+", x)]
    if name in ("UMOV", "MOV", "R2UR"):
        found = [_value(known, plain[0])]
    elif name in ("IMAD.MOV.U32", "IMAD.U32") and plain[:2] == ["RZ", "RZ"]:
        found = [_value(known, plain[2])]
    elif name in ("LOP3.LUT", "ULOP3.LUT") and plain[2:4] in (["RZ", "0x3c"], ["URZ", "0x3c"]):  # a ^ b
        found = [_value(known, plain[0]) ^ _value(known, plain[1])]
    elif name.startswith("CS2R") and plain == ["SRZ"]:
        width = 1 if ".32" in name else 2
        found = [Value(frozenset())] * width
    elif name in ("UIADD3.X", "IADD3.X"):
        found = [_sum([_value(known, x).number for x in plain[:3]])]
    elif name == "UIADD3.64":
        found = [Value.new(), _sum([_upper(known, x) for x in plain[:3]])]
    known.update(zip(_registers(to, width), found, strict=True))


def _upper(known: Known, operand: str) -> int | None:
    """The upper half of a pair of registers, of the negative of a known pair, or of a number."""
    pair = re.fullmatch(r"(-?)UR(\d+)", operand)
    if not pair:
        return 0 if operand == "URZ" or not operand.startswith("-") else 0xFFFFFFFF
    lower, upper = (_value(known, f"UR{int(pair[2]) + i}").number for i in range(2))
    if not pair[1]:
        return upper
    return None if lower is None or upper is None else -((upper << 32) | lower) >> 32 & 0xFFFFFFFF
