"""Muon, for the small matrices of an automaton's rule."""

import math

import torch

VECTOR_RATE = 0.1  # share of the learning rate that vectors take


def orthogonalize(matrix):
    """About U V^T of a matrix U S V^T [m, n]: its larger singular values become 0.7...1.2, and 0 stays 0.

    Five steps of Jordan's quintic Newton-Schulz iteration.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural
    networks").

    A matrix W [out, in], or the weight [out, in, 1, 1] of a 1x1 convolution, steps by 0.2 lr sqrt(max(out, in)) times
    its orthogonalized Nesterov momentum: all directions of the gradient are followed alike, and the entries change by
    about 0.2 lr in root mean square, Adam's usual step, and decay by lr ``weight_decay`` (Liu et al. 2025, "Muon is
    scalable for LLM training"). Other parameters, the biases, take Adam's steps at a tenth of ``lr``.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.3, betas=(0.9, 0.999), eps=1e-8):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step = self._matrix_step if parameter.dim() > 1 else self._vector_step
                    step(parameter, self.state[parameter], **{k: v for k, v in group.items() if k in self.defaults})

    def _matrix_step(self, parameter, state, lr, momentum, weight_decay, **_):
        average = state.setdefault("momentum", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1.0 - momentum)
        direction = parameter.grad.lerp(average, momentum).flatten(1)
        scale = 0.2 * math.sqrt(max(direction.shape))
        parameter.mul_(1.0 - lr * weight_decay)
        parameter.add_(orthogonalize(direction).view_as(parameter), alpha=-lr * scale)

    def _vector_step(self, parameter, state, lr, betas, eps, **_):
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter))
            state.update(exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(parameter.grad, 1.0 - betas[0])
        square.lerp_(parameter.grad.square(), 1.0 - betas[1])
        bias1, bias2 = (1.0 - beta ** state["step"].item() for beta in betas)
        parameter.addcdiv_(mean / bias1, (square / bias2).sqrt() + eps, value=-VECTOR_RATE * lr)
