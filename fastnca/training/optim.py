"""SOAP, for the small matrices of an automaton's rule."""

import torch

from .capture import Captured


class Soap(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, "SOAP: improving and stabilizing Shampoo
    using Adam", arXiv:2409.11321).

    A parameter is a matrix [out, in]; the weight of a 1x1 convolution [out, in, 1, 1] and a bias [out] are taken as
    such. Averages of G G^T and G^T G of its gradients G have eigenvectors; in their basis the entries of a gradient are
    nearly independent, and Adam's step for each of them is the right one. The matrices of this package have at most 128
    rows, so that all this costs little beside one gradient.

    Args:
        betas: of Adam's averages. basis_beta: of the averages whose eigenvectors are the basis.
        basis_every: steps between two improvements of the basis, each one power iteration.
        eps: the share of a gradient's norm below which an entry in the basis is taken for rounding, not for a slope.
    """

    def __init__(self, parameters, lr, betas=(0.95, 0.95), basis_beta=0.95, basis_every=5, eps=1e-6):
        super().__init__(
            parameters,
            {
                "lr": lr,
                "betas": betas,
                "basis_beta": basis_beta,
                "basis_every": basis_every,
                "eps": eps,
            },
        )
        self.graphs = {}

    def __setstate__(self, state):
        super().__setstate__(state)  # load_state_dict ends with this, too
        self.graphs = {}  # would change the tensors of before

    @torch.no_grad()
    def step(self, closure=None):
        """One step; ``closure``, where one is given, computes the loss and the gradients anew -> its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if state:
                    state["step"] += 1
                    moving.append(parameter)
                else:
                    self._begin(state, _matrix(parameter.grad), group["basis_beta"])
            if moving:
                self._move_all(moving, group)
        return loss

    def _begin(self, state, gradient, basis_beta):
        """After the first gradient there is a basis, but nothing to divide by yet."""
        # The eigenvectors of G G^T and of G^T G, the largest eigenvalue first, as QR keeps them. In float32 some
        # gradients of rank one do not converge.
        left_basis, _, right_basis = torch.linalg.svd(gradient.double())
        state.update(
            step=torch.tensor(1),
            mean=torch.zeros_like(gradient),
            square=torch.zeros_like(gradient),
            left=(1.0 - basis_beta) * (gradient @ gradient.T),
            right=(1.0 - basis_beta) * (gradient.T @ gradient),
            # By rows, as a checkpoint gives them back: products of the columns that LAPACK leaves round differently.
            left_basis=left_basis.to(gradient).contiguous(),
            right_basis=right_basis.T.to(gradient).contiguous(),
        )

    def _move_all(self, parameters, group):
        """One step of ``parameters``. Its hundreds of small products are one graph on a GPU."""
        steps = [self.state[parameter]["step"].item() for parameter in parameters]
        turns = [step % group["basis_every"] == 0 for step in steps]
        numbers = [[group["lr"], *(1.0 - beta ** (step - 1) for beta in group["betas"])] for step in steps]

        def move_all(numbers, *gradients):
            for parameter, gradient, turn, row in zip(parameters, gradients, turns, numbers):
                self._move(parameter, _matrix(gradient), self.state[parameter], group, turn, *row)

        arguments = torch.tensor(numbers, device=parameters[0].device), *(parameter.grad for parameter in parameters)
        if not parameters[0].is_cuda:
            move_all(*arguments)
            return
        key = (*map(id, parameters), *turns)
        if key not in self.graphs:
            state = [tensor for parameter in parameters for tensor in self.state[parameter].values() if tensor.is_cuda]
            self.graphs[key] = Captured(move_all, arguments, [*parameters, *state])
        self.graphs[key](*arguments)

    @staticmethod
    def _move(parameter, gradient, state, group, turn, lr, bias1, bias2):
        """Everything of a step that is not counting. ``turn``: whether the basis is improved, too."""
        mean, square, left, right = (state[name] for name in ("mean", "square", "left", "right"))
        left_basis, right_basis = state["left_basis"], state["right_basis"]
        left.lerp_(gradient @ gradient.T, 1.0 - group["basis_beta"])
        right.lerp_(gradient.T @ gradient, 1.0 - group["basis_beta"])
        mean.lerp_(gradient, 1.0 - group["betas"][0])
        square.lerp_((left_basis.T @ gradient @ right_basis).square(), 1.0 - group["betas"][1])
        scale = (square / bias2).sqrt()
        floor = group["eps"] * scale.norm() + torch.finfo(scale.dtype).tiny
        direction = (left_basis.T @ mean @ right_basis / bias1) / (scale + floor)
        parameter.sub_(lr * (left_basis @ direction @ right_basis.T).view_as(parameter))
        if turn:
            left_basis.copy_(torch.linalg.qr(left @ left_basis).Q)
            right_basis.copy_(torch.linalg.qr(right @ right_basis).Q)


def _matrix(gradient):
    """[out, in, ...] or [out] -> [out, in]."""
    return gradient.flatten(1) if gradient.dim() > 1 else gradient[:, None]
