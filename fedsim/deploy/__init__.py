"""Federations on separate machines: a server that waits for clients, clients that join, and their certificates."""
