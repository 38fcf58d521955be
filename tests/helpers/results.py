"""A row of a kernel benchmark's results."""

ROW = dict(
    name="group_norm", shape="256@32x32", dtype="bf16", provider="triton", mode="forward",
    ms={"p20": 1.0, "p50": 2.0, "p80": 3.0}, gb_s=10.0, tflop_s=0.1, floor_share=0.5,
    status="ok",
)  # fmt: skip
