"""Optimizers on matrix manifolds. Knows tensors and names, not models.

Installed, the package is called manifold_muon:  from manifold_muon import Monitor, for_model
"""

from .any_model import for_model
from .assignment import AssignmentError
from .certified import CertifiedStep
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
    "for_model",
    "iterator",
]
