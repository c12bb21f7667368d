"""Secure federated transfer learning: a party with labels and one without, other features, a few common people."""
