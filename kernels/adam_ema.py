"""The update of a network: gradient clean-up, Adam and the moving average, in one call."""

import torch


@torch.no_grad()
def adam_ema(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    ema: list[torch.Tensor],
    *,
    step: torch.Tensor,
    apply: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    ema_beta: float = 0.0,
) -> torch.Tensor:
    """Adam (arXiv 1412.6980, algorithm 1) on cleaned gradients; then ema ← p + β(ema − p).

    Lists run over the parameters, float32, and are updated in place. Gradients are cleaned
    first, as the published implementation does: NaN → 0, ±inf → ±1e5. exp_avg is empty when
    β1 = 0: the first moment is then the gradient and is not kept. ema is empty where no average
    is wanted. step is a float64 scalar, the updates made so far; apply is a bool scalar, and
    False leaves all but the gradients as it was, to the bit. Both are tensors, so that the host
    need not know them. Returns how many gradient values were not finite, an int64 scalar.
    """
    nonfinite = torch.stack([torch.isfinite(g).logical_not().sum() for g in grads]).sum()
    for grad in grads:
        torch.nan_to_num_(grad, nan=0.0, posinf=1e5, neginf=-1e5)

    on = apply.to(torch.float32)
    step += on
    one = torch.ones_like(step)
    correction1 = torch.where(apply, 1 - beta1**step, one).float()
    correction2 = torch.where(apply, 1 - beta2**step, one).sqrt().float()

    squares = torch._foreach_mul(grads, grads)
    torch._foreach_mul_(squares, on * (1 - beta2))
    torch._foreach_mul_(exp_avg_sq, torch.where(apply, beta2, 1.0))
    torch._foreach_add_(exp_avg_sq, squares)
    if exp_avg:
        torch._foreach_mul_(exp_avg, torch.where(apply, beta1, 1.0))
        torch._foreach_add_(exp_avg, torch._foreach_mul(grads, on * (1 - beta1)))

    change = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(change, correction2)
    torch._foreach_add_(change, eps)
    change = torch._foreach_div(exp_avg or grads, change)
    torch._foreach_mul_(change, -lr * on / correction1)
    torch._foreach_add_(params, change)
    if ema:
        distance = torch._foreach_sub(params, ema)
        torch._foreach_mul_(distance, on * (1 - ema_beta))
        torch._foreach_add_(ema, distance)
    return nonfinite
