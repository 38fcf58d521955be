"""Instruction counts of machine code written by hand, as nvdisasm prints it."""

import pytest

from sid_fast.kernels import sass


def program(text: str) -> sass.Program:
    """Of lines "@P0 BRA L" and labels "L:"; addresses and backquotes are added."""
    lines = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            lines.append(f".L_x_{line}")
        else:
            words = [f"`(.L_x_{w})" if w.isdigit() else w for w in line.split()]
            lines.append(f"        /*0000*/                   {' '.join(words)} ;")
    return sass.parse("\n".join(lines))


def test_instructions_are_read_with_predicates_and_widths():
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
    found = sass.loops(code)
    assert found == {1: {1, 2, 3, 4, 5, 6}, 2: {2, 3}, 4: {4, 5}}
    assert sass.count(code, (10, 7)) == (1 + 10 * (1 + 7 * 2 + 7 * 2 + 1) + 1, 32 * 16 * 70)
    with pytest.raises(ValueError, match="nested deeper than the 1"):
        sass.count(code, (10,))


def test_a_guard_does_not_skip_a_loop():
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
    """Wide accesses of the else branch, not the shorter one by single numbers."""
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


def test_an_exit_of_some_threads_is_passed():
    code = program(
        """
        @P0 EXIT
        STG.E
        EXIT
        """
    )
    assert sass.count(code, ()) == (3, 32 * 4)


def test_the_shortest_path_is_counted_where_they_move_as_much():
    """A slow path placed behind the exit jumps back and is no loop."""
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


def test_a_loop_may_be_left_from_its_middle():
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
    assert sass.blocks_per_multiprocessor(73, 0, 4) == 6  # as with 80
    assert sass.blocks_per_multiprocessor(32, 110 * 1024, 4) == 2
    assert sass.blocks_per_multiprocessor(32, 0, 16) == 4
    assert sass.blocks_per_multiprocessor(16, 0, 1) == 32
