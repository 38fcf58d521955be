"""Import Triton, or a stub that lets the kernels' modules be imported without it."""

AVAILABLE = True
try:
    import triton
    import triton.language as tl

    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1
except ImportError:
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f))
    tl = SimpleNamespace(constexpr=None)
    INTERPRETED = AVAILABLE = False

__all__ = ["AVAILABLE", "INTERPRETED", "tl", "triton"]
