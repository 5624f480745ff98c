"""A small model, random Fishers, and the unfolded float64 penalty."""

import torch
from torch import nn


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def random_fisher(net, generator):
    """Spread over six orders of magnitude, as real ones are, with zeros among them."""
    fisher = {}
    for name, p in net.named_parameters():
        scale = 10 ** (-6 * torch.rand(p.shape, generator=generator))
        keep = torch.rand(p.shape, generator=generator) > 0.2
        fisher[name] = scale * keep
    return fisher


def wander(net, generator, size=0.1):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))


class Unfolded:
    """sum_t F_t (theta - theta*_t)^2 in float64, experience by experience."""

    def __init__(self, decay_factor=None):
        self.decay_factor = decay_factor
        self.terms = []

    def consolidate(self, net, fisher):
        term = {n: (fisher[n].double(), p.detach().double()) for n, p in net.named_parameters()}
        if self.decay_factor is not None:
            for old in self.terms:
                term = {
                    n: (self.decay_factor * old[n][0] + F, theta) for n, (F, theta) in term.items()
                }
            self.terms = []
        self.terms.append(term)

    def __call__(self, net):
        thetas = {n: p.detach().double().requires_grad_() for n, p in net.named_parameters()}
        value = sum(
            (F * (thetas[n] - anchor).square()).sum()
            for term in self.terms
            for n, (F, anchor) in term.items()
        )
        gradients = torch.autograd.grad(value, list(thetas.values()))
        return float(value.detach()), torch.cat([g.flatten() for g in gradients])


def gradient_of(value, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))])
