"""Instruction counts of hand-written machine code in nvdisasm's format."""

import pytest

from sid_fast.kernels import sass


def program(text: str) -> sass.Program:
    """Parse lines such as "@P0 BRA 1" and labels such as "1:"; add addresses and backquotes."""
    lines = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            lines.append(f".L_x_{line}")
        else:
            words = [f"`(.L_x_{w})" if w.isdigit() else w for w in line.split()]
            lines.append(f"        /*0000*/                   {' '.join(words)} ;")
    return sass.parse("\n".join(lines))


def test_instructions_are_parsed_with_predicates_and_widths():
    code = program(
        """
        @!P0 LDG.E.128 R4, desc[UR4][R2.64]
        @PT STG.E.64 desc[UR4][R2.64], R4
        LDG.E.U16.CONSTANT R5, desc[UR4][R2.64]
        LDG.E R5, desc[UR4][R2.64]
        LDS.128 R4, [R2]
        EXIT
        """
    )
    assert [i.predicate for i in code.instructions] == ["!P0", None, None, None, None, None]
    assert [i.bytes() for i in code.instructions] == [16, 8, 2, 4, 0, 0]
    assert code.successors == [[1], [2], [3], [4], [5], []]


def test_nested_loops_multiply():
    code = program(
        """
        MOV
        1:
        MOV
        2:
        STG.E.128
        @P0 BRA 2
        3:
        FADD
        @!P1 BRA 3
        @P0 BRA 1
        EXIT
        """
    )
    assert sass.loops(code) == {1: {1, 2, 3, 4, 5, 6}, 2: {2, 3}, 4: {4, 5}}
    assert sass.count(code, (10, 7)) == (1 + 10 * (1 + 7 * 2 + 7 * 2 + 1) + 1, 32 * 16 * 70)
    with pytest.raises(ValueError, match="nested more than 1 deep"):
        sass.count(code, (10,))


def test_the_path_through_a_guarded_loop_is_counted():
    code = program(
        """
        @P0 BRA 2
        1:
        FADD
        @P1 BRA 1
        2:
        EXIT
        """
    )
    assert sass.count(code, (5,)) == (1 + 5 * 2 + 1, 0)


def test_the_path_of_full_tiles_is_counted():
    """The branch with wide accesses, not the shorter one that loads single elements."""
    code = program(
        """
        @P0 BRA 1
        LDG.E
        BRA 2
        1:
        IADD3
        IADD3
        LDG.E.128
        2:
        EXIT
        """
    )
    assert sass.count(code, ()) == (5, 0)


def test_a_predicated_exit_does_not_end_the_path():
    code = program(
        """
        @P0 EXIT
        STG.E
        EXIT
        """
    )
    assert sass.count(code, ()) == (3, 32 * 4)


def test_the_shorter_of_paths_that_move_equal_bytes_is_counted():
    """A slow path placed after the exit, which jumps back, is not a loop."""
    code = program(
        """
        FADD
        @P0 BRA 2
        1:
        FMUL
        EXIT
        2:
        FMUL
        FMUL
        BRA 1
        """
    )
    assert sass.loops(code) == {}
    assert sass.count(code, ()) == (4, 0)


def test_a_loop_may_exit_from_its_middle():
    code = program(
        """
        1:
        FADD
        @P0 EXIT
        BRA 1
        """
    )
    assert sass.count(code, (4,)) == (8, 0)


def test_blocks_are_limited_by_registers_shared_memory_and_warps():
    assert sass.blocks_per_multiprocessor(80, 0, 8) == 3
    assert sass.blocks_per_multiprocessor(64, 0, 8) == 4
    assert sass.blocks_per_multiprocessor(73, 0, 4) == 6  # allocated as 80
    assert sass.blocks_per_multiprocessor(32, 110 * 1024, 4) == 2
    assert sass.blocks_per_multiprocessor(32, 0, 16) == 4
    assert sass.blocks_per_multiprocessor(16, 0, 1) == 32
