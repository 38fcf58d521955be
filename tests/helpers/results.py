"""A row of the kernel benchmark."""

ROW = dict(
    name="group_norm", shape="256@32x32", dtype="bf16", provider="triton", mode="forward",
    ms_p20=1.0, ms_p50=2.0, ms_p80=3.0, gb_s=10.0, tflop_s=0.1, floor_share=0.5, status="ok",
)  # fmt: skip
