"""The check of compiled products, on what ptxas 12.8 made of FAVOR+ with heads of 16 and of 64 channels."""

from __future__ import annotations

from kernel_descriptors import lost_descriptors

RIGHT = """
        /*2d80*/                   UMOV UR10, UR6 ;
        /*2d90*/                   UMOV UR11, 0x40000040 ;
        /*2db0*/                   HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR8].tnspB, RZ, !UPT ;
        /*2dc0*/                   UIADD3 UR10, UP0, UR6, 0x80, URZ ;
        /*2dd0*/                   UMOV UR4, URZ ;
        /*2de0*/                   UIADD3.X UR11, UR4, 0x40000040, URZ, UP0, !UPT ;
        /*2e40*/                   HGMMA.64x64x16.F32.BF16 R24, R68, gdesc[UR8].tnspB, R24 ;
"""
WRONG = """
        /*0040*/                   ULDC UR8, c[0x0][0x268] ;
        /*0b80*/                   UMOV UR5, 0xc0000010 ;
        /*1550*/                   UMOV UR7, UR5 ;
        /*3800*/                   HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56 ;
        /*3920*/                   UIADD3 UR4, UP0, UR8, 0x20, URZ ;
        /*3950*/                   UIADD3.X UR5, UR8, -0x3ffffff0, URZ, UP0, !UPT ;
        /*39a0*/                   UMOV UR7, UR5 ;
        /*39b0*/                   HGMMA.64x16x16.F32.BF16 R56, R28, gdesc[UR4].tnspB, R56 ;
"""
THROUGH_THE_STACK = """
        /*3870*/                   UMOV UR37, 0x80000020 ;
        /*3880*/                   IMAD.U32 R153, RZ, RZ, UR37 ;
        /*3890*/                   STL.64 [R1+0xb8], R152 ;
        /*38a0*/                   UMOV UR37, URZ ;
        /*38b0*/                   LDL.64 R162, [R1+0xb8] ;
        /*38c0*/                   R2UR UR37, R163 ;
        /*38d0*/                   UIADD3.64 UR38, UR36, 0x2, URZ ;
        /*38e0*/                   HGMMA.64x64x16.F32 R24, gdesc[UR36], R24, gsb0 ;
"""
SWAPPED = """
        /*3390*/                   CS2R R88, SRZ ;
        /*33d0*/                   IADD3 R100, P0, R100, 0x2, RZ ;
        /*3410*/                   IADD3.X R88, R88, 0x40000040, RZ, P0, !PT ;
        /*3420*/                   R2UR UR55, R88 ;
        /*3430*/                   R2UR UR53, R100 ;
        /*3450*/                   R2UR UR52, R88 ;
        /*34a0*/                   ULOP3.LUT UR53, UR53, UR52, URZ, 0x3c, !UPT ;
        /*34c0*/                   ULOP3.LUT UR52, UR53, UR52, URZ, 0x3c, !UPT ;
        /*34e0*/                   ULOP3.LUT UR53, UR53, UR52, URZ, 0x3c, !UPT ;
        /*3670*/                   HGMMA.64x32x16.F32.BF16 R144, gdesc[UR52], R144 ;
"""


def test_descriptors_are_followed() -> None:
    assert lost_descriptors(RIGHT) == []
    assert lost_descriptors(WRONG) == ["39b0"]
    assert lost_descriptors(THROUGH_THE_STACK) == []
    assert lost_descriptors(THROUGH_THE_STACK.replace("R2UR UR37", "R2UR UR38")) == ["38e0"]
    assert lost_descriptors(SWAPPED) == []
    assert lost_descriptors(SWAPPED.replace("UR53, UR53, UR52", "UR53, UR53, UR51")) == ["3670"]
