"""Curvature of a loss from products with its Hessian: traces, eigenvalues, densities, scores.

Everything here takes a matvec, knows no network, draws only from the generator it is given, and
says with every value how far it may be off and how many products it took.
"""
