"""fedsim: federated-learning simulation with regularised, pruned and encrypted clients."""

__version__ = "0.1.0"
