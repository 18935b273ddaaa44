"""Optimizers on matrix manifolds. Installed, the package is called manifold_muon:  from manifold_muon import Monitor, for_model

In the order in which one reads it; nothing here knows the GPT of model/:

    manifold_muon    the optimizer: momentum, batches of equal shape, ranks (stack: what it gives a step rule; ownership: who computes what)
    manifolds        what a manifold is, and all of them
    certified        our step, from top to bottom (frame, refine: parts of it)
    published        the paper's step
    certificate      how good a step was (monitor: a watch over all of them)
    linalg, msign, iterators    products at a named precision, matrix signs, their coefficients
    assignment       parameter names → optimizers and manifolds (any_model: for any module of torch)
    modular, norms   steepest descent in the norm of each parameter
    geonorm          steps of the residual stream on the sphere, for model/
"""

from .any_model import for_model
from .assignment import AssignmentError
from .certificate import certify
from .certified import CertifiedStep, direction
from .iterators import ITERATORS, iterator
from .manifold_muon import ManifoldMuon
from .manifolds import MANIFOLDS, Manifold
from .monitor import ManifoldWarning, Monitor
from .published import PublishedStep

__all__ = [
    "ITERATORS",
    "MANIFOLDS",
    "AssignmentError",
    "CertifiedStep",
    "Manifold",
    "ManifoldMuon",
    "ManifoldWarning",
    "Monitor",
    "PublishedStep",
    "certify",
    "direction",
    "for_model",
    "iterator",
]
