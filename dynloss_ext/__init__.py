from .eigen import ConvergenceWarning, EigenResult, eigsh
from .hessian import HessianOperator

__all__ = ["ConvergenceWarning", "EigenResult", "HessianOperator", "eigsh"]
