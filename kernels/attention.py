"""Self-attention over the pixels of a feature map."""

import math

import torch


def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Softmax attention of every pixel to every pixel, head by head.

    qkv is [N, 3·C, H, W] with channels laid out [head, channel, {q, k, v}], as in published
    weights; C must divide by heads. The softmax runs over the keys in float32 with scale
    1/√(C/heads). Returns [N, C, H, W] in the dtype of qkv.
    """
    n, c3, height, width = qkv.shape
    channels = c3 // 3 // heads
    q, k, v = qkv.reshape(n, heads, channels, 3, height * width).unbind(3)
    logits = q.transpose(-1, -2) @ k
    weights = (logits.float() / math.sqrt(channels)).softmax(-1).to(qkv.dtype)
    return (v @ weights.transpose(-1, -2)).reshape(n, c3 // 3, height, width)
