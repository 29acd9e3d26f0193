"""SOAP, for the small matrices of an automaton's rule."""

import torch

OPTIONS = ("lr", "betas", "basis_beta", "basis_every", "eps")


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

    @torch.no_grad()
    def step(self, closure=None):
        """One step; ``closure``, where one is given, computes the loss and the gradients anew -> its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, self.state[parameter], **{name: group[name] for name in OPTIONS})
        return loss

    def _step(self, parameter, state, lr, betas, basis_beta, basis_every, eps):
        gradient = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[:, None]
        if not state:
            rows, columns = gradient.shape
            state.update(step=torch.tensor(0), mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
            state.update(left=gradient.new_zeros(rows, rows), right=gradient.new_zeros(columns, columns))
        state["step"] += 1
        step = state["step"].item()
        mean, square, left, right = (state[name] for name in ("mean", "square", "left", "right"))
        left.lerp_(gradient @ gradient.T, 1.0 - basis_beta)
        right.lerp_(gradient.T @ gradient, 1.0 - basis_beta)
        if step == 1:  # there is a basis now, but nothing to divide by yet
            # The eigenvectors of G G^T and of G^T G, the largest eigenvalue first, as QR keeps them. In float32 some
            # gradients of rank one do not converge.
            left_basis, _, right_basis = torch.linalg.svd(gradient.double())
            self._set_basis(state, left_basis.to(gradient), right_basis.T.to(gradient))
            return
        left_basis, right_basis = state["left_basis"], state["right_basis"]
        mean.lerp_(gradient, 1.0 - betas[0])
        square.lerp_((left_basis.T @ gradient @ right_basis).square(), 1.0 - betas[1])
        bias1, bias2 = (1.0 - beta ** (step - 1) for beta in betas)
        scale = (square / bias2).sqrt()
        floor = eps * scale.norm() + torch.finfo(scale.dtype).tiny
        direction = (left_basis.T @ mean @ right_basis / bias1) / (scale + floor)
        parameter.add_((left_basis @ direction @ right_basis.T).view_as(parameter), alpha=-lr)
        if step % basis_every == 0:
            self._set_basis(state, torch.linalg.qr(left @ left_basis).Q, torch.linalg.qr(right @ right_basis).Q)

    @staticmethod
    def _set_basis(state, left, right):
        """By rows, as a checkpoint gives it back: products of the columns that LAPACK leaves round differently."""
        state.update(left_basis=left.contiguous(), right_basis=right.contiguous())
